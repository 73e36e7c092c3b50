"""The forms of attention and convolution at Stable Diffusion's shapes, and the machine's peak.

    python benchmarks/kernels.py

Float32 on CPU. GFLOP/s count the products of the plain algorithm, so that forms compare by time.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgen.models import attention, layers, winograd
from jaxgen.types import Array

CONVOLUTIONS = (  # batch, side, inputs, outputs
    (2, 64, 320, 320),
    (2, 32, 640, 640),
    (2, 16, 1280, 1280),
    (2, 8, 1280, 1280),
    (1, 128, 512, 512),
    (1, 256, 256, 256),
)
DOUBLINGS = (  # batch, side before, channels
    (2, 8, 1280),
    (2, 16, 1280),
    (2, 32, 640),
    (1, 128, 512),
    (1, 256, 256),
)
FEEDS = ((4096, 320), (1024, 640), (256, 1280))  # tokens, channels
ATTENTIONS = ((4096, 40), (1024, 80))  # tokens, width of a head


def random(*shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def seconds(f: Callable, *args: Array, runs: int = 5) -> float:
    """The fastest of some runs, compiled before."""
    program = jax.jit(lambda *a: f(*a))
    program(*args).block_until_ready()
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        program(*args).block_until_ready()
        taken.append(time.perf_counter() - start)
    return min(taken)


def plain(x: Array, kernel: Array, doubled: bool = False) -> Array:
    if doubled:
        x = layers.resize_nearest(x, 2 * x.shape[1], 2 * x.shape[2])
    return lax.conv_general_dilated(
        x, kernel, (1, 1), winograd.SAME, dimension_numbers=winograd.DIMENSIONS
    )


def tiled(x: Array, kernel: Array, doubled: bool = False) -> Array:
    return winograd.convolve(x, kernel, jnp.zeros(kernel.shape[-1:]), None, doubled)


def patches(x: Array, kernel: Array) -> Array:
    return layers._convolve_patches(x, kernel, 1, winograd.SAME)


def main() -> None:
    a, b = random(4096, 4096), random(4096, 4096)
    print(f"matrix product 4096^3: {2 * 4096**3 / seconds(jnp.matmul, a, b) / 1e9:.0f} GFLOP/s\n")

    print("| 3x3 convolution | plain | patches | Winograd | chosen |\n|---|---|---|---|---|")
    for batch, side, inputs, outputs in CONVOLUTIONS:
        x, kernel = random(batch, side, side, inputs), random(3, 3, inputs, outputs)
        work = 2 * batch * side * side * 9 * inputs * outputs / 1e9
        forms = (plain, patches, tiled)
        speeds = " | ".join(f"{work / seconds(f, x, kernel):.0f}" for f in forms)
        chosen = "plain"
        if winograd.pays(x, kernel):
            chosen = "Winograd"
        elif layers._wide_and_small(x):
            chosen = "patches"
        print(f"| {batch}x{side}x{side}, {inputs} to {outputs} | {speeds} | {chosen} |", flush=True)

    print("\n| 3x3 convolution of a doubled image | plain | Winograd |\n|---|---|---|")
    for batch, side, channels in DOUBLINGS:
        x, kernel = random(batch, side, side, channels), random(3, 3, channels, channels)
        work = 2 * batch * (2 * side) ** 2 * 9 * channels**2 / 1e9
        speeds = " | ".join(
            f"{work / seconds(lambda *a, f=f: f(*a, True), x, kernel):.0f}" for f in (plain, tiled)
        )
        print(f"| {batch}x{side}x{side}, {channels} channels | {speeds} |", flush=True)

    print("\n| feed-forward, batch 2 | at once | as run |\n|---|---|---|")
    network = attention.FeedForward()
    for tokens, channels in FEEDS:
        x = random(2, tokens, channels)
        params = network.init(jax.random.key(0), x)
        ours = seconds(network.apply, params, x)
        kept, attention.FEATURES = attention.FEATURES, 2**40
        whole = seconds(network.apply, params, x)
        attention.FEATURES = kept
        print(f"| {tokens} tokens, {channels} wide | {whole * 1e3:.0f} ms | {ours * 1e3:.0f} ms |")

    print("\n| attention, batch 2, 8 heads | all heads at once | as run |\n|---|---|---|")
    for tokens, width in ATTENTIONS:
        q, k, v = (random(2, tokens, 8, width) for _ in range(3))
        whole = seconds(attention._attend_heads_first, q, k, v)
        ours = seconds(attention._attend_chunked, q, k, v)
        print(f"| {tokens} tokens, {width} wide | {whole * 1e3:.0f} ms | {ours * 1e3:.0f} ms |")


if __name__ == "__main__":
    main()
