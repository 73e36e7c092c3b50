"""Stable Diffusion 2 with v-prediction, at 768 pixels: the networks of 2.0-v and 2.1.

    jaxgen train configs/sd21_v.py --task.model FOLDER --data.source FOLDER --mesh.fsdp 8

The numbers are those of 2.0: the model card of stable-diffusion-2 states AdamW, batches of 2048,
learning rate 1e-4 after 10,000 steps of warmup, 150,000 steps with the v objective (Salimans & Ho
2022) at 512 pixels and then, as here, 140,000 at 768. 2.1 went on from there on data filtered
otherwise; its card states no rate. Min-SNR weights (Hang et al. 2023) are an option:
--task.snr-gamma 5. To fine-tune, take the numbers in configs/sd15.py.
"""

from pathlib import Path

from jaxgen.training.recipe import EMA, AdamW, Images, Samples, TextToImage, Train

config = Train(
    task=TextToImage(model="fresh:sd21-v", prediction="v_prediction"),
    data=Images(size=768, crop="random", flip=True, caption_dropout=0.1, workers=8),
    optimizer=AdamW(learning_rate=1e-4, warmup=10_000),
    ema=EMA(decay=0.9999),
    dtype="bf16",
    remat=True,
    batch_size=2048,
    steps=140_000,
    save_every=2000,
    samples=Samples(prompts=("a red apple on a table", "an owl in a tree at night"), every=2000),
    out=Path("runs/sd21_v"),
)
