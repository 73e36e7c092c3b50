"""The embedded model's autoencoder: 64x64 pixels to 16x16x4 latents and back.

    jaxgen train configs/mini_vae.py

The first of its parts, on which the others are made (`--task.model runs/mini_vae/model`);
learned from nothing on the scenes of emoji_scenes. In the end its scaling factor is set so that
latents have unit variance. The weight of the divergence keeps latents small and no more; numbers
are the project's own.
"""

from pathlib import Path

from jaxgen.training.recipe import EMA, AdamW, Autoencoder, Images, Train

config = Train(
    task=Autoencoder(model="fresh:mini", fresh=("vae",), kl=1e-5),
    data=Images(source="emoji_scenes", size=64),
    optimizer=AdamW(learning_rate=2e-3, warmup=100, schedule="cosine", weight_decay=1e-4),
    ema=EMA(decay=0.99),
    batch_size=8,
    steps=5000,
    save_every=400,
    out=Path("runs/mini_vae"),
)
