"""InstructPix2Pix: a UNet of 8 channels that edits a picture as it is told.

    jaxgen train configs/instruct_pix2pix.py --task.model FOLDER --data.source FOLDER

Brooks et al. 2023, section 3.2 and appendix: from Stable Diffusion 1.5, 256 pixels, batches of
1024, learning rate 1e-4, no warmup, 10,000 steps on 8 A100 GPUs in 25.5 hours; 5 % of the examples
without the picture, 5 % without the instruction, 5 % without both. In metadata.jsonl `file_name` is
the picture after the edit, `original` the one before it, `text` the instruction.
"""

from pathlib import Path

from jaxgen.training.recipe import EMA, AdamW, Editing, Images, Train

config = Train(
    task=Editing(model="fresh:sd15", dropout=0.05),
    data=Images(size=256, crop="random", flip=True, caption_dropout=0.0, workers=8),
    optimizer=AdamW(learning_rate=1e-4),
    ema=EMA(decay=0.9999),
    dtype="bf16",
    batch_size=1024,
    steps=10_000,
    out=Path("runs/instruct_pix2pix"),
)
