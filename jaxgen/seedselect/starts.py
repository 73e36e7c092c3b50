"""Where seeds start from: noise, what the references invert to, or seeds that were found before."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgen import conditioning, denoiser, generate, sharding
from jaxgen.data.hints import Hint
from jaxgen.denoiser import Model, Network
from jaxgen.diffusion import inversion, shell
from jaxgen.diffusion.guidance import holds_a_step
from jaxgen.plan import Plan, hints_of, plan
from jaxgen.seedselect.seeds import read
from jaxgen.types import Array, Cache, Params, Point, UserError

Start = str | np.ndarray | Callable[[int], np.ndarray]  # gaussian, nao; noise; or noise of an index

SPREAD, NORM_AWARE = 2, 3  # tell what is drawn here from what else a seed draws
PLACES = 0.75, 1.0  # of a start on a way from the centroid, at 0, to a reference's noise, at 1
STEPS = 50  # of the inversion, as in the released code of NAO


def named(start: str, checked: Plan, settings: Mapping[str, Any], variety: float) -> Start:
    """gaussian and nao by name; seeds of a file as they are; near those of a folder.

    Args:
        settings: of `output.identity`, under which seeds are to be used.
        variety: of `Search`.
    """
    if start in ("gaussian", "nao"):
        return start
    path = Path(start)
    if not path.exists():
        raise UserError(f"--start {start} is neither gaussian, nao, nor a file or folder")
    known = read(path, checked.latent_shape, settings, checked.request.prompts[0])
    if path.is_dir():
        return lambda index: spread(known, checked.request.seed, index, variety)
    return known


def of(
    start: Start,
    model: Model,
    params: Params,
    checked: Plan,
    latents: Sequence[Array],
    variety: float,
    mesh: Mesh,
) -> Callable[[int], np.ndarray] | None:
    """Where the image of each index starts [h, w, C]; None for its own noise.

    Args:
        start: as of `select`.
        latents: of each prompt's references, [K, h, w, C].
        variety: of `Search`.
    """
    if isinstance(start, np.ndarray):
        return lambda index: start[index % len(start)]
    if not isinstance(start, str):
        return start
    if start == "gaussian":
        return None

    @functools.cache
    def near_references(prompt: int) -> Callable[[int], np.ndarray]:
        seeds = inverted(model, params, checked, prompt, latents[prompt], mesh)
        return norm_aware(seeds, checked.request.seed, variety)

    count = checked.request.count
    return lambda index: near_references(index // count)(index % count)


def inverted(
    model: Model, params: Params, checked: Plan, prompt: int, latents: Array, mesh: Mesh
) -> np.ndarray:
    """The noise [K, h, w, C] that DDIM, unguided, leads to the latents of a class's references.

    Args:
        prompt: index of the class's prompt in the plan.
        latents: [K, h, w, C]; at once as many as the request's batch, or one for each device.
    """
    request = checked.request
    hints = [_of_prompt(hint, prompt) for hint in hints_of(request)]
    for i, hint in enumerate(hints):
        if not holds_a_step(hint.span, STEPS):  # less than a step here: it does not act
            hints[i] = dataclasses.replace(hint, scale=0.0, span=(0.0, 1.0))
    asked = dataclasses.replace(
        request, prompts=[request.prompts[prompt]], sampler="ddim", steps=STEPS, guidance=1.0,
        negative="", rescale=0.0, guidance_interval=(0.0, 1.0), image_guidance=None,
        eta=0.0, karras=None, count=1, control=hints, latents=None,
    )  # fmt: skip
    alone, rows = plan(model, asked), np.asarray(latents)
    size = mesh.size * max(1, min((request.batch or 0), len(rows)) // mesh.size)
    pictures = sharding.replicate(conditioning.encode_pictures(model, params, alone), mesh)
    _, inputs = conditioning.condition(model, params, alone, pictures, [0] * size, mesh)
    cache = generate.prepare(params, inputs, network=model.network)
    points = sharding.replicate(inversion.backwards(alone.schedule, STEPS).points, mesh)
    found = []
    for first in range(0, len(rows), size):
        batch = np.resize(rows[first : first + size], (size, *rows.shape[1:]))  # the last repeats
        batch = sharding.split_batch(batch, mesh)
        found.append(np.asarray(_invert(params, cache, batch, points, network=model.network)))
    return np.concatenate(found)[: len(rows)]


def _of_prompt(hint: Hint, prompt: int) -> Hint:
    """A hint of many prompts -> that of one."""
    if hint.picture.ndim == 3:
        return hint
    return dataclasses.replace(hint, picture=hint.picture[prompt])


@partial(jax.jit, static_argnames="network")
def _invert(
    params: Params, cache: Cache, latents: Array, points: Point, *, network: Network
) -> Array:
    return inversion.invert(denoiser.bind(network, params, cache), latents, points)[0]


@jax.jit
def _ways(seeds: Array, key: Array) -> Array:
    return shell.centroid(seeds, key)[1]


def norm_aware(seeds: np.ndarray, seed: int, variety: float) -> Callable[[int], np.ndarray]:
    """Starts [h, w, C] on the ways between the centroid of inverted references and each of them.

    (seed, number) alone says where: in the last quarter of a way, since most of it leads to the
    picture of the centroid, which mixes all of them; and turned towards new noise, as in `spread`.

    Args:
        seeds: [K, h, w, C] what the references invert to.
        seed: of the images.
        variety: of `Search`.

    Returns:
        A function of an image's number.
    """
    if len(seeds) == 1:
        return lambda number: spread(seeds, seed, number, variety)
    ways = np.asarray(_ways(seeds.reshape(len(seeds), -1), jax.random.key(seed)))

    def start(number: int) -> np.ndarray:
        draw = np.random.default_rng([seed, number, NORM_AWARE])
        way, place = ways[draw.integers(len(ways))], draw.uniform(*PLACES) * (len(ways[0]) - 1)
        low = min(int(place), len(way) - 2)
        point = way[low] + (place - low) * (way[low + 1] - way[low])
        return _turned(point, draw, variety).reshape(seeds.shape[1:])

    return start


def spread(seeds: np.ndarray, seed: int, number: int, variety: float) -> np.ndarray:
    """A start [h, w, C] near seeds that were found before [M, h, w, C].

    A point of the great circle between two of them, or the only one, turned towards new noise by
    the angle whose sine is `variety`. (seed, number) alone decide.
    """
    draw = np.random.default_rng([seed, number, SPREAD])
    first = seeds[draw.integers(len(seeds))]
    if len(seeds) > 1:
        other = seeds[draw.integers(len(seeds))]
        first = np.asarray(shell.between(first, other, draw.uniform(0, 0.5)))
    return _turned(first, draw, variety)


def _turned(point: np.ndarray, draw: np.random.Generator, sine: float) -> np.ndarray:
    """A point [...] turned towards new noise; its norm stays."""
    size = np.linalg.norm(point)
    noise = draw.standard_normal(point.shape).astype(np.float32)
    noise *= size / np.linalg.norm(noise)
    turned = np.sqrt(1 - sine**2) * point + sine * noise
    return (turned * (size / np.linalg.norm(turned))).astype(np.float32)
