"""What a search finds, in a folder of samples: the seeds and a strip, beside the pictures."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxgen.data import images
from jaxgen.output import Writer
from jaxgen.seedselect import seeds
from jaxgen.seedselect.selection import Found

STRIPS = 16  # rows of strip.png at most


def kept(
    found: Iterable[Found], writer: Writer, settings: Mapping[str, Any], made: Mapping[str, Any]
) -> Iterator[tuple[int, np.ndarray]]:
    """The pictures, for the writer; each seed is in `seeds/` before its picture is passed on.

    All seeds (`seed.npz`) and the strips (`strip.png`) are written in the end, come what may.

    Args:
        settings: of `output.identity`, and the prompt.
        made: what else seeds and the list of pictures say of where they came from.
    """
    folder = writer.folder
    noises: dict[int, np.ndarray] = {}
    strips: dict[int, list[np.ndarray]] = {}
    try:
        for one in found:
            name = f"seeds/{writer.first + one.index:05}.npz"
            (folder / "seeds").mkdir(exist_ok=True)
            seeds.write(folder / name, one.seed[None], {**settings, **made, **one.figures()})
            noises[one.index] = one.seed
            if len(strips) < STRIPS:
                strips[one.index] = one.frames
            writer.of_picture[one.index] = {"latents": name, **one.figures(), **made}
            yield one.index, one.image
    finally:
        if noises:
            ordered = np.stack([noises[i] for i in sorted(noises)])
            seeds.write(folder / "seed.npz", ordered, {**settings, **made})
            strip = images.rows([strips[i] for i in sorted(strips)])
            images.save_png(folder / "strip.png", strip, "each row a seed, as it improves")
