"""ControlNet (Zhang et al. 2023): a copy of a UNet's first half makes residuals of a picture.

The hint's features do not depend on time and are made once; the copy runs at each step and adds to
every skip of the UNet, and to its middle, what a convolution that began at zero makes of its own.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen import config
from jaxgen.models.layers import Conv, EmbeddingMLP, sinusoids
from jaxgen.models.unet import added_waves, encode, keys_values
from jaxgen.models.unet_config import FIXED as UNET_FIXED
from jaxgen.models.unet_config import UNetConfig
from jaxgen.types import (
    Array,
    Cache,
    Inputs,
    Params,
    Point,
    Residuals,
    UserError,
    at_least_float32,
    full_precision,
)

HINT = "controlnet_cond_embedding"  # the hint's encoder in the parameters
_ABSENT = ("sample_size", "out_channels", "up_block_types", "time_cond_proj_dim")  # of the UNet's


@dataclass(frozen=True)
class ControlNetConfig:
    """The supported fields of a ControlNet's `config.json`: the encoder's, and four of its own."""

    encoder: UNetConfig = field(default_factory=UNetConfig)
    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False

    def __post_init__(self) -> None:
        order = self.controlnet_conditioning_channel_order
        if order not in ("rgb", "bgr"):
            raise UserError(f"controlnet_conditioning_channel_order = {order!r} is not rgb or bgr")
        if not self.conditioning_embedding_out_channels:
            raise UserError("conditioning_embedding_out_channels is empty")
        config.check_positive(self, "conditioning_channels", "conditioning_embedding_out_channels")

    @property
    def factor(self) -> int:
        """Pixels of the hint along a latent's side."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    @property
    def residuals(self) -> int:
        """How many it makes: one for each skip of the UNet, and one for its middle."""
        layers = self.encoder.per_level("layers_per_block")
        return 1 + sum(layers) + len(layers)

    @staticmethod
    def read(data: Mapping[str, Any], where: str) -> "ControlNetConfig":
        """From the object in a `config.json`; UserError for what is unknown or not supported."""
        names = [name for name in ControlNetConfig.__dataclass_fields__ if name != "encoder"]
        own = {name: data[name] for name in names if name in data}
        rest = {name: value for name, value in data.items() if name not in own}
        levels = len(rest.get("down_block_types", UNetConfig.down_block_types))
        rest["up_block_types"] = ("UpBlock2D",) * levels  # it has none, and they say nothing
        known = {**UNET_FIXED, **dict.fromkeys(names, ...)}  # that errors may suggest
        encoder = config.parse(UNetConfig, rest, known, where)
        return config.parse(ControlNetConfig, own | {"encoder": encoder}, {}, where)

    @staticmethod
    def of(unet: UNetConfig, factor: int) -> "ControlNetConfig":
        """Of a ControlNet for a UNet, with the released ones' encoder of hints.

        Args:
            factor: of the VAE, a power of two.
        """
        latent = unet.out_channels  # an inpainting UNet reads more, its ControlNet does not
        widths = (16, 32, 96, *(256,) * 8)[: factor.bit_length()]
        encoder = replace(unet, in_channels=latent, sample_size=None, time_cond_proj_dim=None)
        up = ("UpBlock2D",) * len(unet.block_out_channels)
        encoder = replace(encoder, out_channels=UNetConfig.out_channels, up_block_types=up)
        return ControlNetConfig(encoder, conditioning_embedding_out_channels=widths)

    def dump(self) -> dict[str, Any]:
        """The object of a `config.json`."""
        data = asdict(self)
        encoder = data.pop("encoder")
        kept = {name: value for name, value in encoder.items() if name not in _ABSENT}
        return {"_class_name": "ControlNetModel"} | kept | data


