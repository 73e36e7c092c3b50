"""What a change of settings compiles: nothing, as long as shapes, sampler and branches stay."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxgen
from jaxgen import Hint
from jaxgen.models.controlnet import ControlNet
from jaxgen.models.controlnet_config import ControlNetConfig
from jaxgen.sharding import data_mesh

TINY = Path(__file__).parent / "assets" / "tiny"
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (40, 32, 3), np.uint8)
MASK = np.zeros((40, 32), bool)
MASK[8:20, 12:28] = True
HINT = RNG.integers(0, 256, (40, 32, 3), np.uint8)
LATENTS = RNG.normal(size=(1, 10, 8, 4)).astype(np.float32)
COMMON = {"size": (32, 40), "steps": 5, "count": 2, "batch": 2, "sampler": "ddim"}
MODES = {
    "text": {},
    "image": {"image": IMAGE, "strength": 0.8},
    "mask": {"image": IMAGE, "mask": MASK, "strength": 0.8},
    "control": {"control": Hint(HINT, span=(0.0, 0.5))},  # one that always acts asks no step
}


@pytest.fixture(scope="module")
def sample():
    """sample(prompt, **settings) -> how many programs of any kind were compiled."""
    model, params = jaxgen.load(TINY)
    net = ControlNet(ControlNetConfig.of(model.unet.config, model.factor))
    controlled = dataclasses.replace(model, controls=(net,))
    params |= {"controlnet": net.begun(jax.random.key(0), params["unet"])}
    compiled = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details)

    def run(prompt="a red apple", **settings):
        compiled.clear()
        chosen = controlled if "control" in settings else model
        jaxgen.sample(chosen, params, prompt, mesh=data_mesh(2), **COMMON | settings)
        return len(compiled)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield run
    jax.monitoring.unregister_event_duration_listener(listen)


CHANGES = {
    "nothing": {},
    "prompt": {"prompt": "two cats on a sofa"},
    "prompts": {"prompt": ["two cats on a sofa", "a horse", "the moon"]},
    "weights": {"prompt": "two (cats:1.3) on a sofa"},
    "negative": {"negative": "snow"},
    "seed": {"seed": 2**32 - 1},
    "guidance": {"guidance": 1.5},
    "rescale": {"rescale": 0.7},
    "interval": {"guidance_interval": (0.2, 0.6)},
    "7 steps": {"steps": 7},
    "50 steps": {"steps": 50},
    "a last batch that is not full": {"count": 3},
    "one image": {"count": 1},
    "float": {"output": "float"},
}
PICTURES = {
    "picture": {"image": IMAGE[::-1].copy()},
    "strength": {"strength": 0.5},
    "strength and steps": {"strength": 0.45, "steps": 9},
    "strength 1": {"strength": 1.0},
}
HINTS = {
    "scale": {"control": Hint(HINT, 0.3, (0.0, 0.5))},
    "no scale": {"control": Hint(HINT, 0.0, (0.0, 0.5))},
    "span": {"control": Hint(HINT, 0.7, (0.2, 0.6))},
    "hint": {"control": Hint(~HINT, span=(0.0, 0.5))},
    "hint of another size": {"control": Hint(HINT[::2].copy(), span=(0.0, 0.5))},
}
FURTHER = {
    "text": {},
    "image": PICTURES,
    "mask": PICTURES | {"mask": {"mask": ~MASK}},
    "control": HINTS,
}


@pytest.mark.parametrize("mode", MODES)
def test_settings_compile_nothing_new(sample, mode):
    assert sample(**MODES[mode]) > 0
    changes = CHANGES | FURTHER[mode]
    compiled = {name: sample(**MODES[mode] | change) for name, change in changes.items()}
    assert not any(compiled.values()), compiled


def test_given_latents_compile_none_of_the_programs_again(sample):
    sample()
    sample(latents=LATENTS)
    assert sample(latents=-LATENTS, seed=3) == 0


def test_eta_is_traced(sample):
    sample(eta=0.3)
    assert sample(eta=0.9, steps=8) == 0


def test_another_size_does_compile(sample):
    sample()
    assert sample(size=(36, 40)) > 0, "else this file counts nothing"
