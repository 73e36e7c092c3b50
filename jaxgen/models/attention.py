"""Attention, exact and chunked, and the transformer blocks of the UNet."""

import math
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxgen.models.layers import Conv, Dense, repeat_rows
from jaxgen.models.norms import GroupNorm, LayerNorm
from jaxgen.types import Array, at_least_float32

WHOLE = 2**20  # scores of one head that are held at once; more are computed in blocks of queries
SCORES = 2**20  # and so many of them at a time
MIN_ROWS = 128  # queries of a block at least
KEPT = "weighted values"  # of a block, for its gradient, which would do that product again
SAFE = 30.0  # of a score: float32 holds the square of a sum of exp, which the gradient takes

FEATURES = 2**21  # of a feed-forward layer at a time, on a CPU
FEED_ROWS = 400  # tokens of such a block at least


def attend(q: Array, k: Array, v: Array, heads: int, causal: bool = False) -> Array:
    """Multi-head softmax attention, scale 1/sqrt(head width); softmax in float32 at least.

    Args:
        q: [B, T, C] queries; k, v: [B, S, C].
        heads: divides C.
        causal: a query sees keys up to its own position.

    Returns:
        [B, T, C].
    """
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)  # noqa: E731
    q, k, v = split(q), split(k), split(v)
    if _cudnn_runs(q):
        out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    elif q.shape[1] * k.shape[1] < WHOLE or causal:
        out = _attend_heads_first(q, k, v, causal)
    else:
        out = _attend_chunked(q, k, v)
    return out.reshape(*out.shape[:2], -1)


def _cudnn_runs(q: Array) -> bool:
    """cuDNN's fused kernel: half precision, from Ampere on (8.0), head width a multiple of 8.

    Widths go up to 128, on Hopper (9.0) to 256.
    """
    width = q.shape[-1]
    if jax.default_backend() != "gpu" or q.dtype not in (jnp.bfloat16, jnp.float16) or width % 8:
        return False
    capability = re.fullmatch(
        r"(\d+)\.\d+", str(getattr(jax.devices()[0], "compute_capability", ""))
    )
    version = int(capability[1]) if capability else 0  # AMD's are named otherwise
    return version >= 8 and width <= (256 if version >= 9 else 128)


def _attend_heads_first(q: Array, k: Array, v: Array, causal: bool = False) -> Array:
    """[B, T, N, D], [B, S, N, D] x2 -> [B, T, N, D], all scores at once."""
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    return _softmax_product(q, k, v, causal).transpose(0, 2, 1, 3)


def _softmax_product(
    q: Array, k: Array, v: Array, causal: bool = False, safe: Array | None = None
) -> Array:
    """[..., T, D], [..., S, D] x2 -> [..., T, D].

    Args:
        safe: [] of `_centre`, whether the largest score need not be looked for.
    """
    exact = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("...td,...sd->...ts", q, k, preferred_element_type=exact)
    if causal:
        scores = jnp.where(
            jnp.tri(scores.shape[-2], scores.shape[-1], dtype=bool), scores, -jnp.inf
        )
    largest = _largest(lax.stop_gradient(scores), safe)
    weights = jnp.exp((scores - largest) * (1 / math.sqrt(q.shape[-1])))
    # The division by the sum comes after the product with v: it is smaller by S / D.
    total = weights.sum(-1, keepdims=True)
    out = checkpoint_name(jnp.einsum("...ts,...sd->...td", weights.astype(v.dtype), v), KEPT)
    return (out / total).astype(v.dtype)


def _largest(scores: Array, safe: Array | None) -> Array:
    """[..., T, S] -> [..., T, 1], of each query; zeros where they are safe."""
    if safe is None:
        return scores.max(-1, keepdims=True)
    # A loop of no turn or one, since of a `cond` under vmap both sides are computed.
    _, largest = lax.while_loop(
        lambda state: ~state[0],
        lambda state: (jnp.ones_like(safe), scores.max(-1, keepdims=True)),
        (safe, jnp.zeros_like(scores[..., :1])),
    )
    return largest


