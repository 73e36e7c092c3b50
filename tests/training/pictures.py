"""Small folders of pictures for tests of training."""

import json

import numpy as np
from PIL import Image


def write_folder(folder, count=16, side=48, columns=()):
    """Pictures of coloured blocks with captions; each further column is another picture."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    colours = ("red", "green", "blue", "grey")
    lines = []
    for i in range(count):
        row = {"file_name": f"{i:03}.png", "text": f"a {colours[i % 4]} picture, number {i}"}
        for name in ("", *columns):
            file = f"{i:03}{name}.png"
            blocks = rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
            Image.fromarray(np.kron(blocks, np.ones((8, 8, 1), np.uint8))).save(folder / file)
            if name:
                row[f"{name}_file_name"] = file
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
