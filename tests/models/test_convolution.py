"""Convolutions and their derivatives against PyTorch's, in each of the forms of a CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax

from jaxgen import flops, sharding
from jaxgen.models import correlation, winograd
from jaxgen.models.convolution import convolve
from jaxgen.models.correlation import SAME, correlate
from jaxgen.models.norms import Affine
from tests.torch_oracle import error, nhwc, quick_jit

RNG = np.random.default_rng(0)
FORMS = ("plain", "patches", "Winograd", "Winograd of few tiles")
CASES = {  # kernel, stride, padding
    "3x3": (3, 1, SAME),
    "halving": (3, 2, SAME),
    "VAE's halving": (3, 2, ((0, 1), (0, 1))),
    "4x4": (4, 2, SAME),
}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Each way that a convolution may be computed, whatever its size."""
    monkeypatch.setattr(winograd, "pays", lambda *_, **__: "Winograd" in request.param)
    monkeypatch.setattr(winograd, "FEW", 0 if request.param == "Winograd" else 10**6)
    monkeypatch.setattr(correlation, "_wide_and_small", lambda _: request.param == "patches")
    return request.param


def random(*shape, dtype=np.float32):
    return jnp.asarray(RNG.standard_normal(shape), dtype)


def arguments(kernel=3, dtype=np.float32, height=9, width=14):
    """Image, kernel, bias and norm; results are about one, or the sine's slope is all rounding."""
    norm = Affine(*(random(2, 1, 1, 8, dtype=dtype) for _ in range(3)))
    taps = random(kernel, kernel, 8, 5, dtype=dtype) / (8**0.5 * kernel)
    return random(2, height, width, 8, dtype=dtype), taps, random(5, dtype=dtype), norm


def by_torch(x, kernel, bias, norm, stride, padding, doubled):
    """The result, and the gradients of the sum of its sine."""
    leaves = [torch.tensor(np.asarray(a), requires_grad=True) for a in (x, kernel, bias, *norm)]
    x, kernel, bias, mean, scale, shift = leaves
    h = torch.nn.functional.silu((x - mean) * scale + shift).permute(0, 3, 1, 2)
    if doubled:
        h = torch.nn.functional.interpolate(h, scale_factor=2, mode="nearest")
    h = torch.nn.functional.pad(h, (*padding[1], *padding[0]))
    y = torch.nn.functional.conv2d(h, kernel.permute(3, 2, 0, 1), bias, stride)
    y.sin().sum().backward()
    return nhwc(y), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize(
    ("case", "doubled"), [*((case, False) for case in CASES), ("3x3", True)], ids=str
)
def test_gradients_are_those_of_torch(case, doubled, dtype, tolerance, form):
    kernel, stride, padding = CASES[case]
    with jax.enable_x64(True):
        args = arguments(kernel, dtype)

        def ours(x, kernel, bias, norm):
            return convolve(x, kernel, bias, stride, padding, norm, doubled)

        slope = jax.grad(lambda *a: jnp.sin(ours(*a)).sum(), (0, 1, 2, 3))
        actual = jax.tree.leaves(quick_jit(lambda *a: (ours(*a), slope(*a)))(*args))
    result, gradients = by_torch(*args, stride, padding, doubled)
    for got, expected in zip(actual, [result, *gradients], strict=True):
        assert got.dtype == dtype
        assert error(got, expected) < tolerance


def reference(x, kernel, stride=1, padding=SAME):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=correlation.DIMENSIONS
    )


def values_of(f):
    """Leaves of `f` of our convolution, and of XLA's."""
    return [jax.tree.leaves(quick_jit(lambda c=c: f(c))()) for c in (correlate, reference)]


def curved(f):
    """A number that is curved in image and kernel."""
    return lambda *args: jnp.sum(jnp.sin(f(*args)))


@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_all_orders_and_directions_are_those_of_the_convolution(case, form):
    size, stride, padding = CASES[case]
    with jax.enable_x64(True):
        (x, kernel, *_), (dx, dkernel, *_) = (arguments(size, np.float64) for _ in range(2))

        def all_of(convolution):
            f = curved(partial(convolution, stride=stride, padding=padding))
            slope = jax.grad(f, (0, 1))
            return (
                jax.jvp(f, (x, kernel), (dx, dkernel)),
                jax.jvp(slope, (x, kernel), (dx, dkernel)),  # forwards over backwards
                jax.grad(lambda *a: sum(jnp.sum(g**2) for g in slope(*a)), (0, 1))(x, kernel),
            )

        for got, expected in zip(*values_of(all_of), strict=True):
            assert error(got, expected) < 1e-10


