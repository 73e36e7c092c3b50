"""The embedded model's ControlNet for line art: it colours drawings.

    jaxgen train configs/mini_edges.py

Hints are the line art of what a scene shows, in its place, white on black; the caption says what it
is and in what style. As in the paper, the base is frozen and half of the captions are empty; the
rate is that of a small network. Numbers are the project's own.
"""

from pathlib import Path

from jaxgen.training.recipe import EMA, AdamW, ControlNet, Images, Train

config = Train(
    task=ControlNet(model="mini", hint="lines"),
    data=Images(source="emoji_scenes", size=64),
    optimizer=AdamW(learning_rate=5e-4, warmup=200, weight_decay=1e-2),
    ema=EMA(decay=0.999),
    batch_size=32,
    steps=10_000,
    save_every=200,
    out=Path("runs/mini_edges"),
)
