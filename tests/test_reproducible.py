"""Image i of a prompt under seed s depends on (s, i) alone."""

from pathlib import Path

import jax
import numpy as np
import pytest

import jaxgen
from jaxgen.generate import mesh_for
from jaxgen.plan import plan
from jaxgen.request import Request
from jaxgen.sharding import data_mesh

TINY = Path(__file__).parent / "assets" / "tiny"
PROMPT, OTHERS = "a red apple", ["the moon over the water", "two cats"]


@pytest.fixture(scope="module")
def tiny():
    return jaxgen.load(TINY)


@pytest.fixture(scope="module", params=["ddim", "euler_a"])
def sample(request, tiny):
    """sample(prompts, devices, **settings) -> int32 [N, H, W, 3]."""

    def run(prompts, devices, **settings):
        common = {"sampler": request.param, "steps": 4, "size": (32, 24), "seed": 11}
        images = jaxgen.sample(*tiny, prompts, mesh=data_mesh(devices), **common | settings)
        return images.astype(np.int32)

    return run


@pytest.fixture(scope="module")
def alone(sample):
    """Five images of a prompt, each in a batch of one."""
    return sample(PROMPT, 1, count=5, batch=1)


def assert_same(images, expected):
    assert images.shape == expected.shape
    assert np.abs(images - expected).max() <= 1


def test_images_of_one_prompt_differ(alone):
    for i in range(1, 5):
        assert np.abs(alone[i] - alone[0]).max() > 20


@pytest.mark.parametrize(("devices", "batch"), [(1, 5), (2, 2), (8, 8)])
def test_batch_and_devices_do_not_matter(sample, alone, devices, batch):
    assert_same(sample(PROMPT, devices, count=5, batch=batch), alone)


def test_count_does_not_matter(sample, alone):
    assert_same(sample(PROMPT, 1, count=2, batch=1), alone[:2])


def test_other_prompts_do_not_matter(sample, alone):
    together = sample([OTHERS[0], PROMPT, OTHERS[1]], 8, count=5, batch=8)
    assert_same(together[5:10], alone)


def test_seeds_differ_and_repeat(sample, alone):
    assert (sample(PROMPT, 1, count=1, batch=1) == alone[:1]).all()
    assert np.abs(sample(PROMPT, 1, count=1, batch=1, seed=12) - alone[:1]).max() > 20


def test_meshes_have_the_devices_they_were_asked_for():
    assert len(jax.devices()) == 8
    assert [data_mesh(n).size for n in (1, 2, 8)] == [1, 2, 8]


@pytest.mark.parametrize(
    ("count", "batch", "devices"), [(1, None, 1), (5, 3, 3), (2, 6, 2), (20, None, 8), (20, 12, 8)]
)
def test_no_device_is_taken_that_has_nothing_to_do(tiny, count, batch, devices):
    checked = plan(tiny[0], Request(prompts=[PROMPT], count=count, batch=batch))
    assert mesh_for(checked).size == devices
