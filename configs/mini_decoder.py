"""The embedded model's decoder, learned on beside an encoder that stays as it is.

    jaxgen train configs/mini_decoder.py --task.model runs/mini_vae/model

It keeps the latents, so that a UNet and ControlNets of before go with it: the one that ships was
made last, from the embedded model of before (`--task.model mini --seed 14`), and put in its place
by `python train/ship_mini.py runs/mini_decoder/model`. Numbers are the project's own.
"""

from pathlib import Path

from jaxgen.training.recipe import EMA, Autoencoder, Images, Muon, Train

config = Train(
    task=Autoencoder(model="mini", learn=("vae/post_quant_conv/", "vae/decoder/"), kl=0),
    data=Images(source="emoji_scenes", size=64),
    optimizer=Muon(learning_rate=5e-3, warmup=50, schedule="linear", weight_decay=1e-2),
    ema=EMA(decay=0.99),
    batch_size=8,
    steps=12_000,
    save_every=400,
    out=Path("runs/mini_decoder"),
)
