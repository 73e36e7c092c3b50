"""The autoencoder of Stable Diffusion: pixels to latents and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxgen import config
from jaxgen.models.attention import SelfAttention
from jaxgen.models.layers import Conv, Downsample, ResBlock, Upsample
from jaxgen.models.norms import GroupNorm
from jaxgen.types import Array, Params, UserError, at_least_float32, full_precision

EPSILON = 1e-6  # of every GroupNorm in the VAE


@dataclass(frozen=True)
class VAEConfig:
    """The supported fields of a diffusers `vae/config.json`, with diffusers' defaults."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    force_upcast: bool = True  # for diffusers in half precision; here `--dtype` decides

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
            types = getattr(self, f"{name}_block_types")
            if types != (kind,) * levels:
                raise UserError(f"{name}_block_types = {types} is not {levels} times {kind}")
        if not levels:
            raise UserError("block_out_channels is empty")
        numbers = ("block_out_channels", "in_channels", "out_channels", "layers_per_block")
        config.check_positive(
            self, *numbers, "latent_channels", "norm_num_groups", "scaling_factor"
        )
        config.check_size(self)
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise UserError(f"{self.norm_num_groups} norm_num_groups do not divide {width}")

    @property
    def factor(self) -> int:
        """Pixels along a latent's side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def tile(self) -> int:
        """Side of a tile, in latents, where large images are decoded in tiles; as in diffusers.

        A multiple of 4, of which a quarter overlaps: another size is rounded down, which is not so
        there.
        """
        size = self.sample_size if isinstance(self.sample_size, int) else self.sample_size[0]
        return max(size // self.factor // 4, 1) * 4


FIXED: Mapping[str, Any] = {
    "act_fn": config.AnyOf(("silu", "swish")),
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}


def _resblock(features: int, groups: int, name: str, remat: bool) -> ResBlock:
    kind = nn.remat(ResBlock) if remat else ResBlock
    return kind(features, groups, EPSILON, name=name)


class MidBlock(nn.Module):
    """Residual, single-head attention over all pixels, residual."""

    config: VAEConfig
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        channels, groups = x.shape[-1], self.config.norm_num_groups
        x = _resblock(channels, groups, "resnets.0", self.remat)(x)
        if self.config.mid_block_add_attention:
            kind = nn.remat(PixelAttention) if self.remat else PixelAttention
            x = x + kind(groups=groups, name="attentions.0")(x)
        return _resblock(channels, groups, "resnets.1", self.remat)(x)


class PixelAttention(SelfAttention):
    """Self-attention with a norm of its own, over the pixels of a feature map."""

    heads: int = 1
    bias: bool = True
    groups: int = 32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        h = GroupNorm(self.groups, EPSILON, name="group_norm")(x)
        return super().__call__(h.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape)


class Level(nn.Module):
    """Residual blocks of one width, then a halving, a doubling or neither."""

    features: int
    layers: int
    groups: int
    resize: str = ""  # "", "down" or "up"
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H', W', features]."""
        for i in range(self.layers):
            x = _resblock(self.features, self.groups, f"resnets.{i}", self.remat)(x)
        if self.resize == "down":
            # Padded right and below only, unlike the UNet.
            x = Downsample(self.features, ((0, 1), (0, 1)), name="downsamplers.0")(x)
        elif self.resize == "up":
            x = Upsample(self.features, name="upsamplers.0")(x, 2 * x.shape[1], 2 * x.shape[2])
        return x


