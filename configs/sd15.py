"""Stable Diffusion 1.5: text to image at 512 pixels, on a checkpoint's own VAE and text encoder.

    jaxgen train configs/sd15.py --task.model FOLDER --data.source FOLDER --mesh.fsdp 8

The last stage of training, as on the model card of Stable Diffusion v1-5, which went on from v1-2:
595,000 steps of AdamW, learning rate 1e-4 after 10,000 steps of warmup, batches of 2048, a tenth of
the captions empty, EMA with decay 0.9999, on 32 x 8 A100 GPUs. From scratch, add --task.fresh unet:
FOLDER then gives the VAE and the text encoder alone.

These numbers would undo a finished UNet. To fine-tune one, add

    --optimizer.learning-rate 1e-5 --optimizer.warmup 500 --batch-size 32 --steps 5000

with the rate and the batch of ControlNet's authors (Zhang et al. 2023); for a single subject Ruiz
et al. 2023 take a rate of 5e-6 and 1000 steps of 4 pictures.
"""

from pathlib import Path

from jaxgen.training.recipe import EMA, AdamW, Images, Samples, TextToImage, Train

config = Train(
    task=TextToImage(model="fresh:sd15"),
    data=Images(size=512, crop="random", flip=True, caption_dropout=0.1, workers=8),
    optimizer=AdamW(learning_rate=1e-4, warmup=10_000, weight_decay=1e-2),
    ema=EMA(decay=0.9999),
    dtype="bf16",
    remat=True,
    batch_size=2048,
    steps=595_000,
    save_every=2000,
    samples=Samples(prompts=("a red apple on a table", "an owl in a tree at night"), every=2000),
    out=Path("runs/sd15"),
)
