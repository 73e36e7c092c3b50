"""From prompts to pictures: what `jaxgen.sample` and the command do.

Each program compiles once: draw the noise, encode text and pictures, prepare what does not depend
on time, walk the grid, decode. Prompt, seed, guidance above 1, strength and the number of steps are
traced; shapes (so the number of chunks of text), the sampler and the set of branches are not.
"""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxgen import conditioning, denoiser, sharding
from jaxgen.denoiser import Model, Network
from jaxgen.diffusion import grids, samplers
from jaxgen.diffusion import guidance as guidances
from jaxgen.models.tiling import decode_tiled
from jaxgen.models.vae import VAE
from jaxgen.plan import Plan, plan
from jaxgen.request import Request
from jaxgen.types import Array, Cache, Inputs, Params, Point, UserError

WHOLE = 128 * 128  # latents; more are decoded in tiles


def sample(
    model: Model,
    params: Params,
    prompts: list[str] | str,
    *,
    output: str = "uint8",
    mesh: Mesh | None = None,
    progress: bool = False,
    **settings: Any,
) -> np.ndarray:
    """Samples `count` images for each prompt.

    Args:
        model, params: from `jaxgen.load`.
        prompts: one or several.
        output: "uint8" images, "float" images about [-1, 1], or "latents".
        mesh: devices over which a batch is spread; all of them by default.
        progress: shows a bar.
        settings: fields of `Request`: seed, steps, guidance, sampler, negative, image, ...

    Returns:
        [prompts x count, H, W, 3], the images of a prompt side by side; or latents [..., h, w, C].

    Raises:
        UserError: before anything compiles, for settings that do not fit the model.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if output not in ("uint8", "float", "latents"):
        raise UserError(f"output {output!r} is not uint8, float or latents")
    checked = plan(model, Request(prompts=prompts, **settings))
    pictures: dict[int, np.ndarray] = {}
    for index, picture in run(model, params, checked, output, mesh=mesh, progress=progress):
        pictures[index] = picture
    return np.stack([pictures[i] for i in range(checked.total)])


def run(
    model: Model,
    params: Params,
    checked: Plan,
    output: str = "uint8",
    *,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Iterator[tuple[int, np.ndarray]]:
    """The images of a plan as they are finished: (index in prompt-major order, image)."""
    mesh = mesh or mesh_for(checked)
    batch = batch_of(checked, mesh.size)
    params = sharding.replicate(params, mesh)
    pictures = sharding.replicate(conditioning.encode_pictures(model, params, checked), mesh)
    groups = list(batches(checked, batch))
    with tqdm(total=len(groups) * checked.calls, unit="step", disable=not progress) as bar:
        for indices in groups:
            full = filled(indices, batch)
            latents = _denoise(model, params, checked, pictures, full, mesh, bar)
            yield from zip(indices, finish(model, params, latents, output), strict=False)


def mesh_for(checked: Plan) -> Mesh:
    """As many devices as a plan has images to do at once, up to all of them."""
    return sharding.data_mesh(
        min(len(jax.devices()), checked.total, checked.request.batch or checked.total)
    )


def batch_of(checked: Plan, devices: int, each: int | None = None) -> int:
    """Images at once: as many for each device, at least one, and no more than were allowed.

    Args:
        each: of a device, where none were; by default 1 of a CPU, 4 of an accelerator.
    """
    each = each or (1 if jax.default_backend() == "cpu" else 4)
    allowed = checked.request.batch or devices * each
    return devices * max(1, min(allowed // devices, -(-checked.total // devices)))


def batches(checked: Plan, batch: int, wanted: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Image indices, all or those wanted, by batch; its texts have one number of chunks."""
    groups: dict[int, list[int]] = {}
    for index in range(checked.total) if wanted is None else wanted:
        chunks = checked.texts[index // checked.request.count][0].shape[1]
        groups.setdefault(chunks, []).append(index)
    for group in groups.values():
        yield from (group[i : i + batch] for i in range(0, len(group), batch))


def filled(indices: list[int], batch: int) -> list[int]:
    """A full batch, so that the last one compiles nothing; what is repeated is dropped later."""
    return indices + indices[-1:] * (batch - len(indices))


class Blend(NamedTuple):
    """What stays, in inpainting with a UNet that knows no masks."""

    mask: Array  # [1, h, w, 1], 1 where repainted
    known: Array  # [1, h, w, C] clean latents of the image
    noise: Array  # [B, h, w, C] with which they are noised


def _denoise(
    model: Model,
    params: Params,
    checked: Plan,
    pictures: conditioning.Pictures,
    indices: list[int],
    mesh: Mesh,
    bar: tqdm,
) -> Array:
    """One batch from noise to clean latents [B, h, w, C]."""
    request, start = checked.request, checked.start
    noise, keys = starting_noise(checked, indices, mesh)
    guidance, inputs = conditioning.condition(model, params, checked, pictures, indices, mesh)
    cache = prepare(params, inputs, network=model.network)

    points = sharding.replicate(grids.pad(checked.grid.points), mesh)
    x = noise * np.float32(checked.grid.initial)
    if not checked.from_noise:
        x = points.signal[start] * pictures.known[0] + points.noise[start] * noise
    blend = tuple(Blend(mask, pictures.known[0], noise) for mask in pictures.mask)

    sampler = samplers.SAMPLERS[checked.schedule.sampler]
    state = samplers.State(x, sampler.memory(x))
    if not sampler.stochastic and not request.eta:
        keys = None
    for i in range(start, checked.grid.length):
        before = state.x
        state = advance(
            params, cache, state, points, (i, i + 1, start), keys, guidance, blend,
            network=model.network, sampler=checked.schedule.sampler,
        )  # fmt: skip
        before.block_until_ready()  # a step behind, so that the device never waits for the bar
        bar.update()
    trim()
    return state.x


def trim() -> None:
    """Gives back to the system what compilers have freed: hundreds of MB that malloc would keep."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def starting_noise(checked: Plan, indices: list[int], mesh: Mesh) -> tuple[Array, Array | None]:
    """Standard normal noise [B, h, w, C], and the keys [B] of what the steps will draw."""
    request = checked.request
    number = np.array(indices, np.uint32) % np.uint32(request.count)
    noise, keys = draw(np.uint32(request.seed), number, shape=checked.latent_shape)
    if request.latents is not None:
        rows = np.array(indices) % len(request.latents)  # one for all, or one for each
        noise = jnp.asarray(request.latents[rows])
    return sharding.split_batch((noise, keys), mesh)


@partial(jax.jit, static_argnames="shape")
def draw(seed: Array, number: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Image numbers [B] -> noise [B, *shape] and a key each, from (seed, number) alone."""

    def one(i: Array) -> tuple[Array, Array]:
        start, steps = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
        return jax.random.normal(start, shape, jnp.float32), steps

    return jax.vmap(one)(number)


@partial(jax.jit, static_argnames="network")
def prepare(params: Params, inputs: Inputs, *, network: Network) -> Cache:
    """What does not depend on time, once per batch."""
    return denoiser.prepare(network, params, inputs)


@partial(jax.jit, static_argnames=("network", "sampler"))
def advance(
    params: Params,
    cache: Cache,
    state: samplers.State,
    points: Point,
    span: tuple[Array, Array, Array],
    keys: Array | None,
    guidance: conditioning.Guidance,
    blend: tuple[Blend, ...],
    *,
    network: Network,
    sampler: str,
) -> samplers.State:
    """Rows span[0] .. span[1] - 1 of a padded grid whose run began at row span[2]."""
    first, stop, start = span
    denoise = denoiser.bind(network, params, cache)
    if guidance.scales.size:
        denoise = guidances.guide(denoise, *guidance[:2], interval=guidance[2:])

    def after(x: Array, point: Point) -> Array:
        for mask, known, noise in blend:
            # Past the last row stand signal 1 and noise 0: in the end what stays is clean.
            row = start + point.index + 1
            x = mask * x + (1 - mask) * (points.signal[row] * known + points.noise[row] * noise)
        return x

    step = samplers.SAMPLERS[sampler].step
    return samplers.walk(step, denoise, state, points, first, stop, keys, after)


def finish(model: Model, params: Params, latents: Array, output: str) -> np.ndarray:
    """Latents [B, h, w, C] -> what the caller asked for, on the host."""
    if output == "latents":
        return np.asarray(latents)
    program = partial(decode, params["vae"], vae=model.vae)
    if latents.shape[1] * latents.shape[2] > WHOLE:
        images = np.asarray(decode_tiled(program, latents, model.vae.config.tile, model.factor))
    else:
        images = np.asarray(program(latents))
    if not np.isfinite(images).all():
        raise UserError(_not_finite(params))
    return images if output == "float" else to_uint8(images)


def _not_finite(params: Params) -> str:
    """Where the fault lies: in the weights of a part, or in what was computed with them."""
    for name, part in params.items():
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(part)):
            return f"the weights of the model's {name} are not all finite: they are damaged"
    half = any(leaf.dtype.itemsize == 2 for leaf in jax.tree.leaves(params["vae"]))
    return "the model's output is not finite" + "; try dtype f32" * half


@partial(jax.jit, static_argnames="vae")
def decode(params: Params, latents: Array, *, vae: VAE) -> Array:
    """[B, h, w, C] -> [B, H, W, 3] about [-1, 1]."""
    return vae.decode(params, latents)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[...] about [-1, 1] -> uint8, rounded as diffusers does."""
    return np.round(np.clip(images / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
