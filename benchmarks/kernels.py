"""The forms of attention and convolution at Stable Diffusion's shapes, and the machine's peak.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --parts points attentions

Float32 on CPU. GFLOP/s count the products of the plain algorithm, so that forms compare by time.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

from jaxgen.models import attention, correlation, winograd
from jaxgen.models.convolution import resize_nearest
from jaxgen.models.correlation import SAME, Form, Geometry, patched, plain
from jaxgen.types import Array

CONVOLUTIONS = (  # batch, side, inputs, outputs
    (2, 64, 320, 320),
    (2, 32, 640, 640),
    (2, 16, 1280, 1280),
    (2, 8, 1280, 1280),
    (1, 128, 512, 512),
    (1, 256, 256, 256),
)
GRADIENTS = (  # batch, side, inputs, outputs; the miniature's at the end
    (1, 64, 320, 320),
    (1, 32, 640, 640),
    (1, 16, 1280, 1280),
    (1, 8, 1280, 1280),
    (4, 64, 320, 320),
    (4, 16, 1280, 1280),
    (8, 64, 16, 16),
    (8, 64, 32, 32),
    (16, 16, 64, 64),
    (32, 16, 48, 48),
    (32, 8, 96, 96),
    (32, 4, 160, 160),
)
HALVINGS = ((1, 64, 320), (1, 32, 640), (1, 16, 1280), (16, 16, 64))  # batch, side, channels
DOUBLINGS = (  # batch, side before, channels
    (2, 8, 1280),
    (2, 16, 1280),
    (2, 32, 640),
    (1, 128, 512),
    (1, 256, 256),
)
TILED = ((2, 16, 640), (2, 16, 1280), (2, 16, 2560), (3, 16, 1280), (4, 16, 1280), (8, 16, 1280))
POINTS = (  # batch, side, inputs, outputs
    (2, 64, 320, 320),
    (2, 64, 960, 320),
    (2, 32, 640, 640),
    (2, 32, 1920, 640),
    (2, 16, 1280, 1280),
    (2, 16, 2560, 1280),
    (1, 128, 512, 512),
    (1, 256, 256, 256),
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


def doubling(x: Array, kernel: Array) -> Array:
    x = resize_nearest(x, 2 * x.shape[1], 2 * x.shape[2])
    return plain(x, kernel, 1, SAME)


def tiled(wanted: str, a: Array, b: Array) -> Array:
    if wanted == "kernel":
        return winograd.kernel_gradient(a, b)
    return winograd.convolve(a, b, transposed=wanted == "image")


def in_form(form: Form, wanted: correlation.Wanted, geometry: Geometry) -> Callable:
    return lambda a, b: correlation.transposed(form, wanted, a, b, geometry)


def gradients() -> None:
    """A convolution, the gradient of its image and that of its kernel, in every form."""
    forms = ("plain", "patches", "Winograd", "as run")
    print("\n| | " + " | ".join(forms) + " |\n|---|" + "---|" * len(forms))
    cases = [(*case, 1) for case in GRADIENTS]
    cases += [(batch, side, channels, channels, 2) for batch, side, channels in HALVINGS]
    for batch, side, inputs, outputs, stride in cases:
        x, kernel = random(batch, side, side, inputs), random(3, 3, inputs, outputs)
        y = random(batch, side // stride, side // stride, outputs)
        geometry = Geometry(stride, SAME, side, side, 3)
        work = 2 * y.size * 9 * inputs / 1e9
        wants: dict[correlation.Wanted, tuple[Array, Array]]
        wants = {"result": (x, kernel), "image": (y, kernel), "kernel": (x, y)}
        for wanted, args in wants.items():
            ways = [in_form(form, wanted, geometry) for form in (plain, patched)]
            ways += [partial(tiled, wanted)] if stride == 1 else []
            ways += [partial(correlation.compute, wanted, geometry=geometry)]
            speeds = [f"{work / s:.0f}" for s in in_turn(ways, args)]
            if stride == 2:
                speeds.insert(2, "")
            what = f"{batch}x{side}x{side}, {inputs} to {outputs}{', halved' * (stride == 2)}"
            print(f"| {what}: {wanted} | {' | '.join(speeds)} |", flush=True)


def tiles() -> None:
    """Winograd's tiles, large and small, to 1280 channels; which are taken says winograd.FEW."""
    print("\n| 3x3 convolution by Winograd | large tiles | small tiles |\n|---|---|---|")
    kept = winograd.FEW
    for batch, side, inputs in TILED:
        x, kernel = random(batch, side, side, inputs), random(3, 3, inputs, 1280)
        work = 2 * batch * side**2 * 9 * inputs * 1280 / 1e9

        def by(x: Array, kernel: Array, few: int) -> Array:
            winograd.FEW = few  # read when it is traced
            return winograd.convolve(x, kernel)

        ways: list[Callable] = [partial(by, few=few) for few in (0, 2**20)]
        speeds = " | ".join(f"{work / s:.0f}" for s in in_turn(ways, (x, kernel)))
        print(f"| {batch}x{side}x{side}, {inputs} to 1280 | {speeds} |", flush=True)
    winograd.FEW = kept


