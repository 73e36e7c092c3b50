"""ControlNet (Zhang et al. 2023): a copy of a UNet's first half makes residuals of a picture.

The hint's features do not depend on time and are made once; the copy runs at each step and adds to
every skip of the UNet, and to its middle, what a convolution that began at zero makes of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen import trees
from jaxgen.models.controlnet_config import ControlNetConfig
from jaxgen.models.layers import Conv, EmbeddingMLP, repeat_rows, sinusoids
from jaxgen.models.unet import added_waves, at_conditions, encode, keys_values
from jaxgen.sharding import pin
from jaxgen.types import (
    Array,
    Cache,
    Inputs,
    Params,
    Point,
    Residuals,
    at_least_float32,
    full_precision,
)

HINT = "controlnet_cond_embedding"  # the hint's encoder in the parameters


class HintEncoder(nn.Module):
    """Pixels to features of the latents' size, which do not depend on time."""

    features: int
    widths: tuple[int, ...]
    order: str = "rgb"

    @nn.compact
    def __call__(self, hint: Array) -> Array:
        """[B, H, W, C] in [0, 1] -> [B, h, w, features]."""
        hint = hint[..., ::-1] if self.order == "bgr" else hint
        x = pin(nn.silu(Conv(self.widths[0], name="conv_in")(hint)))
        for i, width in enumerate(self.widths[1:]):
            x = pin(nn.silu(Conv(self.widths[i], name=f"blocks.{2 * i}")(x)))
            x = pin(nn.silu(Conv(width, stride=2, name=f"blocks.{2 * i + 1}")(x)))
        return Conv(self.features, name="conv_out")(x)


class ControlNetModule(nn.Module):
    """The network itself; `ControlNet` below is how the rest of the house sees it."""

    config: ControlNetConfig
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Array, time: Array, features: Array, added: tuple[Array, ...] = ()
    ) -> Residuals:
        """[B, h, w, C] noisy, time [] or [B], features of the hint -> residuals of R rows."""
        cfg = self.config.encoder
        width = cfg.block_out_channels[0]
        time = jnp.broadcast_to(jnp.asarray(time), x.shape[:1])
        waves = sinusoids(time, width, cfg.freq_shift, cfg.flip_sin_to_cos).astype(x.dtype)
        temb = EmbeddingMLP(4 * width, name="time_embedding")(waves, ())
        if cfg.addition_embed_type:
            temb = temb + EmbeddingMLP(4 * width, name="add_embedding")(*added)
        x = Conv(width, name="conv_in")(x) + features
        middle, skips = encode(cfg, x, temb, self.remat)
        names = [f"controlnet_down_blocks.{i}" for i in range(len(skips))]
        out = [
            Conv(y.shape[-1], kernel=1, name=name)(y)
            for y, name in zip((*skips, middle), (*names, "controlnet_mid_block"))
        ]
        if self.config.global_pool_conditions:
            out = [y.mean((1, 2), keepdims=True) for y in out]
        return Residuals(out[-1], tuple(out[:-1]))


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet as functions over a plain parameter tree.

    Attributes:
        remat: whether a backward pass computes each block again instead of keeping its inside.
        middle_only: whether residuals are of the middle alone; the skips' do not run.
    """

    config: ControlNetConfig
    remat: bool = False
    middle_only: bool = False

    @staticmethod
    def read(data: Mapping[str, Any], where: str) -> "ControlNet":
        """From the object in a `config.json`; UserError for what is unknown or not supported."""
        return ControlNet(ControlNetConfig.read(data, where))

    def init(self, key: Array) -> Params:
        """Fresh parameters, float32, all of them random."""
        cfg = self.config.encoder
        side = 2 ** (len(cfg.block_out_channels) - 1)
        zeros = lambda *shape: jnp.zeros((1, *shape))  # noqa: E731
        width = cfg.projection_class_embeddings_input_dim
        added = (zeros(width),) if cfg.addition_embed_type and width else ()
        one, two = jax.random.split(key)
        features = zeros(side, side, cfg.block_out_channels[0])
        x = zeros(side, side, cfg.in_channels)
        rest = ControlNetModule(self.config).init(two, x, jnp.zeros(()), features, added)["params"]
        return {**rest, HINT: self._init_hint(one)}

    def _init_hint(self, key: Array) -> Params:
        pixels = jnp.zeros((1, *[8 * self.config.factor] * 2, self.config.conditioning_channels))
        return self._hint_encoder.init(key, pixels)["params"]

    @property
    def _hint_encoder(self) -> HintEncoder:
        cfg = self.config
        kind = nn.remat(HintEncoder) if self.remat else HintEncoder
        return kind(
            cfg.encoder.block_out_channels[0],
            cfg.conditioning_embedding_out_channels,
            cfg.controlnet_conditioning_channel_order,
        )

    def begun(self, key: Array, base: Params) -> Params:
        """Parameters to learn from: the base's, zeros where residuals end, a fresh hint encoder.

        Args:
            base: of a UNet with this encoder.
        """
        hint = self._init_hint(key)
        hint = {**hint, "conv_out": jax.tree.map(jnp.zeros_like, hint["conv_out"])}
        begun: Params = {HINT: hint}
        for name, node in trees.shapes(self.init).items():
            if name in base:  # copies, since what learns is replaced in place
                begun[name] = jax.tree.map(jnp.copy, base[name])
            elif name != HINT:
                begun[name] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), node)
        # Of an inpainting UNet, which reads more, the kernel of the latents alone.
        kernel = begun["conv_in"]["kernel"][:, :, : self.config.encoder.in_channels]
        return {**begun, "conv_in": {**begun["conv_in"], "kernel": kernel}}

    @full_precision
    def prepare(self, params: Params, inputs: Inputs, hint: Array) -> Cache:
        """All that does not depend on time: the hint's features, keys and values of the text.

        Args:
            hint: [1, H, W, C] in [0, 1] for the whole batch, or one for each image.
        """
        dtype = params["conv_in"]["kernel"].dtype
        features = self._hint_encoder.apply({"params": params[HINT]}, hint.astype(dtype))
        cache: Cache = {"features": features}
        cache["text"] = keys_values(params, inputs.text.astype(dtype))
        cache["added"] = added_waves(self.config.encoder, inputs, dtype)
        return cache

    @full_precision
    def apply(self, params: Params, x: Array, point: Point, cache: Cache) -> Residuals:
        """Residuals for noisy latents [B, h, w, C] of unit variance, in float32 at least.

        They have as many rows as the prompts, like the prediction of `UNet.apply`.
        """
        dtype = params["conv_in"]["kernel"].dtype
        x, time = at_conditions(x, point.time, cache["added"])
        features = cache["features"]
        out = ControlNetModule(self.config, self.remat).apply(
            {"params": {k: v for k, v in params.items() if k != HINT}, "cache": cache["text"]},
            x.astype(dtype),
            time,
            features if len(features) == 1 else repeat_rows(features, len(x)),
            cache["added"],
        )
        out = out._replace(skips=()) if self.middle_only else out
        return jax.tree.map(at_least_float32, out)
