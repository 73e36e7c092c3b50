"""The embedded model's ControlNet for segmentation: each subject where its colour is.

    jaxgen train configs/mini_segmentation.py

Hints are maps of labels, a colour for each subject (`--task.palette distinct`), black for the
background. Everything else is as in configs/mini_edges.py. What ships went on twice, on
bases that had learned on: 2000 steps with seed 12, then, on the base that ships:

    jaxgen train configs/mini_segmentation.py --task.control segmentation --seed 13 \\
        --steps 2500 --out runs/on
"""

from pathlib import Path

from jaxgen.training.recipe import EMA, ControlNet, Images, Muon, Train

config = Train(
    task=ControlNet(model="mini", hint="segmentation", palette="distinct", hint_widths=(8, 16, 48)),
    data=Images(source="emoji_scenes", size=64),
    optimizer=Muon(learning_rate=3e-3, warmup=50, weight_decay=1e-2, schedule="linear"),
    ema=EMA(decay=0.99),
    batch_size=32,
    steps=2000,
    save_every=100,
    keep=100,
    out=Path("runs/mini_segmentation"),
)