class HintEncoder(nn.Module):
    """Pixels to features of the latents' size, which do not depend on time."""

    features: int
    widths: tuple[int, ...]
    order: str = "rgb"

    @nn.compact
    def __call__(self, hint: Array) -> Array:
        """[B, H, W, C] in [0, 1] -> [B, h, w, features]."""
        hint = hint[..., ::-1] if self.order == "bgr" else hint
        x = nn.silu(Conv(self.widths[0], name="conv_in")(hint))
        for i, width in enumerate(self.widths[1:]):
            x = nn.silu(Conv(self.widths[i], name=f"blocks.{2 * i}")(x))
            x = nn.silu(Conv(width, stride=2, name=f"blocks.{2 * i + 1}")(x))
        return Conv(self.features, name="conv_out")(x)


class ControlNetModule(nn.Module):
    """The network itself; `ControlNet` below is how the rest of the house sees it."""

    config: ControlNetConfig
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Array, time: Array, features: Array, added: tuple[Array, ...] = ()
    ) -> Residuals:
        """[B, h, w, C] noisy, time [] or [B], features of the hint -> residuals, unscaled."""
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
        pixels = zeros(
            side * self.config.factor, side * self.config.factor, self.config.conditioning_channels
        )

        one, two = jax.random.split(key)
        hint = self._hint_encoder.init(one, pixels)["params"]
        features = zeros(side, side, cfg.block_out_channels[0])
        x = zeros(side, side, cfg.in_channels)
        rest = ControlNetModule(self.config).init(two, x, jnp.zeros(()), features, added)["params"]
        return {**rest, HINT: hint}

    @property
    def _hint_encoder(self) -> HintEncoder:
        cfg = self.config
        return HintEncoder(
            cfg.encoder.block_out_channels[0],
            cfg.conditioning_embedding_out_channels,
            cfg.controlnet_conditioning_channel_order,
        )

    def begun(self, params: Params, base: Params) -> Params:
        """Parameters to learn from: the base UNet's, and zeros where residuals end.

        Args:
            params: of `init`.
            base: of a UNet with this encoder.
        """
        hint = params[HINT]
        hint = {**hint, "conv_out": jax.tree.map(jnp.zeros_like, hint["conv_out"])}
        begun = {  # copies, since what learns is replaced in place
            name: jax.tree.map(jnp.copy if name in base else jnp.zeros_like, base.get(name, node))
            for name, node in params.items()
        }
        channels = (
            self.config.encoder.in_channels
        )  # of the latents alone, where the UNet reads more
        conv_in = {**begun["conv_in"], "kernel": begun["conv_in"]["kernel"][:, :, :channels]}
        return {**begun, "conv_in": conv_in, HINT: hint}

    @full_precision
    def prepare(self, params: Params, inputs: Inputs, hint: Array) -> Cache:
        """All that does not depend on time: the hint's features, keys and values of the text.

        Args:
            hint: [1, H, W, C] in [0, 1] for the whole batch, or one for each image, whose rows of
                the batch, under each condition, are side by side.
        """
        dtype = params["conv_in"]["kernel"].dtype
        features = self._hint_encoder.apply({"params": params[HINT]}, hint.astype(dtype))
        rows = inputs.text.shape[0]
        if len(features) > 1:
            features = jnp.repeat(features, rows // len(features), 0)
        cache: Cache = {"features": features}
        cache["text"] = keys_values(params, inputs.text.astype(dtype))
        cache["added"] = added_waves(self.config.encoder, inputs, dtype)
        return cache

    @full_precision
    def apply(self, params: Params, x: Array, point: Point, cache: Cache) -> Residuals:
        """Residuals for noisy latents [B, h, w, C] of unit variance, in float32 at least."""
        dtype = params["conv_in"]["kernel"].dtype
        out = ControlNetModule(self.config, self.remat).apply(
            {"params": {k: v for k, v in params.items() if k != HINT}, "cache": cache["text"]},
            x.astype(dtype),
            point.time,
            cache["features"],
            cache["added"],
        )
        out = out._replace(skips=()) if self.middle_only else out
        return jax.tree.map(at_least_float32, out)
