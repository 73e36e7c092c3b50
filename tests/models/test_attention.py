"""Attention and transformer blocks against PyTorch; chunks against the whole."""

import re
from types import SimpleNamespace

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from jaxgen import sharding, trees
from jaxgen.flops import count
from jaxgen.models import attention, unet
from tests.torch_oracle import error, nhwc, params_of, quick_jit, randomise

TOLERANCE = 1e-5


def qkv(length, keys, width, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = [(2, length, width), (2, keys, width), (2, keys, width)]
    return [jnp.asarray(scale * rng.normal(size=s), jnp.float32) for s in shapes]


def torch_attention(q, k, v, heads, causal):
    q, k, v = (
        torch.from_numpy(np.array(x)).unflatten(-1, (heads, -1)).transpose(1, 2).requires_grad_()
        for x in (q, k, v)
    )
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    weight = torch.arange(out.numel()).reshape(out.transpose(1, 2).shape).sin().transpose(1, 2)
    (out * weight).sum().backward()
    merge = lambda x: x.detach().transpose(1, 2).flatten(2)  # noqa: E731
    return merge(out), [merge(x.grad) for x in (q, k, v)]


def in_blocks(monkeypatch, rows):
    """Attention by blocks of so many queries, and in one piece for 0."""
    monkeypatch.setattr(attention, "WHOLE", 64 if rows else 1 << 30)
    monkeypatch.setattr(attention, "SCORES", 64)
    monkeypatch.setattr(attention, "MIN_ROWS", rows)


def value_and_gradients(f, *arrays):
    def weighed(*arrays):
        out = f(*arrays)
        return (out * jnp.sin(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    (_, out), grads = quick_jit(jax.value_and_grad(weighed, (0, 1, 2), has_aux=True))(*arrays)
    return out, grads


CHUNKS = [(16, 16), (37, 37), (33, 5), (5, 40), (32, 7)]


@pytest.mark.parametrize(("length", "keys"), CHUNKS)
@pytest.mark.parametrize(("rows", "together"), [(16, 1), (16, 2), (16, 6), (0, 0)])
def test_attention_matches_torch_in_value_and_gradient(length, keys, rows, together, monkeypatch):
    in_blocks(monkeypatch, rows)
    monkeypatch.setattr(attention, "_together", lambda batch, heads: together)
    arrays = qkv(length, keys, 24)
    out, grads = torch_attention(*arrays, heads=3, causal=False)
    actual, ours = value_and_gradients(lambda *a: attention.attend(*a, heads=3), *arrays)
    assert error(actual, out) < TOLERANCE
    for got, expected in zip(ours, grads, strict=True):
        assert error(got, expected) < TOLERANCE


@pytest.mark.parametrize("scale", [0.5, 8.0], ids=["safe", "looked for"])
def test_scores_too_large_for_exp_are_shifted_and_others_need_not_be(scale, monkeypatch):
    """Keys share a large part, as trained ones do: softmax does not see it, nor may the choice."""
    in_blocks(monkeypatch, 16)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    q, k, v = (x.astype(jnp.float32) for x in qkv(37, 40, 24, scale=scale))
    k = k + 4 * scale
    split = lambda x: x.reshape(2, -1, 3, 8)[:, :, 0]  # noqa: E731
    _, safe = attention._centre(split(q), split(k), split(v))
    assert bool(safe) == (scale < 1)

    # Scores of several hundred are rounded by 1e-5 themselves: no worse than in the usual form.
    out, grads = torch_attention(*(np.asarray(x, np.float64) for x in (q, k, v)), 3, False)
    attend = lambda *a: attention.attend(*a, heads=3)  # noqa: E731
    actual, ours = value_and_gradients(attend, q, k, v)
    with monkeypatch.context() as usually:
        usually.setattr(attention, "_centre", lambda q, k, v: (k, None))
        usual, slopes = value_and_gradients(lambda *a: attend(*a), q, k, v)
    for got, plain, expected in zip((actual, *ours), (usual, *slopes), (out, *grads), strict=True):
        assert error(got, expected) < 2 * error(plain, expected) + TOLERANCE

    mapped = jax.vmap(lambda *a: attention.attend(*a, heads=3))(
        *(jnp.stack([0.01 * x, x]) for x in (q, k, v))  # the first is safe in any case
    )
    small = attention.attend(*(0.01 * x for x in (q, k, v)), heads=3)
    assert error(mapped[0], small) < TOLERANCE
    assert error(mapped[1], actual) < TOLERANCE


def test_gradients_hold_up_to_the_bound_of_what_is_safe(monkeypatch):
    """Their sum of exp is squared on the way: queries along one key reach the bound itself."""
    in_blocks(monkeypatch, 16)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    q, k, v = qkv(20, 40, 8)
    k = k.at[:, 0].multiply(4.0)
    centred = k - k.mean(1, keepdims=True)
    q = jnp.broadcast_to(centred[:, :1], q.shape)
    highest = jnp.sqrt(jnp.square(q).sum(-1).max() * jnp.square(centred).sum(-1).max())
    q = q * (0.99 * attention.SAFE * 8**0.5 / highest)
    out, grads = torch_attention(*(np.asarray(x, np.float64) for x in (q, k, v)), 1, False)
    actual, ours = value_and_gradients(lambda *a: attention.attend(*a, heads=1), q, k, v)
    assert error(actual, out) < TOLERANCE
    # One key takes nearly all: what is left of the gradient is rounding in the usual form, too.
    monkeypatch.setattr(attention, "_centre", lambda q, k, v: (k, None))
    _, usual = value_and_gradients(lambda *a: attention.attend(*a, heads=1), q, k, v)
    for got, plain, expected in zip(ours, usual, grads, strict=True):
        assert error(got, expected) < 2 * error(plain, expected) + TOLERANCE


def test_half_values_are_never_weighed_by_what_they_cannot_hold(monkeypatch):
    in_blocks(monkeypatch, 16)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    q, k, v = qkv(20, 40, 8, scale=2.5)
    exact = attention.attend(q, k, v, heads=1)
    assert error(attention.attend(q, k, v.astype(jnp.float16), heads=1), exact) < 0.01


@pytest.mark.parametrize("length", [1, 77])
def test_causal_attention_matches_torch_in_value_and_gradient(length):
    arrays = qkv(length, length, 16)
    out, grads = torch_attention(*arrays, heads=2, causal=True)
    actual, ours = value_and_gradients(lambda *a: attention.attend(*a, 2, causal=True), *arrays)
    assert error(actual, out) < TOLERANCE
    for got, expected in zip(ours, grads, strict=True):
        assert float(np.abs(got - expected.numpy()).max()) < TOLERANCE


def test_long_attention_never_holds_all_scores(monkeypatch):
    in_blocks(monkeypatch, 16)
    q, k, v = qkv(160, 160, 8)

    def temp_bytes(f):
        loss = jax.value_and_grad(lambda *a: f(*a).sum(), (0, 1, 2))
        return jax.jit(loss).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    all_scores = 2 * 160 * 160 * 4  # [batch, T, S] of one head in float32
    assert temp_bytes(lambda *a: attention.attend(*a, heads=1)) < all_scores
    in_blocks(monkeypatch, 0)
    assert temp_bytes(lambda *a: attention.attend(*a, heads=1)) >= all_scores


@pytest.mark.parametrize("rows", [16, 0], ids=["chunked", "whole"])
def test_a_gradient_does_no_product_again_but_the_scores(rows, monkeypatch):
    in_blocks(monkeypatch, rows)
    arrays = qkv(160, 160, 8)

    def loss(*arrays):
        return jnp.sin(attention.attend(*arrays, heads=1)).sum()

    forward = count(loss, *arrays)
    assert forward == 2 * 2 * (2 * 160 * 160 * 8)  # two products of two images
    scores = forward // 2 if rows else 0
    assert count(jax.grad(loss, (0, 1, 2)), *arrays) == 3 * forward + scores


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_devices_with_a_part_of_the_batch_gather_nothing(backend, monkeypatch):
    in_blocks(monkeypatch, 16)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    mesh = sharding.data_mesh(4)
    arrays = [sharding.split_batch(jnp.ones((4, 40, 8)), mesh) for _ in range(3)]
    compiled = jax.jit(lambda *a: attention.attend(*a, heads=2)).lower(*arrays).compile().as_text()
    assert "while" in compiled
    assert not re.search("all-|collective", compiled)


@pytest.mark.parametrize("rows", [8, 0], ids=["chunked", "whole"])
def test_softmax_of_half_precision_is_in_float32(rows, monkeypatch):
    in_blocks(monkeypatch, rows)
    arrays = [x.astype(jnp.bfloat16) for x in qkv(20, 20, 8, scale=0.5)]
    jaxpr = jax.make_jaxpr(lambda *a: attention.attend(*a, heads=1))(*arrays)
    dtypes = {str(e.invars[0].aval.dtype) for e in equations(jaxpr.jaxpr) if is_softmax(e)}
    assert dtypes == {"float32"}
    exact = attention.attend(*(x.astype(jnp.float32) for x in arrays), heads=1)
    actual = attention.attend(*arrays, heads=1)
    assert actual.dtype == jnp.bfloat16
    assert error(actual.astype(jnp.float32), exact) < 0.01


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def is_softmax(equation):
    return equation.primitive.name in ("exp", "reduce_max", "reduce_sum", "div")


def test_large_scores_do_not_overflow():
    q, k, v = qkv(6, 6, 8, scale=100.0)
    out, _ = torch_attention(q, k, v, heads=1, causal=False)
    assert error(attention.attend(q, k, v, heads=1), out) < TOLERANCE


def test_feed_forward_matches_diffusers():
    theirs = randomise(FeedForward(16, activation_fn="geglu"))
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    actual = attention.FeedForward().apply({"params": params_of(theirs)}, x.numpy())
    assert error(actual, theirs(x).detach()) < TOLERANCE


def prepared(params, text):
    """Parameters and the prompt's keys and values, as `UNet.prepare` would make them."""
    return {"params": params, "cache": unet.keys_values(params, jnp.asarray(text))}


def test_transformer_block_matches_diffusers():
    theirs = randomise(
        BasicTransformerBlock(16, 2, 8, cross_attention_dim=12, activation_fn="geglu")
    )
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 9, 16, generator=generator), torch.randn(2, 5, 12, generator=generator)
    block = attention.TransformerBlock(heads=2, context=12)
    actual = quick_jit(block.apply)(prepared(params_of(theirs), text.numpy()), x.numpy())
    assert error(actual, theirs(x, encoder_hidden_states=text).detach()) < TOLERANCE


@pytest.mark.parametrize(
    ("depth", "linear", "upcast"), [(1, False, False), (2, True, True), (2, False, True)]
)
def test_transformer_matches_diffusers(depth, linear, upcast):
    theirs = randomise(
        Transformer2DModel(
            num_attention_heads=4,
            attention_head_dim=6,
            in_channels=24,
            num_layers=depth,
            norm_num_groups=8,
            cross_attention_dim=12,
            use_linear_projection=linear,
            upcast_attention=upcast,
        )
    )
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 24, 3, 5, generator=generator)
    text = torch.randn(2, 7, 12, generator=generator)
    block = attention.Transformer(depth, 4, 12, groups=8, linear=linear, upcast=upcast)
    actual = quick_jit(block.apply)(prepared(params_of(theirs), text.numpy()), nhwc(x))
    assert error(actual, nhwc(theirs(x, encoder_hidden_states=text).sample)) < TOLERANCE


@pytest.mark.parametrize("upcast", [False, True])
def test_scores_of_half_precision_are_float32(upcast):
    module = attention.SelfAttention(heads=2, upcast=upcast)
    x = jnp.zeros((1, 6, 8), jnp.bfloat16)
    params = trees.map_with_path(
        lambda _, p: p.astype(jnp.bfloat16), module.init(jax.random.key(0), x)["params"]
    )
    jaxpr = jax.make_jaxpr(lambda p, x: module.apply({"params": p}, x))(params, x)
    products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    scores = [e for e in products if e.outvars[0].aval.shape == (1, 2, 6, 6)]
    assert [str(e.invars[0].aval.dtype) for e in scores] == ["float32" if upcast else "bfloat16"]
    assert [str(e.outvars[0].aval.dtype) for e in scores] == ["float32"]
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("backend", "capability", "dtype", "width", "runs"),
    [
        ("cpu", None, "bfloat16", 64, False),
        ("gpu", "7.5", "bfloat16", 64, False),
        ("gpu", "8.0", "bfloat16", 64, True),
        ("gpu", "8.0", "bfloat16", 160, False),
        ("gpu", "9.0", "float16", 160, True),
        ("gpu", "10.0", "bfloat16", 160, True),
        ("gpu", "9.0", "bfloat16", 41, False),
        ("gpu", "9.0", "float32", 64, False),
        ("gpu", "gfx942", "bfloat16", 64, False),
        ("tpu", None, "bfloat16", 64, False),
    ],
)
def test_cudnn_is_chosen_where_it_runs(backend, capability, dtype, width, runs, monkeypatch):
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert attention._cudnn_runs(np.zeros((1, 2, 1, width), jnp.dtype(dtype))) == runs


@pytest.mark.parametrize("length", [12, 37])
def test_feed_forward_in_blocks_is_the_feed_forward(length, monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, length, 16)), jnp.float32)
    network = attention.FeedForward()
    params = network.init(jax.random.key(0), x)

    def slopes(params, x):
        return jax.value_and_grad(lambda p, x: jnp.sin(network.apply(p, x)).sum(), (0, 1))(
            params, x
        )

    whole = quick_jit(slopes)(params, x)
    monkeypatch.setattr(attention, "FEATURES", 8 * 16 * 10)
    monkeypatch.setattr(attention, "FEED_ROWS", 5)
    assert attention._feed_blocks(*x.shape) > 1
    blocks = jax.jit(lambda *a: slopes(*a))(params, x)
    for ours, theirs in zip(jax.tree.leaves(blocks), jax.tree.leaves(whole), strict=True):
        assert error(ours, theirs) < TOLERANCE
