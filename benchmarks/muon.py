"""Muon's orthogonal steps, as run against optax's iterations.

    python benchmarks/muon.py

The kernels of the embedded model's UNet and text encoder, in float32: operations by count, seconds
to run (the fastest of five, in turn) and to compile, and how far both are from float64 where
kernels are nearly singular, as gradients are. For the UNet of Stable Diffusion 1.5 the count alone.
Prints Markdown.
"""

import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib._muon import orthogonalize_via_newton_schulz  # optax names it nowhere else

import jaxgen
from jaxgen import flops, trees, zoo
from jaxgen.models.unet import UNet
from jaxgen.training import muon
from jaxgen.types import Array, Params

PARTS, ROUNDS = ("unet", "text_encoder"), 5


def by_optax(x: Array) -> Array:
    return orthogonalize_via_newton_schulz(x, jnp.asarray(muon.COEFFICIENTS))


WAYS: dict[str, Callable] = {"optax": by_optax, "jaxgen": muon.orthogonal}


def sides(params: Params) -> Iterator[tuple[int, int]]:
    """Of each kernel, as a matrix."""
    for path, leaf in trees.flatten(params).items():
        if muon.is_kernel(path, leaf):
            yield np.prod(leaf.shape[:-1], dtype=int).item(), leaf.shape[-1]


def nearly_singular(shape: tuple[int, int]) -> np.ndarray:
    """Singular values from 1 to 1e-6, in float32."""
    short = min(shape)
    draw = np.random.default_rng(0).standard_normal
    left, right = (np.linalg.qr(draw((side, short)))[0] for side in shape)
    return ((left * np.geomspace(1, 1e-6, short)) @ right.T).astype(np.float32)


def in_float64(x: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(by_optax(jnp.asarray(x, jnp.float64)))


def work(way: Callable, shapes: list[tuple[int, int]]) -> int:
    return sum(flops.count(way, jax.ShapeDtypeStruct(shape, "float32")) for shape in shapes)


def main() -> None:
    params = jaxgen.load()[1]
    shapes = [*sides({part: params[part] for part in PARTS})]
    kernels = [nearly_singular(shape) for shape in shapes]
    exact = [in_float64(x) for x in kernels]
    jax.jit(jnp.matmul).lower(kernels[0].T, kernels[0]).compile()  # what compiles first pays more
    programs, compiling = {}, {}
    for name, way in WAYS.items():
        start = time.perf_counter()
        programs[name] = jax.jit(lambda xs, way=way: list(map(way, xs))).lower(kernels).compile()
        compiling[name] = time.perf_counter() - start
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name, program in programs.items():
            start = time.perf_counter()
            found = jax.block_until_ready(program(kernels))
            taken[name].append(time.perf_counter() - start)
    unet = UNet.read(zoo.configs("fresh:sd15")["unet"], "fresh:sd15")
    largest = [*sides(jax.eval_shape(unet.init, jax.random.key(0)))]

    print(f"{len(shapes)} kernels of mini, {len(largest)} of the UNet of SD 1.5\n")
    print("| | mini | to run | to compile | error | SD 1.5 |\n|---|---|---|---|---|---|")
    for name, way in WAYS.items():
        found = programs[name](kernels)
        error = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, exact))
        print(
            f"| {name} | {work(way, shapes) / 1e9:.1f} GFLOP | {min(taken[name]):.2f} s | "
            f"{compiling[name]:.0f} s | {error:.0e} | {work(way, largest) / 1e12:.1f} TFLOP |"
        )


if __name__ == "__main__":
    main()