def test_forward_and_reverse_derivatives_agree(form):
    with jax.enable_x64(True):
        args, directions = arguments(dtype=np.float64), arguments(dtype=np.float64)

        def f(x, kernel, bias, norm):
            return curved(partial(convolve, norm=norm))(x, kernel, bias)

        forward = quick_jit(partial(jax.jvp, f))(args, directions)[1]
        slope = quick_jit(jax.grad(f, range(4)))(*args)
        both = jax.tree.leaves(slope), jax.tree.leaves(directions)
        assert abs(sum(jnp.vdot(a, b) for a, b in zip(*both)) / forward - 1) < 1e-12


@pytest.mark.parametrize("mapped", ["images", "kernels", "both"])
def test_it_maps_over_images_and_kernels(mapped, form):
    axes = {"images": (0, None), "kernels": (None, 0), "both": (1, 2)}[mapped]
    x, kernel, *_ = arguments(width=7)
    args = [a if i is None else jnp.stack([a, 2 * a, -a], i) for a, i in zip((x, kernel), axes)]

    def slopes(convolution):
        f = jax.grad(curved(convolution), (0, 1))
        return jax.vmap(convolution, axes)(*args), *jax.vmap(f, axes)(*args)

    for got, expected in zip(*values_of(slopes), strict=True):
        assert error(got, expected) < 1e-5


@pytest.mark.parametrize("wrap", ["checkpoint", "scan"])
def test_it_can_be_recomputed_and_scanned(wrap, form):
    x, kernel = random(2, 8, 8, 8), random(3, 3, 8, 8) / 8

    def thrice(convolution, x, kernel):
        if wrap == "scan":
            layer = lambda x, _: (jnp.sin(convolution(x, kernel)), None)  # noqa: E731
            return lax.scan(layer, x, None, 3)[0]
        layer = jax.checkpoint(lambda x: jnp.sin(convolution(x, kernel)))
        return layer(layer(layer(x)))

    def slopes(convolution):
        return jax.grad(curved(partial(thrice, convolution)), (0, 1))(x, kernel)

    for got, expected in zip(*values_of(slopes), strict=True):
        assert error(got, expected) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_learn_costs_nothing(case, form):
    size, stride, padding = CASES[case]
    args = arguments(size)
    f = curved(lambda *a: convolve(*a[:3], stride, padding, a[3]))
    forward = flops.count(f, *args)
    cost = {i: flops.count(jax.grad(f, i), *args) - forward for i in (0, 1, 2, (0, 1))}
    assert cost[2] == 0, "of a bias no product"
    assert cost[0, 1] == cost[0] + cost[1], "no product of both is done twice"
    if form == "patches":
        assert cost[0] == cost[1] == forward
    elif form == "plain":
        assert max(cost.values()) <= 2 * forward


@pytest.mark.parametrize("form", ["Winograd"], indirect=True)
def test_winograd_gradients_do_fewer_products_than_the_plain_ones(form, monkeypatch):
    x, kernel = jnp.ones((1, 32, 32, 128)), jnp.ones((3, 3, 128, 128))
    plain = 2 * 32 * 32 * 9 * 128 * 128
    forward = flops.count(convolve, x, kernel)
    assert flops.count(jax.grad(curved(convolve), (0, 1)), x, kernel) < 3.1 * forward < 2.2 * plain


def test_a_gradient_meets_other_devices_outside_of_loops_alone(monkeypatch):
    monkeypatch.setattr(winograd, "pays", lambda *_, **__: True)
    monkeypatch.setattr(winograd, "SUMMED", 1)
    mesh = sharding.data_mesh(4)
    x = sharding.split_batch(random(4, 16, 16, 8), mesh)
    kernel = sharding.replicate(random(3, 3, 8, 128), mesh)
    compiled = jax.jit(jax.grad(curved(convolve), (0, 1))).lower(x, kernel).compile().as_text()
    inside, found = None, set()
    for line in compiled.splitlines():
        if line.endswith("{"):
            inside = line.split()[0]
        if "all-reduce(" in line:
            found.add(inside)
    assert found == {"ENTRY"}
