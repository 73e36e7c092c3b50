"""The UNet of Stable Diffusion 1.x, 2.x, inpainting, instruction editing and SDXL.

One class serves them all: what differs is in the checkpoint's own `config.json`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxgen import config
from jaxgen.models.attention import Transformer
from jaxgen.models.layers import (
    Conv,
    Downsample,
    EmbeddingMLP,
    ResBlock,
    Upsample,
    linear,
    repeat_rows,
    sinusoids,
)
from jaxgen.models.norms import GroupNorm
from jaxgen.models.unet_config import FIXED, UNetConfig
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


def _transformer(cfg: UNetConfig, level: int, channels: int, name: str, remat: bool) -> Transformer:
    kind = nn.remat(Transformer) if remat else Transformer
    return kind(
        depth=cfg.per_level("transformer_layers_per_block")[level],
        heads=cfg.heads[level],
        context=cfg.cross_attention_dim,
        groups=cfg.norm_num_groups,
        linear=cfg.use_linear_projection,
        upcast=bool(cfg.upcast_attention),
        name=name,
    )


def _resblock(cfg: UNetConfig, level: int, name: str, remat: bool) -> ResBlock:
    kind = nn.remat(ResBlock) if remat else ResBlock
    return kind(cfg.block_out_channels[level], cfg.norm_num_groups, cfg.norm_eps, name=name)


class DownBlock(nn.Module):
    """One level on the way down: residual blocks, transformers, a halving unless it is the last."""

    config: UNetConfig
    level: int
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, temb: Array) -> list[Array]:
        """[B, H, W, C], [B, E] -> the feature map after each step, of R rows from attention on."""
        cfg, level = self.config, self.level
        skips = []
        for i in range(cfg.per_level("layers_per_block")[level]):
            x = pin(_resblock(cfg, level, f"resnets.{i}", self.remat)(x, temb))
            if cfg.down_block_types[level].startswith("CrossAttn"):
                x = pin(_transformer(cfg, level, x.shape[-1], f"attentions.{i}", self.remat)(x))
            skips.append(x)
        if level < len(cfg.block_out_channels) - 1:
            skips.append(Downsample(x.shape[-1], name="downsamplers.0")(x))
        return skips


class MidBlock(nn.Module):
    """The bottom of the UNet: residual, transformer, residual."""

    config: UNetConfig
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, temb: Array) -> Array:
        """[B, H, W, C], [B, E] -> [R, H, W, C]."""
        x = pin(_resblock(self.config, -1, "resnets.0", self.remat)(x, temb))
        x = pin(_transformer(self.config, -1, x.shape[-1], "attentions.0", self.remat)(x))
        return _resblock(self.config, -1, "resnets.1", self.remat)(x, temb)


class UpBlock(nn.Module):
    """One level on the way up, `level` counted from the bottom."""

    config: UNetConfig
    level: int
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Array, skips: Sequence[Array], temb: Array, size: tuple[int, int]
    ) -> Array:
        """[R, H, W, C], skips in the order of use, [B, E] -> [R, *size, C'].

        `size` is that of the skip met next: sides not divisible by a power of two come out right.
        """
        cfg = self.config
        mirrored = len(cfg.block_out_channels) - 1 - self.level
        for i, skip in enumerate(skips):
            x = jnp.concatenate([x, skip], -1)
            x = pin(_resblock(cfg, mirrored, f"resnets.{i}", self.remat)(x, temb))
            if cfg.up_block_types[self.level].startswith("CrossAttn"):
                x = pin(_transformer(cfg, mirrored, x.shape[-1], f"attentions.{i}", self.remat)(x))
        if mirrored > 0:
            x = Upsample(x.shape[-1], name="upsamplers.0")(x, *size)
        return x


def encode(
    cfg: UNetConfig, x: Array, temb: Array, remat: bool = False
) -> tuple[Array, list[Array]]:
    """The half that a ControlNet copies; makes its modules in the caller's scope.

    Args:
        x: [B, H, W, C] after `conv_in`; what the prompts do not change is computed for these B
            rows, and all that follows for the prompts' R.
        temb: [B, E].
        remat: whether the backward pass computes each block again instead of keeping its inside.

    Returns:
        The middle block's output, and the skips, first to last, each of R rows.
    """
    skips = [x]
    for level in range(len(cfg.block_out_channels)):
        skips += DownBlock(cfg, level, remat, name=f"down_blocks.{level}")(skips[-1], temb)
    middle = MidBlock(cfg, remat, name="mid_block")(skips[-1], temb)
    return middle, [repeat_rows(skip, len(middle)) for skip in skips]


class UNetModule(nn.Module):
    """The network itself; `UNet` below is how the rest of the house sees it."""

    config: UNetConfig
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        time: Array,
        added: tuple[Array, ...] = (),
        guidance: tuple[Array, ...] = (),
        residuals: Sequence[Residuals] = (),
    ) -> Array:
        """[B, H, W, in_channels] noisy, time [] or [B] -> [R, H, W, out_channels].

        Args:
            added: SDXL's pooled text and sizes, [B, projection_class_embeddings_input_dim].
            guidance: distilled UNets' embedding of the guidance scale, [B, time_cond_proj_dim].
            residuals: of ControlNets; they add up.
        """
        cfg = self.config
        width = cfg.block_out_channels[0]
        time = jnp.broadcast_to(jnp.asarray(time), x.shape[:1])
        waves = sinusoids(time, width, cfg.freq_shift, cfg.flip_sin_to_cos).astype(x.dtype)
        embed = EmbeddingMLP(4 * width, cfg.time_cond_proj_dim or 0, name="time_embedding")
        temb = embed(waves, guidance)
        if cfg.addition_embed_type:
            temb = temb + EmbeddingMLP(4 * width, name="add_embedding")(*added)

        x, skips = encode(cfg, Conv(width, name="conv_in")(x), temb, self.remat)
        for more in residuals:
            x = x + more.middle.astype(x.dtype)
            if more.skips:
                skips = [s + y.astype(x.dtype) for s, y in zip(skips, more.skips, strict=True)]
        for level, layers in enumerate(reversed(cfg.per_level("layers_per_block"))):
            used, skips = skips[: -layers - 2 : -1], skips[: -layers - 1]
            size = skips[-1].shape[1:3] if skips else x.shape[1:3]
            x = UpBlock(cfg, level, self.remat, name=f"up_blocks.{level}")(x, used, temb, size)

        norm = GroupNorm(cfg.norm_num_groups, cfg.norm_eps, name="conv_norm_out").affine(x)
        return Conv(cfg.out_channels, name="conv_out")(x, norm)


@dataclass(frozen=True)
class UNet:
    """A denoising network as functions over a plain parameter tree.

    Attributes:
        remat: whether a backward pass computes each block again instead of keeping its inside.
    """

    config: UNetConfig
    remat: bool = False

    @staticmethod
    def read(data: Mapping[str, Any], where: str) -> "UNet":
        """From the object in a `config.json`; UserError for what is unknown or not supported."""
        return UNet(config.parse(UNetConfig, data, FIXED, where))

    def init(self, key: Array) -> Params:
        """Fresh parameters, float32."""
        cfg = self.config
        side = 2 ** (len(cfg.block_out_channels) - 1)
        zeros = lambda *shape: jnp.zeros((1, *shape))  # noqa: E731
        added = (
            (zeros(cfg.projection_class_embeddings_input_dim),) if cfg.addition_embed_type else ()
        )
        guidance = (zeros(cfg.time_cond_proj_dim),) if cfg.time_cond_proj_dim else ()
        x = zeros(side, side, cfg.in_channels)
        return UNetModule(cfg).init(key, x, jnp.zeros(()), added, guidance)["params"]

    @full_precision
    def prepare(self, params: Params, inputs: Inputs) -> Cache:
        """All that does not depend on time: keys and values of the text, fixed embeddings."""
        cfg = self.config
        dtype = params["conv_in"]["kernel"].dtype
        cache: Cache = {"text": keys_values(params, inputs.text.astype(dtype))}
        cache["concat"] = inputs.concat
        cache["added"], cache["guidance"] = added_waves(cfg, inputs, dtype), ()
        if cfg.time_cond_proj_dim:
            # Luo et al. 2023: the scale less one, in thousandths of a unit, as if it were a time.
            scale = (inputs.guidance[0] - 1) * 1000
            cache["guidance"] = (
                sinusoids(scale, cfg.time_cond_proj_dim, 1.0, False).astype(dtype),
            )
        return cache

    @full_precision
    def apply(
        self,
        params: Params,
        x: Array,
        point: Point,
        cache: Cache,
        residuals: Sequence[Residuals] = (),
    ) -> Array:
        """The raw prediction [R, H, W, C] for noisy latents [B, H, W, C], in float32 at least.

        `x` is already scaled to unit variance; `point.time` is [] or [B]. R is the rows of `cache`,
        B or a multiple: the conditions of each image side by side. What comes before the first
        cross-attention is computed once for all of them, unless channels or embeddings are added
        to the image itself.
        """
        dtype = params["conv_in"]["kernel"].dtype
        x, time = at_conditions(
            x, point.time, (*cache["concat"], *cache["added"], *cache["guidance"])
        )
        x = jnp.concatenate([x, *cache["concat"]], -1).astype(dtype)
        variables = {"params": params, "cache": cache["text"]}
        out = UNetModule(self.config, self.remat).apply(
            variables, x, time, cache["added"], cache["guidance"], residuals
        )
        return at_least_float32(out)


def at_conditions(x: Array, time: Array, given: Sequence[Array]) -> tuple[Array, Array]:
    """x [B, ...] and time [] or [B], each with the rows of what the first layers are given."""
    time = jnp.broadcast_to(jnp.asarray(time), x.shape[:1])
    for each in given:
        x, time = repeat_rows(x, len(each)), repeat_rows(time, len(each))
    return x, time


def added_waves(cfg: UNetConfig, inputs: Inputs, dtype: jnp.dtype) -> tuple[Array, ...]:
    """What SDXL is told beside the text, pooled text and sizes as waves; nothing for the others."""
    if not cfg.addition_embed_type:
        return ()
    pooled, sizes = inputs.added
    width = cfg.addition_time_embed_dim or 0
    waves = sinusoids(sizes, width, cfg.freq_shift, cfg.flip_sin_to_cos)
    waves = waves.reshape(sizes.shape[0], -1)
    return (jnp.concatenate([pooled.astype(dtype), waves.astype(dtype)], -1),)


def keys_values(params: Params, text: Array) -> Cache:
    """Keys and values of every cross-attention (`attn2`), under the paths of their modules."""
    cache: Cache = {}
    for name, node in params.items():
        if name == "attn2":
            cache[name] = {"k": linear(node["to_k"], text), "v": linear(node["to_v"], text)}
        elif isinstance(node, dict) and (inner := keys_values(node, text)):
            cache[name] = inner
    return cache
