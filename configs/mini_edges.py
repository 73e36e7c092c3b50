"""The embedded model's ControlNet for line art: it colours drawings.

    jaxgen train configs/mini_edges.py

Hints are the line art of what a scene shows, in its place, white on black; the caption says what it
is and in what style. As in the paper, the base is frozen and half of the captions are empty. Muon
learns the base in fewer steps than AdamW, and so it does its copy; the rate ends at 0, so that the
average need not be long. The encoder of hints has half of the usual channels, since it works at
the size of pixels. Checkpoints are kept for the curve of benchmarks/obedience.py. Numbers are the
project's own.
"""

from pathlib import Path

from jaxgen.training.recipe import EMA, ControlNet, Images, Muon, Train

config = Train(
    task=ControlNet(model="mini", hint="lines", hint_widths=(8, 16, 48)),
    data=Images(source="emoji_scenes", size=64),
    optimizer=Muon(learning_rate=3e-3, warmup=50, weight_decay=1e-2, schedule="linear"),
    ema=EMA(decay=0.99),
    batch_size=32,
    steps=2000,
    save_every=100,
    keep=100,
    out=Path("runs/mini_edges"),
)
