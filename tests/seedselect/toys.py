"""A model whose programs compile in a moment, for what does not depend on networks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.conditioning import Guidance
from jaxgen.denoiser import Network
from jaxgen.diffusion import grids
from jaxgen.diffusion.schedule import Schedule
from jaxgen.seedselect.objective import Given, Objective, Weights
from jaxgen.seedselect.search import Program, Rule, Run, Search

SHAPE = (4, 3, 2)
PARAMS = {"unet": {}, "vae": {}}


@dataclass(frozen=True)
class Denoiser:
    def apply(self, params, x, point, cache, residuals):
        return jnp.tanh(2 * x + jnp.roll(x, 1, 1)) + 1e-3 * point.time


@dataclass(frozen=True)
class Decoder:
    def decode(self, params, latents):
        return jnp.tanh(latents)


def score(params, rows, images):
    return ((images - rows[:, None, None, None]) ** 2).mean((1, 2, 3))


def program(sampler="ddim", tail=(0.3, 0.7), truncate=0):
    return Program(Network(Denoiser()), Decoder(), sampler, Objective(score, tail=tail), truncate)


def run(seeds, sampler="ddim", steps=4, prior=0.0, **search):
    points = grids.grid(Schedule(sampler=sampler), steps).points
    rows = np.linspace(-0.5, 0.5, len(seeds), dtype=np.float32)
    given = Given((), rows, np.zeros_like(seeds))
    off = Guidance(np.zeros(0, np.float32), *np.zeros((3, 1), np.float32)[:, 0])
    cache = {"unet": {}, "controls": ()}
    points, rule = jax.tree.map(jnp.asarray, points), Rule.of(Search(**search))
    return Run(cache, points, 1.0, off, Weights(0.8, prior), given, rule)


def seeds(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)
