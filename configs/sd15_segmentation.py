"""ControlNet for segmentation on Stable Diffusion 1.5 (Zhang et al. 2023).

    jaxgen train configs/sd15_segmentation.py --task.model FOLDER --data.source FOLDER

FOLDER is of pictures, each with a column `segmentation`: a PNG of labels as in ADE20K's files (0 is
other, then 150 classes), which are coloured by its palette and resized to the nearest pixel. For
classes of another kind, add --task.palette distinct. Twenty thousand pictures are enough (the
paper's run on ADE20K); rate and batch are the paper's.
"""

from pathlib import Path

from jaxgen.training.recipe import AdamW, ControlNet, Images, Train

config = Train(
    task=ControlNet(model="fresh:sd15", hint="segmentation"),
    data=Images(size=512, crop="random", flip=True, workers=8),
    optimizer=AdamW(learning_rate=1e-5, weight_decay=1e-2),
    dtype="bf16",
    remat=True,
    batch_size=32,
    steps=30_000,
    save_every=1000,
    out=Path("runs/sd15_segmentation"),
)
