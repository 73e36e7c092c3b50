"""Finished images against diffusers', from the same weights, latents and noise."""

import shutil
from functools import partial
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
from jaxgen.plan import plan
from jaxgen.request import Request
from jaxgen.sharding import data_mesh
from tests.torch_oracle import error, nhwc, randomise

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
    "outdated": ("StableDiffusion", {}),
}
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KEYWORDS = {
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
    if name == "outdated":  # as files were before pipelines asked for other values
        scheduler = diffusers.DDIMScheduler.from_config({**STABLE, "steps_offset": 0})
        scheduler.save_pretrained(folder / "scheduler")
        parts["scheduler"] = scheduler  # whose clip_sample is true
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

    def run(
        name, prompt, *, steps=6, latents=LATENTS, seed=0, sampler=None, karras=False, **settings
    ):
        made, kind = variant(name), variant(name).kind
        image, mask = settings.pop("image", None), settings.pop("mask", None)
        call = {"num_inference_steps": steps} | {
            KEYWORDS.get(key, key): value for key, value in settings.items()
        }
        noise = torch.from_numpy(latents).permute(0, 3, 1, 2)
        if image is None:
            call |= {"latents": noise, "height": HEIGHT, "width": WIDTH}
        else:
            call["image"] = Image.fromarray(image)
            if kind == "StableDiffusionInstructPix2Pix":
                call["latents"] = noise
            elif mask is not None:
                kind = "StableDiffusionInpaint"
            else:
                kind += "Img2Img"
        if mask is not None:
            call |= {"height": HEIGHT, "width": WIDTH}
            call["mask_image"] = Image.fromarray(mask.astype(np.uint8) * 255)

        scheduler = made.parts["scheduler"]
        if sampler:
            more = {"use_karras_sigmas": True} if karras else {}
            cls = getattr(diffusers, KINDS[sampler].name)
            scheduler = cls.from_config(scheduler.config, **more)
        cls = getattr(diffusers, f"{kind}Pipeline")
        pipe = cls(**made.parts | {"scheduler": scheduler}, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder  # not so in transformers 5
        pipe.check_inputs = lambda *args, **kwargs: None  # wants sizes divisible by 8, needs 4

        # What diffusers draws, it draws from us: posterior means, first noise, noise of each step.
        module = import_module(cls.__module__)
        mean = lambda encoded, *args, **kwargs: encoded.latent_dist.mean  # noqa: E731
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noise)
        monkeypatch.setattr(module, "retrieve_latents", mean, raising=False)
        _, (key,) = generate.draw(np.uint32(seed), np.zeros(1, np.uint32), latents.shape[1:])
        step = count()

        def fresh(*args, **kwargs):
            drawn = jax.random.normal(jax.random.fold_in(key, next(step)), latents.shape[1:])
            return torch.from_numpy(np.array(drawn)[None]).permute(0, 3, 1, 2)

        module = import_module(type(scheduler).__module__)
        monkeypatch.setattr(module, "randn_tensor", fresh, raising=False)
        return pipe(**{"prompt": prompt} if prompt else {}, **call, output_type="np").images

    return run


def ours(made, prompt="a red apple", *, steps=6, latents=LATENTS, **settings):
    size = (WIDTH, HEIGHT)
    return jaxgen.sample(*made.ours, prompt, size=size, steps=steps, latents=latents, **settings)


def assert_same(images, expected):
    """uint8 images are within one grey level of float ones in 0 to 1."""
    assert images.shape == expected.shape
    assert np.std(expected) > 0.05, "a flat picture proves nothing"
    assert np.abs(images - np.round(expected * 255)).max() <= 1


# LCM has a model of its own; diffusers has no EDICT (tests/seedselect/test_gradient.py).
SAMPLERS = [sampler for sampler in KINDS if sampler not in ("lcm", "edict")]
TEXT_TO_IMAGE = {
    **{sampler: ("plain", {"sampler": sampler}) for sampler in SAMPLERS},
    "the folder's own": ("plain", {}),
    "one step": ("plain", {"steps": 1}),
    "euler karras": ("plain", {"sampler": "euler", "karras": True}),
    "dpmpp karras": ("plain", {"sampler": "dpmpp", "karras": True}),
    "dpmpp of many steps": ("plain", {"sampler": "dpmpp", "steps": 17}),
    "ddim eta": ("plain", {"sampler": "ddim", "eta": 0.7, "seed": 5}),
    "without guidance": ("plain", {"guidance": 1.0}),
    "negative": ("plain", {"negative": "snow, night"}),
    "rescale": ("plain", {"rescale": 0.7}),
    "clip skip": ("plain", {"clip_skip": 1}),
    "v": ("v", {"rescale": 0.7}),
    "v, dpmpp": ("v", {"sampler": "dpmpp"}),
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
        f"lcm at {strength}": ("lcm", {"guidance": 8.5, "steps": 4, "strength": strength})
        for strength in (0.1, 0.75, 1.0)
    },
    "blend lcm": ("lcm", {"guidance": 8.5, "steps": 4, "strength": 0.6}),
    **{
        f"blend {sampler} at {strength}": ("plain", {"sampler": sampler, "strength": strength})
        for sampler in ("pndm", "euler")
        for strength in (0.6, 1.0)
    },
    "inpaint at 0.6": ("inpaint", {"strength": 0.6}),
    "inpaint at 1": ("inpaint", {"strength": 1.0}),
    "edit": ("edit", {"sampler": "euler", "negative": "snow"}),
    "edit nearer the picture": ("edit", {"sampler": "euler", "image_guidance": 2.2}),
    "edit without guidance": ("edit", {"sampler": "euler", "guidance": 1.0}),
}
CASES = TEXT_TO_IMAGE | {
    f"image, {k}": (n, {"image": IMAGE} | ({"mask": MASK} if k[:3] in ("ble", "inp") else {}) | s)
    for k, (n, s) in IMAGE_TO_IMAGE.items()
}


