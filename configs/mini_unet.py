"""The embedded model's UNet, and a text encoder of its own.

    jaxgen train configs/mini_unet.py --task.model runs/mini_clip/model

The last part: it denoises the latents of the model that it starts from, one that is made anew, or,
without `--task.model`, the embedded one. The text encoder learns on, since telling
left from right is little use to a contrast of captions. The loss is of v, unweighted: what a scene
shows, and where, is decided while noise prevails, to which Min-SNR weights would give little. The
rate is constant and the average long, so that a run can go on for as long as there is time
(`--steps`); Muon learns this in fewer steps than AdamW.

This makes a model as the one that ships, not that one: its first stretches were of AdamW, while
this config was looked for (its card lists them all). Its last ones are from cached latents, each
from the average that the one before left, while the rate falls to 0, and so a run of your own may
end; the last of them:

    jaxgen cache configs/mini_unet.py --task.model mini --out latents
    jaxgen train configs/mini_unet.py --task.fresh --task.model mini --data.source latents \\
        --seed 13 --optimizer.schedule linear --optimizer.warmup 20 --ema.decay 0.995 \\
        --steps 2000 --out runs/last

Numbers are the project's own.
"""

from pathlib import Path

from jaxgen.training.recipe import EMA, Images, Muon, Samples, TextToImage, Train

config = Train(
    task=TextToImage(model="mini", fresh=("unet",), learn=("unet/", "text_encoder/")),
    data=Images(source="emoji_scenes", size=64, caption_dropout=0.1),
    optimizer=Muon(learning_rate=1e-3, warmup=100, weight_decay=1e-2),
    ema=EMA(decay=0.998),
    batch_size=64,
    steps=20_000,
    samples=Samples(
        prompts=(
            "a red apple left of an owl, flat style, on a blue background",
            "a large fox, 3D style, on a green background",
            "a rocket above a pizza, line art style, on a yellow striped background",
            "a crab",
        ),
        every=1000,
        guidance=4.0,
    ),
    save_every=200,
    out=Path("runs/mini_unet"),
)
