"""The embedded model's CLIP: its text encoder, and the image encoder that goes with it.

    jaxgen train configs/mini_clip.py --task.model runs/mini_decoder/model

The second part. It reads pictures, not latents, but the model that it ends with holds the
autoencoder of the one it starts from: without `--task.model` that is a random one, of no use to the
UNet. Learned from nothing on the scenes of emoji_scenes by finding which caption of a batch belongs
to which picture (Radford et al. 2021). Numbers are the project's own. Some 20 minutes on two cores.
"""

from pathlib import Path

from jaxgen.training.recipe import EMA, AdamW, Contrastive, Images, Train

config = Train(
    task=Contrastive(model="fresh:mini", fresh=("text_encoder",), image_size=64, patch_size=8),
    data=Images(source="emoji_scenes", size=64),
    optimizer=AdamW(learning_rate=1e-3, warmup=200, schedule="cosine", weight_decay=0.05),
    ema=EMA(decay=0.99),
    batch_size=128,
    steps=420,
    save_every=100,
    out=Path("runs/mini_clip"),
)