def _centre(q: Array, k: Array, v: Array) -> tuple[Array, Array | None]:
    """Keys of the same attention, and whether exp of any score is safe as it is (None: not asked).

    Less their mean, keys give scores whose mean over the keys is zero for each query, which
    softmax does not see. The largest is then from 0 to |q| |k|: where that is SAFE, exp neither
    overflows nor loses what counts, and one of the passes over the scores is not needed.
    """
    if (
        jax.default_backend() != "cpu"
        or jax.device_count() > 1
        or min(k.dtype.itemsize, v.dtype.itemsize) < 4
    ):
        return k, None  # passes are fused there; a bound of the whole batch is one of all devices
    k = k - lax.stop_gradient(k.mean(-2, keepdims=True))
    longest = [jnp.sqrt(jnp.square(lax.stop_gradient(x)).sum(-1).max()) for x in (q, k)]
    return k, longest[0] * longest[1] <= SAFE * math.sqrt(q.shape[-1])


def _attend_chunked(q: Array, k: Array, v: Array) -> Array:
    """The same by blocks of queries, whose scores the gradient computes again: no T x S exists."""
    batch, length, heads, width = q.shape
    together = _together(batch, heads)
    rows = min(length, max(MIN_ROWS, SCORES // (k.shape[1] * together)))
    blocks = -(-length // rows)

    # Heads of all images at once are merged with the images' axis first: merged the other way, a
    # batch that is spread over devices would have to be gathered.
    one = together == batch * heads
    first = (0, 2, 1, 3) if one else (2, 0, 1, 3)

    def grouped(x: Array) -> Array:  # [B, T, N, D] -> [N * B / together, together, T, D]
        return x.transpose(first).reshape(-1, together, x.shape[1], width)

    def attend_group(group: tuple[Array, Array, Array]) -> Array:
        q, k, v = group
        keep = jax.checkpoint_policies.save_only_these_names(KEPT)
        k, safe = _centre(q, k, v)
        q = jnp.pad(q, ((0, 0), (0, blocks * rows - length), (0, 0)))
        q = jnp.moveaxis(q.reshape(together, blocks, rows, width), 1, 0)
        attended = jax.checkpoint(partial(_softmax_product, k=k, v=v, safe=safe), policy=keep)
        out = lax.map(attended, q)
        return jnp.moveaxis(out, 0, 1).reshape(together, blocks * rows, width)[:, :length]

    out = lax.map(attend_group, (grouped(q), grouped(k), grouped(v)))
    if one:
        return out.reshape(batch, heads, length, width).transpose(0, 2, 1, 3)
    return out.reshape(heads, batch, length, width).transpose(1, 2, 0, 3)


def _together(batch: int, heads: int) -> int:
    """Heads of images that are computed at once.

    On a CPU one at a time, so that a block's scores stay in the cache: three times as fast. A batch
    that may be spread over devices (where there are several, whether or not they are in use) is not
    looped over, since they would wait for each other.
    """
    if jax.default_backend() != "cpu":
        return batch * heads
    return 1 if jax.device_count() == 1 else batch


class SelfAttention(nn.Module):
    """Attention of an image's tokens among themselves.

    Attributes:
        heads: number of heads.
        bias: whether queries, keys and values have one (the VAE's do).
        upcast: compute scores in float32 (SD 2.1 overflows half precision without).
    """

    heads: int
    bias: bool = False
    upcast: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, C] -> [B, T, C]."""
        q, k, v = (
            Dense(x.shape[-1], use_bias=self.bias, name=name)(x)
            for name in ("to_q", "to_k", "to_v")
        )
        return _project_out(self, q, k, v)


class CrossAttention(nn.Module):
    """Attention from an image's tokens to the prompt's, whose keys and values are prepared.

    They do not depend on time, so `UNet.prepare` computes them once per image into the collection
    `cache`, under this module's own path. Only initialisation, which has no cache, makes them here.
    """

    heads: int
    context: int  # width of the prompt's tokens
    upcast: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, C] -> [R, T, C], R being B, or the rows of the prompts where they are more."""

        def shape_only(name: str) -> Array:
            nothing = jnp.zeros((x.shape[0], 1, self.context), x.dtype)
            return Dense(x.shape[-1], use_bias=False, name=name)(nothing)

        q = Dense(x.shape[-1], use_bias=False, name="to_q")(x)
        k = self.variable("cache", "k", shape_only, "to_k").value
        v = self.variable("cache", "v", shape_only, "to_v").value
        return _project_out(self, repeat_rows(q, len(k)), k, v)


def _project_out(self: SelfAttention | CrossAttention, q: Array, k: Array, v: Array) -> Array:
    if self.upcast:
        q, k = at_least_float32(q), at_least_float32(k)
    return Dense(q.shape[-1], name="to_out.0")(attend(q, k, v, self.heads))


class GEGLU(nn.Module):
    """The gated half of the feed-forward layer (Shazeer 2020), with the exact GELU."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, C] -> [B, T, features]."""
        h, gate = jnp.split(Dense(2 * self.features, name="proj")(x), 2, -1)
        return h * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """GEGLU of four times the width, and back."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, C] -> [B, T, C]."""
        batch, length, width = x.shape
        blocks = _feed_blocks(batch, length, width)
        if blocks == 1 or self.is_initializing():
            return self._feed(x)
        rows = -(-length // blocks)
        x = jnp.pad(x, ((0, 0), (0, blocks * rows - length), (0, 0)))
        x = jnp.moveaxis(x.reshape(batch, blocks, rows, width), 1, 0)
        # Of a block the backward pass keeps the products, and activates them once more.
        feed = nn.remat(
            lambda self, _, x: (None, self._feed(x)),
            prevent_cse=False,
            policy=jax.checkpoint_policies.dots_saveable,
        )
        share = {"variable_broadcast": "params", "split_rngs": {"params": False}}
        _, out = nn.scan(feed, **share)(self, None, x)
        return jnp.moveaxis(out, 0, 1).reshape(batch, blocks * rows, width)[:, :length]

    def _feed(self, x: Array) -> Array:
        width = x.shape[-1]
        return Dense(width, name="net.2")(GEGLU(4 * width, name="net.0")(x))


def _feed_blocks(batch: int, length: int, width: int) -> int:
    """Blocks of tokens for a CPU, so that a block's wide features stay in the cache."""
    if jax.default_backend() != "cpu":
        return 1
    tokens = batch * length
    return max(1, min(tokens * 8 * width // FEATURES, tokens // FEED_ROWS, length))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the prompt, feed-forward; each normed before and added after."""

    heads: int
    context: int
    upcast: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, C] -> [R, T, C], as in `CrossAttention`."""
        x = x + SelfAttention(self.heads, upcast=self.upcast, name="attn1")(
            LayerNorm(name="norm1")(x)
        )
        told = CrossAttention(self.heads, self.context, self.upcast, name="attn2")(
            LayerNorm(name="norm2")(x)
        )
        x = repeat_rows(x, len(told)) + told
        return x + FeedForward(name="ff")(LayerNorm(name="norm3")(x))


class Transformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, as a residual.

    Attributes:
        depth: number of blocks.
        linear: project in and out by matrices; otherwise by 1x1 convolutions, whose kernels have
            another rank in checkpoints and are the same mathematics.
    """

    depth: int
    heads: int
    context: int
    groups: int
    linear: bool
    upcast: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [R, H, W, C], as in `CrossAttention`."""
        batch, height, width, channels = x.shape

        def project(name: str) -> nn.Module:
            if self.linear:
                return Dense(channels, name=name)
            return Conv(channels, kernel=1, name=name)

        h = GroupNorm(self.groups, 1e-6, name="norm")(x)
        h = project("proj_in")(h).reshape(batch, height * width, channels)
        for i in range(self.depth):
            block = TransformerBlock(
                self.heads, self.context, self.upcast, name=f"transformer_blocks.{i}"
            )
            h = block(h)
        h = project("proj_out")(h.reshape(-1, *x.shape[1:]))
        return repeat_rows(x, len(h)) + h
