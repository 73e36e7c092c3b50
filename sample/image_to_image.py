"""Image to image, and inpainting where a mask is given.

python sample/image_to_image.py MODEL "a fox in snow" photo.png [mask.png]
"""

import sys
from pathlib import Path

from PIL import Image

import jaxgen
from jaxgen.data import images


def main(folder: str, prompt: str, photo: str, mask: str = "") -> None:
    model, params = jaxgen.load(folder)
    image = images.read_image(Path(photo))
    # White is repainted. A 4-channel UNet keeps the rest by blending, a 9-channel one reads it.
    hole = images.read_mask(Path(mask)) if mask else None
    # The strength is a share of the steps: another one compiles nothing.
    for strength in (0.4, 0.6, 0.8):
        (picture,) = jaxgen.sample(
            model, params, prompt, image=image, mask=hole, strength=strength, progress=True
        )
        Image.fromarray(picture).save(f"image_{strength}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
