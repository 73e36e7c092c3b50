"""The counter of operations against closed forms."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import linear_call
from jax.sharding import PartitionSpec

from jaxgen import flops, sharding
from jaxgen.models import layers

X, W = jnp.ones((8, 16)), jnp.ones((16, 16))
ONCE = 2 * 8 * 16 * 16
NHWC = ("NHWC", "HWIO", "NHWC")


def product(x, w):
    return x @ w


def convolve(x, kernel, stride=1, groups=1):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=NHWC,
        feature_group_count=groups,
    )  # fmt: skip


def slope(f, arguments=(0, 1)):
    """The value and the gradient of a function whose value needs its result."""
    return jax.value_and_grad(lambda *args: jnp.sum(jnp.square(f(*args))), arguments)


@jax.custom_jvp
def by_jvp(x, w):
    return x @ w


@by_jvp.defjvp
def _jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return by_jvp(x, w), dx @ w + x @ dw


@jax.custom_vjp
def by_vjp(x, w):
    return x @ w


by_vjp.defvjp(lambda x, w: (by_vjp(x, w), (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def linear(x, w):
    return linear_call(lambda w, x: x @ w, lambda w, g: g @ w.T, w, x)


def test_a_product_inside_a_loop_counts_as_often_as_it_runs():
    def ten(x, w):
        return lax.scan(lambda h, _: (h @ w, None), x, None, length=10)[0]

    def five(x, w):
        return lax.fori_loop(0, 5, lambda _, h: h @ w, x)

    assert flops.count(ten, X, W) == 10 * ONCE
    assert flops.count(slope(ten), X, W) == 3 * 10 * ONCE
    assert flops.count(five, X, W) == 5 * ONCE
    assert flops.count(lambda x, w: lax.map(lambda y: five(y, w), x), jnp.ones((3, 8, 16)), W) == (
        3 * 5 * ONCE
    )


def test_a_loop_of_unknown_trips_counts_once():
    def some(x, w, n):
        return lax.fori_loop(0, n, lambda _, h: h @ w, x)

    assert flops.count(some, X, W, 3) == ONCE


def test_of_branches_the_longest_counts():
    def branch(x, w):
        return lax.switch(x[0, 0].astype(int), [jnp.sin, lambda h: h @ w @ w, lambda h: h @ w], x)

    assert flops.count(branch, X, W) == 2 * ONCE


@pytest.mark.parametrize(
    "f", [jax.jit(jax.jit(product)), by_jvp, by_vjp], ids=["jit", "custom_jvp", "custom_vjp"]
)
def test_what_wraps_a_product_counts_it_once(f):
    assert flops.count(f, X, W) == ONCE
    assert flops.count(slope(f), X, W) == 3 * ONCE
    assert flops.count(jax.jit(slope(f)), X, W) == 3 * ONCE


def test_a_linear_call_counts_one_of_its_two_directions():
    assert flops.count(linear, X, W) == ONCE
    assert flops.count(slope(linear, 0), X, W) == 2 * ONCE


def test_what_is_computed_again_counts_again():
    def twice(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w)

    assert flops.count(slope(twice), X, W) == 6 * ONCE
    assert flops.count(slope(jax.checkpoint(twice)), X, W) == 8 * ONCE


def test_what_each_device_does_counts_for_all_of_them():
    mesh = sharding.training_mesh(data=4, fsdp=2)
    rows, whole = PartitionSpec(("data", "fsdp")), PartitionSpec()
    f = jax.shard_map(product, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    assert flops.count(f, X, W) == ONCE
    assert flops.count(jax.jit(slope(f)), X, W) == 3 * ONCE
    # Manual over one axis alone, the other is the compiler's: shapes are those of its devices.
    f = jax.shard_map(
        product, mesh=mesh, in_specs=(PartitionSpec("data"), whole),
        out_specs=PartitionSpec("data"), axis_names={"data"},
    )  # fmt: skip
    assert flops.count(f, X, W) == ONCE


@pytest.mark.parametrize("size", [5, 6, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_counts_its_products_and_its_gradient_as_many_each(size, stride, groups):
    x, kernel = jnp.ones((2, size, size, 4)), jnp.ones((3, 3, 4 // groups, 6))
    written = len(range(0, size, stride)) ** 2
    once = 2 * 2 * written * 9 * (4 // groups) * 6

    def f(x, kernel):
        return convolve(x, kernel, stride, groups)

    assert flops.count(f, x, kernel) == once
    assert flops.count(slope(f), x, kernel) == 3 * once


def test_a_batch_of_products_counts_each():
    q, k = jnp.ones((2, 3, 7, 4)), jnp.ones((2, 3, 5, 4))
    scores = lambda q, k: jnp.einsum("bntd,bnsd->bnts", q, k)  # noqa: E731
    assert flops.count(scores, q, k) == 2 * 2 * 3 * 7 * 5 * 4
    assert flops.count(slope(scores), q, k) == 3 * 2 * 2 * 3 * 7 * 5 * 4


def test_a_training_step_costs_three_forwards_less_the_gradient_of_the_image():
    """Convolution, strided convolution, a layer scanned twice, a head: as a network is trained."""
    params = {
        "in": jnp.ones((3, 3, 3, 8)),
        "down": jnp.ones((3, 3, 8, 16)),
        "deep": jnp.ones((2, 16, 16)),
        "head": jnp.ones((16, 10)),
    }
    image = jnp.ones((4, 12, 12, 3))
    first = 2 * 4 * 12 * 12 * 9 * 3 * 8
    forward = first + 2 * 4 * 6 * 6 * 9 * 8 * 16 + 2 * 2 * 4 * 36 * 16 * 16 + 2 * 4 * 16 * 10

    @jax.jit
    def loss(params, image):
        h = jax.nn.silu(convolve(image, params["in"]))
        h = jax.nn.silu(convolve(h, params["down"], stride=2)).reshape(4, 36, 16)
        h = lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), h, params["deep"])[0]
        return jnp.mean(jnp.square(h.mean(1) @ params["head"]))

    assert flops.count(loss, params, image) == forward
    assert flops.count(jax.value_and_grad(loss), params, image) == 3 * forward - first


def test_winograd_and_its_gradients_count_their_own_products():
    x, kernel = jnp.ones((1, 32, 32, 128)), jnp.ones((3, 3, 128, 128))
    products = 2 * 36 * 8 * 8 * 128 * 128  # of 6 x 6 points for each 4 x 4 tile
    matrices = 2 * 36 * 36 * (8 * 8 * 128 + 128 * 128) + 2 * 16 * 36 * 8 * 8 * 128
    assert products < flops.count(layers.convolve, x, kernel) < products + 2 * matrices
    both = flops.count(slope(layers.convolve), x, kernel)
    assert 3 * products < both < 3 * (products + 2 * matrices)


def test_the_fused_attention_of_gpus_counts_its_products(monkeypatch):
    """Traced alone, which needs no GPU once its library is said to be there."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda _: False)
    q, k = (jax.ShapeDtypeStruct((2, n, 3, 64), jnp.bfloat16) for n in (128, 256))
    attend = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn")  # noqa: E731
    product = 2 * 2 * 3 * 128 * 256 * 64
    assert flops.count(attend, q, k, k) == 2 * product
    assert flops.count(slope(attend, (0, 1, 2)), q, k, k) == 7 * product


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v2", 23),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peaks_are_known_by_the_names_of_devices(kind, tera):
    found = flops.peak(SimpleNamespace(device_kind=kind))
    assert found == (tera and pytest.approx(tera * 1e12))


def test_of_the_processor_in_use_the_peak_is_not_known():
    assert flops.peak(jax.devices("cpu")[0]) is None
    assert np.isfinite(list(flops._PEAKS.values())).all()