def in_turn(ways: list[Callable], args: tuple[Array, ...], rounds: int = 5) -> list[float]:
    """The fastest run of each, run in turn, so that a busy machine slows all."""
    programs = [jax.jit(way) for way in ways]
    taken: list[list[float]] = [[] for _ in ways]
    for i in range(rounds + 1):
        for program, kept in zip(programs, taken):
            start = time.perf_counter()
            program(*args).block_until_ready()
            kept.extend([time.perf_counter() - start] if i else [])
    return [min(kept) for kept in taken]


def points() -> None:
    """Winograd's products, of all points in one batch or one point after the other."""
    print("\n| 3x3 convolution by Winograd | in one batch | one by one |\n|---|---|---|")

    def one_by_one(images: Array, kernels: Array, transposed: bool) -> Array:
        product = "ti,oi->to" if transposed else "ti,io->to"
        return lax.map(lambda pair: jnp.einsum(product, *pair), (images, kernels))

    def by(x: Array, kernel: Array, products: Callable) -> Array:
        with mock.patch.object(winograd, "_products", products):  # read when it is traced
            return winograd.convolve(x, kernel)

    for batch, side, inputs, outputs in POINTS:
        args = random(batch, side, side, inputs), random(3, 3, inputs, outputs)
        work = 2 * batch * side**2 * 9 * inputs * outputs / 1e9
        ways: list[Callable] = [partial(by, products=p) for p in (winograd._products, one_by_one)]
        speeds = " | ".join(f"{work / s:.0f}" for s in in_turn(ways, args))
        print(f"| {batch}x{side}x{side}, {inputs} to {outputs} | {speeds} |", flush=True)


def convolutions() -> None:
    """Each form of a convolution, and which is chosen."""
    print("\n| 3x3 convolution | plain | patches | Winograd | chosen |\n|---|---|---|---|---|")
    for batch, side, inputs, outputs in CONVOLUTIONS:
        x, kernel = random(batch, side, side, inputs), random(3, 3, inputs, outputs)
        work = 2 * batch * side * side * 9 * inputs * outputs / 1e9
        ways: list[Callable] = [partial(form, stride=1, padding=SAME) for form in (plain, patched)]
        ways += [winograd.convolve]
        speeds = " | ".join(f"{work / seconds(f, x, kernel):.0f}" for f in ways)
        chosen = "plain"
        if winograd.pays(x, kernel):
            chosen = "Winograd"
        elif correlation._wide_and_small(x):
            chosen = "patches"
        print(f"| {batch}x{side}x{side}, {inputs} to {outputs} | {speeds} | {chosen} |", flush=True)


def doublings() -> None:
    """Convolutions of a doubled image."""
    print("\n| 3x3 convolution of a doubled image | plain | Winograd |\n|---|---|---|")
    for batch, side, channels in DOUBLINGS:
        x, kernel = random(batch, side, side, channels), random(3, 3, channels, channels)
        work = 2 * batch * (2 * side) ** 2 * 9 * channels**2 / 1e9
        ways: list[Callable] = [doubling, partial(winograd.convolve, doubled=True)]
        speeds = " | ".join(f"{work / seconds(f, x, kernel):.0f}" for f in ways)
        print(f"| {batch}x{side}x{side}, {channels} channels | {speeds} |", flush=True)


def feeds() -> None:
    """The feed-forward network, at once and in parts."""
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


def attentions() -> None:
    """Self-attention, of all heads at once and in chunks."""
    print("\n| attention, batch 2, 8 heads | all heads at once | as run |\n|---|---|---|")
    for tokens, width in ATTENTIONS:
        q, k, v = (random(2, tokens, 8, width) for _ in range(3))
        whole = seconds(attention._attend_heads_first, q, k, v)
        ours = seconds(attention._attend_chunked, q, k, v)
        print(f"| {tokens} tokens, {width} wide | {whole * 1e3:.0f} ms | {ours * 1e3:.0f} ms |")


Part = Literal["convolutions", "gradients", "tiles", "points", "doublings", "feeds", "attentions"]
PARTS: tuple[Part, ...] = get_args(Part)


def main(parts: tuple[Part, ...] = PARTS) -> None:
    """Prints Markdown.

    Args:
        parts: which tables.
    """
    a, b = random(4096, 4096), random(4096, 4096)
    print(f"matrix product 4096^3: {2 * 4096**3 / seconds(jnp.matmul, a, b) / 1e9:.0f} GFLOP/s")
    for part in parts:
        globals()[part]()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
