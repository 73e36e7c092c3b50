"""Two steps of the full-size Stable Diffusion 1.5 UNet on a CPU: does it fit, does it run?

    jaxgen train configs/sd15_two_steps.py

Random weights, 256 pixels, one picture at a time, Lion (one moment instead of two) and no average:
about 16 GB of memory, so have 20 GB free. What it ends in is a whole model folder of 4 GB, which
diffusers loads.
"""

from pathlib import Path

from jaxgen.training.recipe import Images, Lion, TextToImage, Train

config = Train(
    task=TextToImage(model="fresh:sd15"),
    data=Images(source="tests/assets/emoji", size=256, least_side=64),
    optimizer=Lion(learning_rate=1e-5),
    batch_size=1,
    steps=2,
    save_every=2,  # a save beside a step would take 7 GB more
    keep=1,
    log_every=1,
    out=Path("runs/sd15_two_steps"),
)
