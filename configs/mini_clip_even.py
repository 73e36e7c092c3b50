"""A CLIP to judge the embedded model's rare subjects by, in SeedSelect.

    jaxgen train configs/mini_clip_even.py --task.model jaxgen/assets/mini
    jaxgen seedselect "a hedgehog" --images hedgehogs --judge runs/mini_clip_even/model/clip

The embedded model's own CLIP saw rare subjects as seldom as the model did, and its captions say
style and background, too, so it can hardly tell which of the model's pictures show one. This one
saw every subject as often, and is told of subjects alone: it knows more than the model, as CLIPs of
the web know more than Stable Diffusion draws. Its text encoder begins as the model's; the image
encoder is new. 12 minutes on two cores.
"""

from pathlib import Path

from jaxgen.training.recipe import EMA, AdamW, Contrastive, Images, Train

config = Train(
    task=Contrastive(model="fresh:mini", image_size=64, patch_size=8),
    data=Images(source="emoji_scenes:train_even", size=64, caption="things"),
    optimizer=AdamW(learning_rate=1e-3, warmup=200, schedule="cosine", weight_decay=0.05),
    ema=EMA(decay=0.99),
    batch_size=128,
    steps=1000,
    save_every=100,
    out=Path("runs/mini_clip_even"),
)