class Encoder(nn.Module):
    """Pixels to the moments of the posterior."""

    config: VAEConfig
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, 3] -> [B, H/f, W/f, 2 * latent_channels]."""
        cfg, layers = self.config, self.config.layers_per_block
        widths, groups = cfg.block_out_channels, cfg.norm_num_groups
        x = Conv(widths[0], name="conv_in")(x)
        for i, width in enumerate(widths):
            resize = "down" if i < len(widths) - 1 else ""
            x = Level(width, layers, groups, resize, self.remat, name=f"down_blocks.{i}")(x)
        x = MidBlock(cfg, self.remat, name="mid_block")(x)
        norm = GroupNorm(groups, EPSILON, name="conv_norm_out").affine(x)
        return Conv(2 * cfg.latent_channels, name="conv_out")(x, norm)


class Decoder(nn.Module):
    """Latents to pixels."""

    config: VAEConfig
    remat: bool = False

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """[B, h, w, latent_channels] -> [B, f h, f w, 3]."""
        cfg, layers = self.config, self.config.layers_per_block + 1
        widths, groups = cfg.block_out_channels[::-1], cfg.norm_num_groups
        x = MidBlock(cfg, self.remat, name="mid_block")(Conv(widths[0], name="conv_in")(z))
        for i, width in enumerate(widths):
            resize = "up" if i < len(widths) - 1 else ""
            x = Level(width, layers, groups, resize, self.remat, name=f"up_blocks.{i}")(x)
        norm = GroupNorm(groups, EPSILON, name="conv_norm_out").affine(x)
        return Conv(cfg.out_channels, name="conv_out")(x, norm)


class VAEModule(nn.Module):
    """Both halves under one parameter tree."""

    config: VAEConfig
    remat: bool = False

    def setup(self) -> None:
        """Names as in checkpoints."""
        cfg = self.config
        self.encoder, self.decoder = Encoder(cfg, self.remat), Decoder(cfg, self.remat)
        if cfg.use_quant_conv:
            self.quant_conv = Conv(2 * cfg.latent_channels, kernel=1)
        if cfg.use_post_quant_conv:
            self.post_quant_conv = Conv(cfg.latent_channels, kernel=1)

    def encode(self, x: Array) -> Array:
        """[B, H, W, 3] -> mean and log-variance, [B, H/f, W/f, 2 * latent_channels]."""
        moments = self.encoder(x)
        return self.quant_conv(moments) if self.config.use_quant_conv else moments

    def decode(self, z: Array) -> Array:
        """[B, h, w, latent_channels] -> [B, f h, f w, 3]."""
        return self.decoder(self.post_quant_conv(z) if self.config.use_post_quant_conv else z)

    def __call__(self, x: Array) -> Array:
        """Both, for initialisation."""
        return self.decode(jnp.split(self.encode(x), 2, -1)[0])


@dataclass(frozen=True)
class VAE:
    """An autoencoder as functions over a plain parameter tree. Latents are scaled for the UNet."""

    config: VAEConfig
    remat: bool = False

    @staticmethod
    def read(data: Mapping[str, Any], where: str) -> "VAE":
        """From the object in a `config.json`; UserError for what is unknown or not supported."""
        return VAE(config.parse(VAEConfig, data, FIXED, where))

    def init(self, key: Array) -> Params:
        """Fresh parameters, float32."""
        side = self.config.factor
        x = jnp.zeros((1, side, side, self.config.in_channels))
        return VAEModule(self.config).init(key, x)["params"]

    @full_precision
    def posterior(self, params: Params, images: Array) -> tuple[Array, Array]:
        """[B, H, W, 3] in [-1, 1] -> mean and standard deviation, [B, H/f, W/f, C], unscaled."""
        images = images.astype(params["encoder"]["conv_in"]["kernel"].dtype)
        module = VAEModule(self.config, self.remat)
        moments = module.apply({"params": params}, images, method="encode")
        mean, logvar = jnp.split(at_least_float32(moments), 2, -1)
        return mean, jnp.exp(0.5 * jnp.clip(logvar, -30, 20))

    def encode(self, params: Params, images: Array, noise: Array | float = 0.0) -> Array:
        """[B, H, W, 3] in [-1, 1] -> latents [B, H/f, W/f, C]; the posterior mean unless noised."""
        mean, std = self.posterior(params, images)
        return self.config.scaling_factor * (mean + std * noise)

    @full_precision
    def decode(self, params: Params, latents: Array) -> Array:
        """[B, h, w, C] latents -> images [B, f h, f w, 3], about [-1, 1]."""
        z = (latents / self.config.scaling_factor).astype(
            params["decoder"]["conv_in"]["kernel"].dtype
        )
        module = VAEModule(self.config, self.remat)
        return at_least_float32(module.apply({"params": params}, z, method="decode"))
