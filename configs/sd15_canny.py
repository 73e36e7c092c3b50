"""ControlNet for Canny edges on Stable Diffusion 1.5 (Zhang et al. 2023).

    jaxgen train configs/sd15_canny.py --task.model FOLDER --data.source FOLDER

The base is frozen, half of the captions are empty, AdamW at 1e-5 throughout, batches of 32, as the
paper's runs; edges are found on the fly, with random thresholds. Pictures come out well from the
first step on; that they follow the edges comes suddenly, within some ten thousand steps. What pays
is a larger batch (--batch-size 256 --accumulate 8), before more steps.

On small devices, begin with the middle link alone, then connect the rest:

    jaxgen train configs/sd15_canny.py --task.model FOLDER --data.source FOLDER \\
           --task.links middle --steps 10000 --out runs/middle
    jaxgen train configs/sd15_canny.py --task.model FOLDER --data.source FOLDER \\
           --task.control runs/middle/model --steps 20000
"""

from pathlib import Path

from jaxgen.training.recipe import AdamW, ControlNet, Images, Train

config = Train(
    task=ControlNet(model="fresh:sd15", hint="canny"),
    data=Images(size=512, crop="random", flip=True, workers=8),
    optimizer=AdamW(learning_rate=1e-5, weight_decay=1e-2),
    dtype="bf16",
    remat=True,
    batch_size=32,
    steps=30_000,
    save_every=1000,
    out=Path("runs/sd15_canny"),
)
