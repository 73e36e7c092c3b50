"""What Python passes in is checked on the host: one line, and nothing compiles."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxgen
from jaxgen.plan import plan
from jaxgen.request import Request
from jaxgen.types import UserError

TINY = Path(__file__).parent / "assets" / "tiny"
IMAGE = np.zeros((64, 64, 3), np.uint8)
MASK = np.ones((64, 64), bool)
LATENTS = np.zeros((1, 16, 16, 4), np.float32)


@pytest.fixture(scope="module")
def tiny():
    return jaxgen.load(TINY)


def test_karras_may_be_turned_off(tiny):
    model, _ = tiny
    model = dataclasses.replace(model, scheduler=model.scheduler | {"use_karras_sigmas": True})
    for karras, found in ((None, True), (False, False), (True, True)):
        checked = plan(model, Request(prompts=["a"], sampler="euler", karras=karras))
        assert checked.schedule.use_karras_sigmas == found


def test_an_interval_is_of_the_steps_that_run(tiny):
    model, _ = tiny
    half = {"prompts": ["a"], "image": IMAGE, "steps": 10, "strength": 0.5, "sampler": "ddim"}
    assert plan(model, Request(**half, guidance_interval=(0.0, 0.4))).calls == 5
    with pytest.raises(UserError, match="holds none of the 5 steps that run"):
        plan(model, Request(**half, guidance_interval=(0.45, 0.55)))


BAD = {
    "a float image": ({"image": IMAGE / 255}, "image is float64 [64, 64, 3], and must be uint8"),
    "a grey image": ({"image": IMAGE[..., 0]}, "image is uint8 [64, 64], and must be"),
    "an RGBA image": ({"image": IMAGE[..., [0, 1, 2, 0]]}, "image is uint8 [64, 64, 4]"),
    "a path for an image": ({"image": "photo.png"}, "image is a str, not a numpy array"),
    "an image too small": ({"image": IMAGE[:3]}, "the image is 64x3 and needs 4 pixels"),
    "a mask of bytes": ({"image": IMAGE, "mask": MASK.astype(np.uint8)}, "mask is uint8"),
    "a mask that vanishes": (
        {"image": IMAGE, "mask": np.pad(MASK[:1, :1], (2, 61))},
        "smaller than 4 pixels",
    ),
    "latents in a list": ({"latents": LATENTS.tolist()}, "latents is a list, not a numpy array"),
    "latents in float64": ({"latents": LATENTS.astype(float)}, "latents is float64"),
    "latents of nan": ({"latents": LATENTS * np.nan}, "not finite"),
    "two latents for one": ({"latents": LATENTS[[0, 0]]}, "must be [1, 16, 16, 4]"),
    "a size in a string": ({"size": "64x64"}, "size '64x64' is not (width, height)"),
    "a size of fractions": ({"size": (64.0, 64.0)}, "size (64.0, 64.0) is not"),
    "a huge size": ({"size": (400_000, 400_000)}, "is over 64,000,000 pixels"),
    "steps of a fraction": ({"steps": 2.5}, "steps = 2.5 is not a whole number"),
    "a seed of a fraction": ({"seed": 1.5}, "seed = 1.5 is not a whole number"),
    "a batch of a fraction": ({"batch": 1.5}, "batch = 1.5 is not a whole number"),
    "an empty batch": ({"batch": 0}, "batch = 0 is not"),
    "guidance in words": ({"guidance": "7"}, "guidance = '7' is not a finite number"),
    "guidance that is none": ({"guidance": None}, "guidance = None is not a finite number"),
    "guidance that is empty": ({"guidance": ""}, "guidance = '' is not a finite number"),
    "rescale that is none": ({"rescale": None}, "rescale = None is not a finite number"),
    "eta that is none": ({"eta": None}, "eta = None is not a finite number"),
    "prompts beyond number": ({"prompts": ["a"] * (10**6 + 1)}, "1,000,001 prompts are more"),
    "a negative without guidance": (
        {"negative": "snow", "guidance": 1.0},
        "negative has no effect here: guidance = 1 is off",
    ),
    "rescale without guidance": ({"rescale": 0.5, "guidance": 1}, "rescale has no effect here"),
    "an interval without guidance": (
        {"guidance_interval": [0, 0.5], "guidance": 0.5},
        "guidance_interval has no effect here: guidance = 0.5 is off",
    ),
    "strength in words": ({"image": IMAGE, "strength": "1"}, "strength = '1' is not a finite"),
    "strength nan": ({"image": IMAGE, "strength": np.nan}, "strength = nan is not a finite"),
    "no prompts": ({"prompts": []}, "no prompt is given"),
    "another output": ({"output": "png"}, "output 'png' is not uint8, float or latents"),
}


@pytest.mark.parametrize("case", BAD)
def test_arguments_of_another_kind_are_named_before_anything_compiles(case, tiny):
    settings, words = BAD[case]
    events = []
    listen = lambda name, *args, **kwargs: events.append(name)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with pytest.raises(UserError) as error:
            jaxgen.sample(*tiny, **{"prompts": "a fox"} | settings)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not events


def test_a_distilled_model_has_no_negative(tiny):
    model, _ = tiny
    unet = dataclasses.replace(model.unet.config, time_cond_proj_dim=16)
    model = dataclasses.replace(model, unet=dataclasses.replace(model.unet, config=unet))
    plan(model, Request(prompts=["a fox"], guidance_interval=[0, 1]))
    with pytest.raises(UserError, match=r"negative has no effect here: .* is distilled"):
        plan(model, Request(prompts=["a fox"], negative="snow"))


def test_guidance_by_the_picture_begins_at_one(tiny):
    model, _ = tiny
    unet = dataclasses.replace(model.unet.config, in_channels=8)
    model = dataclasses.replace(model, unet=dataclasses.replace(model.unet, config=unet))
    asked = Request(prompts=["a hat"], image=IMAGE, image_guidance=1.0)
    assert plan(model, asked).image_guidance == 1
    with pytest.raises(UserError, match=r"image_guidance = 0\.9 is below 1"):
        plan(model, dataclasses.replace(asked, image_guidance=0.9))
    with pytest.raises(UserError, match="image_guidance has no effect here: guidance = 1 is off"):
        plan(model, dataclasses.replace(asked, guidance=1.0))
