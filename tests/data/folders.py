"""Small image folders for the tests, written to a temporary path."""

import json

import numpy as np
from PIL import Image


def pixels(i, width=48, height=48):
    """A picture that no other number has: uint8 [H, W, 3], smooth, so that scaling keeps it."""
    rng = np.random.default_rng(i)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def write_folder(path, count, size=lambda i: (48, 48), more=lambda i: {}):
    """`count` PNG pictures, `metadata.jsonl`, and the column `n` with the picture's number."""
    path.mkdir()
    lines = []
    for i in range(count):
        Image.fromarray(pixels(i, *size(i))).save(path / f"{i:03d}.png")
        lines.append({"file_name": f"{i:03d}.png", "text": f"picture {i}", "n": i} | more(i))
    write_metadata(path, lines)
    return str(path)


def write_metadata(path, lines):
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (path / "metadata.jsonl").write_text(text, "utf-8")
