"""Stable Diffusion 1.5 and 2.1-v at full size, of random weights, against diffusers.

Several minutes on two cores, 12 GB of memory and 6 GB of disk: `make test-slow`.
"""

import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import jaxgen
from jaxgen.diffusion import grids
from jaxgen.diffusion.schedule import Schedule
from jaxgen.load import CLIP_TOKENIZER
from jaxgen.types import Inputs
from tests.test_load import MEASURE
from tests.torch_oracle import error, nhwc, randomise

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def every_thread():
    """For torch, which `torch_oracle` holds to one thread."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Attention as users run it: where there are several devices it takes another form."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


PROMPT = "a photograph of an astronaut riding a horse"
STEPS, TIME = 2, 501
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


class Family(NamedTuple):
    """What the published configs of a release say, and the sizes (width, height) to try."""

    unet: dict
    text: dict
    scheduler: diffusers.SchedulerMixin
    side: int  # of its images
    pad: str
    weights: int  # parameters of the UNet
    sizes: tuple[tuple[int, int], ...]
    control: int  # parameters of its ControlNet


FAMILIES = {
    "1.5": Family(
        {"cross_attention_dim": 768, "attention_head_dim": 8},
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        diffusers.PNDMScheduler(skip_prk_steps=True, **NOISE),
        512,
        "<|endoftext|>",
        859_520_964,
        ((256, 256), (392, 520)),
        361_279_120,
    ),
    "2.1-v": Family(
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
            "hidden_act": "gelu",
        },
        diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **NOISE),
        768,
        "!",
        865_910_724,
        ((256, 256), (328, 200)),
        364_228_240,
    ),
}


def inputs(size):
    """Latents [1, h, w, 4] and an image uint8 [H, W, 3] of a size."""
    width, height = size
    rng = np.random.default_rng(width)
    noise = rng.normal(size=(1, height // 8, width // 8, 4)).astype(np.float32)
    return noise, rng.integers(0, 256, (height, width, 3), np.uint8)


def nchw(x):
    return torch.from_numpy(np.asarray(x, np.float32)).permute(0, 3, 1, 2).contiguous()


def tokenizer(folder, pad):
    shutil.copytree(CLIP_TOKENIZER, folder, dirs_exist_ok=True)
    path = folder / "special_tokens_map.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": pad}))
    return CLIPTokenizer.from_pretrained(folder)


@torch.no_grad()
def truth(family, folder):
    """Writes a folder and returns what diffusers makes of it; its networks die with this call."""
    side = family.side
    sampled = {"sample_size": side // 8, "layers_per_block": 2, **BLOCKS, **family.unet}
    unet = randomise(diffusers.UNet2DConditionModel(**sampled))
    assert sum(p.numel() for p in unet.parameters()) == family.weights
    vae = randomise(diffusers.AutoencoderKL(sample_size=side, **VAE))
    old_ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # as in released files
    text_config = CLIPTextConfig(vocab_size=49408, **old_ids, **family.text)
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=randomise(CLIPTextModel(text_config)),
        tokenizer=tokenizer(folder / "tokenizer", family.pad),
        scheduler=family.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")  # transformers 5 writes no vocab.json
    tokenizer(folder / "tokenizer", family.pad)

    text, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    expected = {"text": text.numpy()}
    for size in family.sizes:
        noise, image = inputs(size)
        unit = nchw(image[None] / 127.5 - 1)
        picture = pipe(PROMPT, latents=nchw(noise), num_inference_steps=STEPS, output_type="np",
                       width=size[0], height=size[1]).images  # fmt: skip
        expected[size] = {
            "unet": nhwc(unet(nchw(noise), TIME, text).sample),
            "decode": nhwc(vae.decode(nchw(noise) / vae.config.scaling_factor).sample),
            "encode": nhwc(vae.encode(unit).latent_dist.mean) * vae.config.scaling_factor,
            "picture": picture,
        }
    return expected | {"control": controlled(pipe, family, folder / "control", text)}


SCALES, SPANS = (0.6, 1.1), ((0.0, 0.5), (0.0, 1.0))  # of two ControlNets
GUESS = {"guess_mode": True, "guidance_scale": 4.0}  # of the first, alone


def hints(size):
    """Two of a size, uint8 [2, H, W, 3]."""
    width, height = size
    return np.random.default_rng(1).integers(0, 256, (2, height, width, 3), np.uint8)


def controlled(pipe, family, folder, text):
    """Writes two ControlNets; residuals of the first, pictures that both and that it follows."""
    nets = [randomise(diffusers.ControlNetModel.from_unet(pipe.unet), seed=i) for i in (1, 2)]
    net = nets[0]
    assert sum(p.numel() for p in net.parameters()) == family.control
    for i, one in enumerate(nets):
        one.save_pretrained(folder / str(i))
    size = family.sizes[0]
    noise, _ = inputs(size)
    pictures = hints(size)
    skips, middle = net(nchw(noise), TIME, text, nchw(pictures[:1] / 255), return_dict=False)
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    both, alone = (
        diffusers.StableDiffusionControlNetPipeline(
            **parts, controlnet=one, requires_safety_checker=False
        )
        for one in (nets, net)
    )
    for one in (both, alone):
        one.set_progress_bar_config(disable=True)
    guessed = alone(
        "", Image.fromarray(pictures[0]), latents=nchw(noise), num_inference_steps=STEPS,
        output_type="np", width=size[0], height=size[1], **GUESS,
    ).images  # fmt: skip
    picture = both(
        PROMPT, [Image.fromarray(one) for one in pictures], latents=nchw(noise),
        num_inference_steps=STEPS, output_type="np", width=size[0], height=size[1],
        controlnet_conditioning_scale=list(SCALES),
        control_guidance_start=[low for low, _ in SPANS],
        control_guidance_end=[high for _, high in SPANS],
    ).images  # fmt: skip
    residuals = [nhwc(y) for y in (*skips, middle)]
    return {"residuals": residuals, "picture": picture, "guessed": guessed}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(family, folder, what diffusers made of it)"""
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("full")
    expected = truth(family, folder)
    gc.collect()
    yield family, folder, expected
    jax.clear_caches()
    shutil.rmtree(folder)


