"""Makes tests/assets/tiny, a complete Stable Diffusion folder of random weights, below 2 MB.

    python tests/assets/make_tiny.py

The folder has the layout of released diffusers checkpoints: a tokenizer in `vocab.json` and
`merges.txt`, text encoder keys that start with `text_model.`, and a PNDM scheduler with the fields
of Stable Diffusion 1.5. Every parameter is random, biases and the scales of norms included, so
that no wrong rename hides behind a zero or a one; matrices are scaled by their fan-in, so that
activations stay near 1. The seed is fixed: the same versions of torch, diffusers and transformers
write the same bytes.
"""

import argparse
import json
import re
import shutil
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TOKENS = 600  # 256 bytes, 256 bytes that end a word, merges, and the two special tokens
TEXTS = [
    "a photo of a red fox in the snow",
    "a photograph of an astronaut riding a horse on the moon",
    "an oil painting of the old harbour at night, with the moon over the water",
    "two cats and three dogs sitting on a green sofa in the garden",
    "the queen's crown, it's made of gold and it doesn't shine",
    "a watercolour of mountains in the morning, soft light, highly detailed",
    "a robot painting a portrait of another robot, studio lighting",
    "street in the rain at night, neon light reflecting in the water",
    "a bowl of soup that is also a portal to another dimension",
    "seven red apples and one green apple on a wooden table",
]


def train_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary by token, merges in order), laid out like CLIP's: specials have the last ids.

    The trainer of `tokenizers` breaks ties by the order of a hash table, anew in every run; this
    one takes the pair that comes first in the alphabet. TEXTS is ASCII, where a byte is its letter.
    """
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]
    words = re.findall(r"[a-z]+|'[a-z]+|[^\sa-z]", " ".join(TEXTS).lower())
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]

    merges = []
    while len(tokens) < TOKENS - 2:
        counts = Counter(pair for word in spelled for pair in pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        for word in spelled:
            merge(word, best)
        merges.append(best)
        tokens.append("".join(best))
    tokens += [BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, merges


def merge(word: list[str], pair: tuple[str, str]) -> None:
    """Joins every occurrence of the pair in a word, in place, from the left."""
    i = 0
    while i < len(word) - 1:
        if (word[i], word[i + 1]) == pair:
            word[i : i + 2] = ["".join(pair)]
        i += 1


def write_tokenizer(folder: Path, length: int) -> None:
    """Writes the four files that a tokenizer folder of an older checkpoint holds."""
    vocabulary, merges = train_bpe()

    def special(token: str) -> dict:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"content": token, **flags}

    specials = {"bos_token": special(BOS), "eos_token": special(EOS), "pad_token": EOS}
    specials["unk_token"] = special(EOS)
    config = {
        "add_prefix_space": False,
        "bos_token": {"__type": "AddedToken", **special(BOS)},
        "do_lower_case": True,
        "eos_token": {"__type": "AddedToken", **special(EOS)},
        "errors": "replace",
        "model_max_length": length,
        "pad_token": EOS,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": {"__type": "AddedToken", **special(EOS)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter anew: kernels by fan-in, embeddings 1, scales 1 + 0.1 n, biases 0.1 n."""
    with torch.no_grad():
        for name, module in model.named_modules():
            for key, p in module.named_parameters(recurse=False):
                noise = torch.randn_like(p)
                if isinstance(module, torch.nn.Embedding):
                    p.copy_(noise)
                elif p.ndim > 1:
                    p.copy_(noise / p[0].numel() ** 0.5)
                elif key == "weight":
                    p.copy_(1 + 0.1 * noise)
                else:
                    assert key == "bias", f"{name}.{key} is neither kernel, scale nor bias"
                    p.copy_(0.1 * noise)
    return model


def build(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The pipeline with random weights; the text encoder knows the tokenizer's special ids."""
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        sample_size=64,
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        skip_prk_steps=True,
        set_alpha_to_one=False,
    )
    # Part of released scheduler files, though PNDM itself does not read it.
    scheduler.register_to_config(clip_sample=False)
    return StableDiffusionPipeline(
        vae=randomise(vae),
        text_encoder=randomise(CLIPTextModel(text_config)),
        tokenizer=tokenizer,
        unet=randomise(unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def prefix_keys(path: Path) -> None:
    """Restores `text_model.`, with which released keys start; transformers 5 drops it."""
    tensors = load_file(path)
    start = "text_model."
    prefixed = {start + key.removeprefix(start): value for key, value in tensors.items()}
    save_file(prefixed, path, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    out = parser.parse_args().out

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "tokenizer"
        write_tokenizer(made, length=77)
        shutil.rmtree(out, ignore_errors=True)
        build(CLIPTokenizer.from_pretrained(made)).save_pretrained(out)
        shutil.rmtree(out / "tokenizer")  # transformers 5 writes tokenizer.json alone
        shutil.copytree(made, out / "tokenizer")
    prefix_keys(out / "text_encoder" / "model.safetensors")
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert total < 2_000_000, f"{out} has {total} bytes"
    print(f"{out}: {total} bytes")


if __name__ == "__main__":
    main()
