"""The embedded model's ControlNet for segmentation: each subject where its colour is.

    jaxgen train configs/mini_segmentation.py

Hints are maps of labels, a colour for each subject (`--task.palette distinct`), black for the
background. Everything else is as in configs/mini_edges.py.
"""

from pathlib import Path

from jaxgen.training.recipe import EMA, AdamW, ControlNet, Images, Train

config = Train(
    task=ControlNet(model="mini", hint="segmentation", palette="distinct"),
    data=Images(source="emoji_scenes", size=64),
    optimizer=AdamW(learning_rate=5e-4, warmup=200, weight_decay=1e-2),
    ema=EMA(decay=0.999),
    batch_size=32,
    steps=10_000,
    save_every=200,
    out=Path("runs/mini_segmentation"),
)