@pytest.mark.parametrize(("name", "settings"), CASES.values(), ids=CASES)
def test_images_are_within_one_grey_level_of_diffusers(name, settings, variant, theirs):
    settings = {"steps": 10 if "image" in settings else 6, **settings}
    prompt = "a red apple on a wooden table"
    assert_same(ours(variant(name), prompt, **settings), theirs(name, prompt, **settings))


def test_guidance_stops_where_its_interval_ends(variant, theirs):
    def stop(pipe, index, time, tensors):
        if index < 2:
            return {}
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": tensors["prompt_embeds"][-1:]}

    hook = {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    expected = theirs("plain", "a red apple", sampler="ddim", **hook)
    assert_same(ours(variant("plain"), sampler="ddim", guidance_interval=(0, 0.5)), expected)


def embeddings(parts, *texts):
    """Each text in chunks of 75 tokens, as many as the longest has: float [1, n * 77, C] each."""
    tokenizer, encoder = parts["tokenizer"], parts["text_encoder"]
    tokens = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    for ids in tokens:
        rows = []
        for i in range(0, max(1, *map(len, tokens)), 75):
            row = [tokenizer.bos_token_id, *ids[i : i + 75], tokenizer.eos_token_id]
            rows.append(row + [tokenizer.pad_token_id] * (77 - len(row)))
        with torch.no_grad():
            yield encoder(torch.tensor(rows))[0].reshape(1, -1, 32)


def test_a_prompt_of_two_chunks_is_their_embeddings_side_by_side(variant, theirs):
    made = variant("plain")
    negative, positive = embeddings(made.parts, "snow", LONG)
    assert positive.shape[1] == 2 * 77
    expected = theirs("plain", None, prompt_embeds=positive, negative_prompt_embeds=negative)
    assert_same(ours(made, LONG, negative="snow"), expected)


def test_a_weight_multiplies_embeddings_and_the_mean_is_restored(variant, theirs):
    made = variant("plain")
    negative, e = embeddings(made.parts, "", "a red apple")
    before, red = (
        len(made.parts["tokenizer"](text, add_special_tokens=False).input_ids)
        for text in ("a", "red")
    )
    weights = torch.ones(77, 1)
    weights[1 + before : 1 + before + red] = 2.0
    weighted = e * weights * (e.mean() / (e * weights).mean())
    expected = theirs("plain", None, prompt_embeds=weighted, negative_prompt_embeds=negative)
    assert_same(ours(made, "a (red:2) apple"), expected)
    assert (ours(made, "a (red:2) apple") != ours(made)).any()


@pytest.mark.parametrize("more", [{}, {"image": IMAGE, "strength": 0.6}], ids=["text", "image"])
def test_a_scheduler_file_that_clips_and_begins_at_zero_is_read_as_pipelines_do(
    more, variant, theirs
):
    made = variant("outdated")
    assert made.ours[0].scheduler["clip_sample"]
    assert_same(ours(made, **more), theirs("outdated", "a red apple", **more))


def test_devices_share_no_more_images_at_once_than_are_allowed(variant):
    model, _ = variant("plain").ours
    cases = [(20, 12, 8, 8), (20, 16, 8, 16), (5, 64, 2, 6), (9, 3, 8, 8)]
    for total, batch, devices, rows in cases:
        asked = Request(prompts=["a"], count=total, batch=batch)
        assert generate.batch_of(plan(model, asked), devices) == rows


def test_a_weight_of_one_changes_nothing(variant):
    made = variant("plain")
    np.testing.assert_array_equal(ours(made, "(a (red:1) apple:1)"), ours(made, "a red apple"))


def test_images_come_prompt_by_prompt_whatever_their_chunks(variant):
    made = variant("plain")
    prompts = ["a red apple", LONG, "two cats"]
    latents = RNG.normal(size=(6, *LATENTS.shape[1:])).astype(np.float32)
    settings = {"steps": 3, "batch": 1, "mesh": data_mesh(1)}
    together = ours(made, prompts, latents=latents, count=2, **settings)
    assert len(np.unique(together.reshape(6, -1), axis=0)) == 6
    for i, image in enumerate(together):
        alone = ours(made, prompts[i // 2], latents=latents[i : i + 1], **settings)
        np.testing.assert_array_equal(image, alone[0])


def test_every_output_is_the_same_picture(variant):
    made = variant("plain")
    latents, floats, integers = (
        ours(made, steps=3, output=kind) for kind in ("latents", "float", "uint8")
    )
    with torch.no_grad():
        z = torch.from_numpy(np.array(latents)).permute(0, 3, 1, 2)
        decoded = made.parts["vae"].decode(z / 0.18215).sample
    assert (latents.dtype, floats.dtype, integers.dtype) == (np.float32, np.float32, np.uint8)
    assert error(floats, nhwc(decoded)) <= 1e-5
    assert_same(integers, (nhwc(decoded) / 2 + 0.5).clip(0, 1))


def test_latents_above_a_number_are_decoded_in_tiles_as_diffusers_does(variant, monkeypatch):
    made = variant("plain")
    model, params = made.ours
    z = RNG.normal(size=(1, 33, 40, 4)).astype(np.float32)  # four times the VAE's sample_size
    finish = partial(generate.finish, model, params, jax.numpy.asarray(z), "float")
    whole = np.asarray(generate.decode(params["vae"], z, vae=model.vae))
    for most in (generate.WHOLE, 33 * 40):
        monkeypatch.setattr(generate, "WHOLE", most)
        np.testing.assert_array_equal(finish(), whole)

    monkeypatch.setattr(generate, "WHOLE", 33 * 40 - 1)
    actual = finish()
    vae = type(made.parts["vae"]).from_config(made.parts["vae"].config).eval()
    vae.load_state_dict(made.parts["vae"].state_dict())
    vae.enable_tiling()
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(z).permute(0, 3, 1, 2) / 0.18215).sample

    assert error(actual, nhwc(expected)) <= 1e-5
    assert 0 < np.abs(actual - whole).mean() <= 0.1 * whole.std()  # but for the norms of each tile


@pytest.mark.parametrize("mode", ["text", "image", "mask"])
def test_pictures_in_bf16_are_near_those_in_f32(variant, mode):
    made = variant("plain")
    settings = {"text": {}, "image": {"image": IMAGE}, "mask": {"image": IMAGE, "mask": MASK}}
    model, params = made.ours
    halves = jax.tree.map(lambda p: p.astype(jax.numpy.bfloat16), params)
    whole, half = (
        ours(SimpleNamespace(ours=(model, p)), sampler="ddim", output="float", **settings[mode])
        for p in (params, halves)
    )
    assert half.dtype == np.float32
    assert np.isfinite(half).all()
    assert 0 < np.abs(half - whole).mean() <= 4 / 127.5  # grey levels; 2 are measured
