"""How often the embedded model's CLIP finds the caption of a scene among a hundred.

    python benchmarks/retrieval.py runs/mini_clip/model/clip

Scenes of emoji_scenes' test split, which no training sees, a hundred at a time; captions leave
some of what a scene shows unsaid, and two of a hundred can be nearly alike. Prints Markdown.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from jaxgen.data.emoji_scenes.scenes import EmojiScenes
from jaxgen.evaluation.clip import open_clip, retrieval
from jaxgen.types import UserError

AMONG = 100


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    folder: tyro.conf.Positional[Path]
    """A CLIP folder."""
    groups: int = 10
    """Hundreds of scenes."""
    split: str = "test"
    """Of emoji_scenes."""


def main(bench: Bench) -> None:
    clip, scenes = open_clip(bench.folder), EmojiScenes(f"emoji_scenes:{bench.split}")
    if not 0 < bench.groups * AMONG <= len(scenes):
        raise UserError(f"--groups {bench.groups} is not from 1 to {len(scenes) // AMONG}")
    found = []
    for group in range(bench.groups):
        examples = [scenes.read(group * AMONG + i) for i in range(AMONG)]
        images, captions = ([example[key] for example in examples] for key in ("image", "caption"))
        found.append(retrieval(clip, images, captions))
    print(f"{bench.groups} groups of {AMONG} scenes of {bench.split}\n")
    print("| nearest is right | mean | least |\n|---|---|---|")
    for name in found[0]:
        shares = np.array([shares[name] for shares in found])
        print(f"| {name} | {shares.mean():.1%} | {shares.min():.1%} |")


if __name__ == "__main__":
    try:
        main(tyro.cli(Bench, description=__doc__))
    except UserError as error:
        print(f"retrieval: {error}", file=sys.stderr)
        sys.exit(2)
