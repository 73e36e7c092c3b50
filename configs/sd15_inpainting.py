"""Inpainting on Stable Diffusion 1.5: a UNet of 9 channels that fills what a mask hides.

    jaxgen train configs/sd15_inpainting.py --task.model FOLDER --data.source FOLDER

The model card of stable-diffusion-inpainting: from a text-to-image checkpoint, five more input
channels that begin at zero, 440,000 steps at 512 pixels, a tenth of the captions empty, synthetic
masks, and everything hidden in a quarter of them. Rate and batch are those of the base model.
"""

from pathlib import Path

from jaxgen.training.recipe import EMA, AdamW, Images, Inpainting, Train

config = Train(
    task=Inpainting(model="fresh:sd15"),
    data=Images(size=512, crop="random", flip=True, caption_dropout=0.1, workers=8),
    optimizer=AdamW(learning_rate=1e-4, warmup=10_000),
    ema=EMA(decay=0.9999),
    dtype="bf16",
    remat=True,
    batch_size=2048,
    steps=440_000,
    save_every=2000,
    out=Path("runs/sd15_inpainting"),
)
