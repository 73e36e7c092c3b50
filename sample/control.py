"""Pictures that follow a hint, on a page: above the hints, then what follows them, then without.

python sample/control.py mini edges
python sample/control.py mini segmentation
"""

import sys
from typing import Any

import numpy as np
from PIL import Image

import jaxgen
from jaxgen.data import images
from jaxgen.data.annotators import maps
from jaxgen.data.emoji_scenes.scenes import EmojiScenes

COLUMN = {"edges": "lines", "segmentation": "segmentation"}  # of the scenes
COUNT = 6


def main(folder: str, name: str) -> None:
    # Of a split that no training sees.
    scenes = EmojiScenes("emoji_scenes:test", columns=(COLUMN[name],))
    examples = [scenes.read(i) for i in range(COUNT)]
    captions = [example["caption"] for example in examples]
    hints = [example[COLUMN[name]] for example in examples]
    if name == "segmentation":  # of labels, a colour for each subject
        hints = [maps.segmentation(labels, maps.distinct(256)) for labels in hints]

    asked: dict[str, Any] = {
        "prompts": captions,
        "steps": 20,
        "guidance": 4.0,
        "seed": 0,
        "progress": True,
    }
    plain = [*jaxgen.sample(*jaxgen.load(folder), **asked)]
    model, params = jaxgen.load(folder, control=[name])
    made = [*jaxgen.sample(model, params, control=np.stack(hints), **asked)]

    for i, caption in enumerate(captions):
        print(f"{i}: {caption}")
    sheet = images.rows([hints, made, plain]).repeat(2, 0).repeat(2, 1)  # large enough to look at
    Image.fromarray(sheet).save(f"control_{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