def test_loading_takes_little_more_memory_than_the_weights(case):
    tiny = Path(__file__).parent / "assets" / "tiny"
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), tiny, case[1]]
    ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"\nMEASURED loading: {ratio:.3f} of the weights")
    assert ratio <= 1.3


def test_networks_and_pictures_match_diffusers(case):
    family, folder, expected = case
    model, params = jaxgen.load(folder)
    ids = model.tokenizer.encode(PROMPT)
    pads = [model.tokenizer.pad] * (75 - len(ids))
    ids = np.array([[model.tokenizer.bos, *ids, model.tokenizer.eos, *pads]], np.int32)
    text = jax.jit(lambda p, ids: model.text_encoder.apply(p, ids)[0])(params["text_encoder"], ids)
    errors = {"text": error(text, expected["text"])}

    points = grids.grid(Schedule(), STEPS).points
    point = jax.tree.map(lambda field: field[0], points)._replace(time=np.float32(TIME))

    @jax.jit
    def unet(p, x, text):
        return model.unet.apply(p, x, point, model.unet.prepare(p, Inputs(text)))

    encode, decode = jax.jit(model.vae.encode), jax.jit(model.vae.decode)
    greys = {}
    for size in family.sizes:
        noise, image = inputs(size)
        unit = np.float32(image[None] / 127.5 - 1)
        theirs = expected[size]
        errors |= {
            ("unet", size): error(unet(params["unet"], noise, expected["text"]), theirs["unet"]),
            ("decode", size): error(decode(params["vae"], noise), theirs["decode"]),
            ("encode", size): error(encode(params["vae"], unit), theirs["encode"]),
        }
        picture = jaxgen.sample(model, params, PROMPT, latents=noise, size=size, steps=STEPS)
        assert theirs["picture"].std() > 0.05, "a flat picture proves nothing"
        greys[size] = np.abs(picture - np.round(theirs["picture"] * 255)).max()

    print("\nMEASURED", {str(k): f"{v:.1e}" for k, v in errors.items()}, greys)
    assert max(errors.values()) <= 1e-4, errors
    assert max(greys.values()) <= 1, greys


def test_controlnets_match_diffusers(case):
    family, folder, expected = case
    expected, size = expected["control"] | {"text": expected["text"]}, family.sizes[0]
    model, params = jaxgen.load(folder, control=[folder / "control" / str(i) for i in (0, 1)])
    noise, _ = inputs(size)
    pictures = hints(size)
    net = model.controls[0]
    points = grids.grid(Schedule(), STEPS).points
    point = jax.tree.map(lambda field: field[0], points)._replace(time=np.float32(TIME))

    @jax.jit
    def residuals(p, x, text, hint):
        return net.apply(p, x, point, net.prepare(p, Inputs(text), hint))

    hint = np.float32(pictures[:1] / 255)
    found = residuals(params["controlnet"], noise, expected["text"], hint)
    errors = [
        error(ours, theirs)
        for ours, theirs in zip((*found.skips, found.middle), expected["residuals"], strict=True)
    ]
    control = [jaxgen.Hint(*one) for one in zip(pictures, SCALES, SPANS)]
    picture = jaxgen.sample(
        model, params, PROMPT, latents=noise, size=size, steps=STEPS, control=control
    )
    one = dataclasses.replace(model, controls=model.controls[:1])
    guessed = jaxgen.sample(
        one, {k: v for k, v in params.items() if k != "controlnet_1"}, "", latents=noise,
        size=size, steps=STEPS, control=[pictures[0]], guess=True, guidance=4.0,
    )  # fmt: skip
    greys = []
    for name, ours in (("picture", picture), ("guessed", guessed)):
        assert expected[name].std() > 0.05, "a flat picture proves nothing"
        greys.append(np.abs(ours - np.round(expected[name] * 255)).max())
    print("\nMEASURED controls", f"{max(errors):.1e}", greys)
    assert max(errors) <= 1e-4, errors
    assert max(greys) <= 1, greys
