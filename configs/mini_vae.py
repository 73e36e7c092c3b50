"""The miniature's autoencoder: 64x64 pixels to 16x16x4 latents and back.

    jaxgen train configs/mini_vae.py --data.source FOLDER

Learns from random parameters in some minutes on two cores; in the end its scaling factor is set so
that latents have unit variance. Numbers are the project's own.
"""

from pathlib import Path

from jaxgen.training.recipe import EMA, AdamW, Autoencoder, Images, Train

config = Train(
    task=Autoencoder(model="fresh:mini", fresh=("vae",), kl=1e-4),
    data=Images(source="tests/assets/emoji", size=64, flip=True),
    optimizer=AdamW(learning_rate=2e-3, warmup=50, schedule="cosine", weight_decay=1e-4),
    ema=EMA(decay=0.99),
    batch_size=8,
    steps=1500,
    save_every=100,
    out=Path("runs/mini_vae"),
)
