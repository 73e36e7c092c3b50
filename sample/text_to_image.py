"""Text to image, on a page.

python sample/text_to_image.py MODEL "a fox in snow" "an owl"
"""

import sys

from PIL import Image

import jaxgen


def main(folder: str, *prompts: str) -> None:
    model, params = jaxgen.load(folder)
    pictures = jaxgen.sample(
        model,
        params,
        list(prompts),
        steps=30,
        guidance=7.5,
        seed=0,  # image i of a prompt depends on (seed, i) alone
        count=2,
        progress=True,
    )
    for i, picture in enumerate(pictures):  # uint8 [H, W, 3], prompt by prompt
        Image.fromarray(picture).save(f"text_{i}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
