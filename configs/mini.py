"""The miniature: a whole Stable Diffusion, small enough to train on a laptop's CPU.

    jaxgen train configs/mini.py --data.source FOLDER

The UNet learns from random parameters; the autoencoder and the text encoder, which learns on, ship
(see jaxgen/assets/mini). It shows every part of training at work: once compiled, a minute of steps
on two cores. `--steps 1000` takes ten, and its pictures are sketches. Numbers are the project's
own.
"""

from pathlib import Path

from jaxgen.training.recipe import EMA, AdamW, Images, Samples, TextToImage, Train

config = Train(
    task=TextToImage(
        model="mini", fresh=("unet",), learn=("unet/", "text_encoder/"), snr_gamma=5.0
    ),
    data=Images(source="tests/assets/emoji", size=64, flip=True),
    optimizer=AdamW(learning_rate=1e-3, warmup=20, schedule="cosine"),
    ema=EMA(decay=0.95),
    batch_size=16,
    steps=80,
    samples=Samples(
        prompts=("a red apple", "an owl", "a blue car", "a sunflower"), every=40, guidance=3.0
    ),
    save_every=40,
    out=Path("runs/mini"),
)
