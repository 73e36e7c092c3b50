"""Finished images against diffusers', from the same weights, latents and noise."""

import shutil
from importlib import import_module
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

import jaxgen
from jaxgen import generate
from jaxgen.diffusion.schedule import KINDS
from jaxgen.models.tiling import decode_tiled
from jaxgen.types import UserError
from tests.torch_oracle import nhwc, randomise

TINY = Path(__file__).parent / "assets" / "tiny"
RNG = np.random.default_rng(0)
# Latents of 13 x 10, odd at the lower level of the UNet; one size, so that programs are shared.
WIDTH, HEIGHT, FACTOR = 40, 52, 4
LATENTS = RNG.normal(size=(1, HEIGHT // FACTOR, WIDTH // FACTOR, 4)).astype(np.float32)
IMAGE = np.kron(RNG.integers(0, 256, (13, 10, 3), np.uint8), np.ones((4, 4, 1), np.uint8))
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[9:37, 13:30] = True  # its edges are no multiples of 4
LONG = ", ".join(["two cats and three dogs sitting on a green sofa in the garden"] * 6)

V_PREDICTION = {"use_linear_projection": True, "attention_head_dim": [2, 4]}
VARIANTS = {  # name: pipeline, what its UNet has beyond the tiny one
    "plain": ("StableDiffusion", {}),
    "v": ("StableDiffusion", V_PREDICTION | {"upcast_attention": True}),
    "inpaint": ("StableDiffusionInpaint", {"in_channels": 9}),
    "edit": ("StableDiffusionInstructPix2Pix", {"in_channels": 8}),
    "lcm": ("LatentConsistencyModel", {"time_cond_proj_dim": 16}),
}
KEYWORDS = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "image_guidance": "image_guidance_scale",
    "rescale": "guidance_rescale",
    "negative": "negative_prompt",
}


def make(name, folder):
    """Writes a variant of the tiny folder, randomised anew, and loads it both ways."""
    kind, changes = VARIANTS[name]
    parts = diffusers.StableDiffusionPipeline.from_pretrained(TINY).components
    parts |= {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    parts["unet"] = randomise(type(parts["unet"])(**{**parts["unet"].config, **changes}))
    if name == "v":
        config = parts["text_encoder"].config
        config.hidden_act = "gelu"
        parts["text_encoder"] = type(parts["text_encoder"])(config)
        parts["scheduler"].register_to_config(prediction_type="v_prediction")
    if name == "lcm":
        parts["scheduler"] = diffusers.LCMScheduler.from_config(parts["scheduler"].config)
    randomise(parts["text_encoder"])

    pipe = getattr(diffusers, f"{kind}Pipeline")(**parts, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")  # transformers 5 writes no vocab.json
    shutil.copytree(TINY / "tokenizer", folder / "tokenizer")
    return SimpleNamespace(kind=kind, parts=parts, ours=jaxgen.load(folder))


@pytest.fixture(scope="session")
def variant(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def theirs(variant, monkeypatch):
    """theirs(name, prompt, **our settings) -> diffusers' images, float [B, H, W, 3] in 0 to 1."""

    def run(name, prompt, *, latents=LATENTS, seed=0, sampler=None, karras=False, **settings):
        made, kind = variant(name), variant(name).kind
        image, mask = settings.pop("image", None), settings.pop("mask", None)
        width, height = settings.pop("size", (WIDTH, HEIGHT))
        call = {KEYWORDS.get(key, key): value for key, value in settings.items()}
        noise = torch.from_numpy(latents).permute(0, 3, 1, 2)
        if image is None:
            call |= {"latents": noise, "height": height, "width": width}
        else:
            call["image"] = Image.fromarray(image)
            if kind == "StableDiffusionInstructPix2Pix":
                call["latents"] = noise
            else:
                kind = "StableDiffusionInpaint" if mask is not None else "StableDiffusionImg2Img"
        if mask is not None:
            call |= {"height": height, "width": width}
            call["mask_image"] = Image.fromarray(mask.astype(np.uint8) * 255)
            call.setdefault("strength", 0.8)

        scheduler = made.parts["scheduler"]
        if sampler:
            more = {"use_karras_sigmas": True} if karras else {}
            cls = getattr(diffusers, KINDS[sampler].name)
            scheduler = cls.from_config(scheduler.config, **more)
        cls = getattr(diffusers, f"{kind}Pipeline")
        pipe = cls(**made.parts | {"scheduler": scheduler}, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        pipe.check_inputs = lambda *args, **kwargs: None  # wants sizes divisible by 8, needs 4

        # What diffusers draws, it draws from us: posterior means, first noise, noise of each step.
        module = import_module(cls.__module__)
        for name in ("randn_tensor", "retrieve_latents"):
            value = {
                "randn_tensor": lambda *args, **kwargs: noise,
                "retrieve_latents": lambda encoded, *args, **kwargs: encoded.latent_dist.mean,
            }[name]
            monkeypatch.setattr(module, name, value, raising=False)
        _, (key,) = generate.draw(np.uint32(seed), np.zeros(1, np.uint32), latents.shape[1:])
        step = count()

        def fresh(*args, **kwargs):
            drawn = jax.random.normal(jax.random.fold_in(key, next(step)), latents.shape[1:])
            return torch.from_numpy(np.array(drawn)[None]).permute(0, 3, 1, 2)

        module = import_module(type(scheduler).__module__)
        monkeypatch.setattr(module, "randn_tensor", fresh, raising=False)
        return pipe(**{"prompt": prompt} if prompt else {}, **call, output_type="np").images

    return run


def ours(made, prompt="a red apple", *, size=(WIDTH, HEIGHT), latents=LATENTS, **settings):
    return jaxgen.sample(*made.ours, prompt, size=size, latents=latents, **settings)


def grey_levels(images, expected):
    """The largest difference of uint8 images from float ones in 0 to 1."""
    expected = np.round(expected * 255)
    assert images.shape == expected.shape
    assert expected.std() > 10, "a flat picture proves nothing"
    return np.abs(images - expected).max()


TEXT_TO_IMAGE = {
    **{sampler: ("plain", {"sampler": sampler}) for sampler in KINDS if sampler != "lcm"},
    "the folder's own": ("plain", {}),
    "one step": ("plain", {"steps": 1}),
    "euler karras": ("plain", {"sampler": "euler", "karras": True}),
    "dpmpp karras": ("plain", {"sampler": "dpmpp", "karras": True}),
    "dpmpp of many steps": ("plain", {"sampler": "dpmpp", "steps": 17}),
    "ddim eta": ("plain", {"sampler": "ddim", "eta": 0.7}),
    "without guidance": ("plain", {"guidance": 1.0}),
    "negative": ("plain", {"negative": "snow, night"}),
    "rescale": ("plain", {"rescale": 0.7}),
    "clip skip": ("plain", {"clip_skip": 1}),
    "v": ("v", {}),
    "v, rescale": ("v", {"sampler": "ddim", "rescale": 0.7}),
    "v, dpmpp": ("v", {"sampler": "dpmpp"}),
    "v, euler_a": ("v", {"sampler": "euler_a"}),
    "lcm without embedding": ("plain", {"sampler": "lcm", "guidance": 1.5, "steps": 4}),
    "lcm": ("lcm", {"guidance": 8.5, "steps": 4}),
}
IMAGE_TO_IMAGE = {
    **{
        f"{sampler} at {strength}": ("plain", {"sampler": sampler, "strength": strength})
        for sampler in ("pndm", "ddim", "euler", "dpmpp")
        for strength in (0.3, 0.75, 1.0)
    },
    "ddpm": ("plain", {"sampler": "ddpm", "strength": 0.6}),
    "euler_a": ("plain", {"sampler": "euler_a", "strength": 0.6}),
    "v": ("v", {"strength": 0.6}),
    **{
        f"blend {sampler} at {strength}": (
            "plain",
            {"mask": MASK, "sampler": sampler, "strength": strength},
        )
        for sampler in ("pndm", "ddim", "euler")
        for strength in (0.6, 1.0)
    },
    "inpaint at 0.6": ("inpaint", {"mask": MASK, "strength": 0.6}),
    "inpaint at 1": ("inpaint", {"mask": MASK, "strength": 1.0}),
    "inpaint without guidance": ("inpaint", {"mask": MASK, "strength": 1.0, "guidance": 1.0}),
    "edit": ("edit", {"negative": "snow"}),
    "edit, closer to the picture": ("edit", {"sampler": "euler_a", "image_guidance": 2.2}),
    "edit without guidance": ("edit", {"guidance": 1.0}),
}
CASES = TEXT_TO_IMAGE | {k: (n, {"image": IMAGE, **s}) for k, (n, s) in IMAGE_TO_IMAGE.items()}


@pytest.mark.parametrize(("name", "settings"), CASES.values(), ids=CASES)
def test_images_are_within_one_grey_level_of_diffusers(name, settings, variant, theirs):
    settings = {"steps": 10 if "image" in settings else 6, **settings}
    prompt = "a red apple on a wooden table"
    actual = ours(variant(name), prompt, **settings)
    worst = grey_levels(actual, theirs(name, prompt, **settings))
    print(f"GREY {worst}")
    assert worst <= 1
