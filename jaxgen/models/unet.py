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
    sinusoids,
)
from jaxgen.models.norms import GroupNorm
from jaxgen.sharding import pin
from jaxgen.types import (
    Array,
    Cache,
    Inputs,
    Params,
    Point,
    UserError,
    at_least_float32,
    full_precision,
)

Levels = int | tuple[int, ...]  # one number for all levels, or one for each


@dataclass(frozen=True)
class UNetConfig:
    """The supported fields of a diffusers `unet/config.json`, with diffusers' defaults."""

    sample_size: Levels | None = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: Levels = 2
    transformer_layers_per_block: Levels = 1
    cross_attention_dim: int = 1280
    attention_head_dim: Levels = 8  # misnamed upstream: it is the number of heads
    num_attention_heads: Levels | None = None
    use_linear_projection: bool = False
    upcast_attention: bool | None = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if not levels:
            raise UserError("block_out_channels is empty")
        for name in ("down_block_types", "up_block_types"):
            types = getattr(self, name)
            side = "Down" if name.startswith("down") else "Up"
            allowed = (f"{side}Block2D", f"CrossAttn{side}Block2D")
            if len(types) != levels:
                raise UserError(f"{name} has {len(types)} entries for {levels} levels")
            for kind in types:
                if kind not in allowed:
                    raise UserError(f"{name}: {kind} is not supported (only {allowed} are)")
        if self.addition_embed_type not in (None, "text_time"):
            raise UserError(f"addition_embed_type = {self.addition_embed_type!r} is not supported")
        if self.addition_embed_type and not (
            self.addition_time_embed_dim and self.projection_class_embeddings_input_dim
        ):
            raise UserError("addition_embed_type 'text_time' lacks the widths of its embedding")
        numbers = ("block_out_channels", "in_channels", "out_channels", "cross_attention_dim")
        config.check_positive(self, *numbers, "norm_num_groups")
        heads = "num_attention_heads" if self.num_attention_heads else "attention_head_dim"
        for name in ("layers_per_block", "transformer_layers_per_block", heads):
            self.per_level(name)
            config.check_positive(self, name)
        for level, (width, count) in enumerate(zip(self.block_out_channels, self.heads)):
            if width % self.norm_num_groups:
                raise UserError(f"{self.norm_num_groups} norm_num_groups do not divide {width}")
            attends = self.down_block_types[level].startswith("CrossAttn") or level == levels - 1
            if attends and width % count:
                raise UserError(f"{heads}: {count} heads do not divide {width} channels")

    def per_level(self, name: str) -> tuple[int, ...]:
        """A field as one number for each level."""
        value = getattr(self, name)
        levels = len(self.block_out_channels)
        value = (value,) * levels if isinstance(value, int) else value
        if len(value) != levels:
            raise UserError(f"{name} = {value} is not one number for each of {levels} levels")
        return value

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads per level."""
        return self.per_level(
            "num_attention_heads" if self.num_attention_heads else "attention_head_dim"
        )


# Fields that exist upstream and have one value in every supported family.
FIXED: Mapping[str, Any] = {
    "center_input_sample": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": config.AnyOf((False, (False,) * 3, (False,) * 4)),
    "mid_block_only_cross_attention": config.AnyOf((None, False)),
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": ...,  # acts in training alone, where no released model uses it
    "act_fn": config.AnyOf(("silu", "swish")),
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "class_embeddings_concat": False,
    "addition_embed_type_num_heads": ...,  # read only by a type that is refused
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "cross_attention_norm": None,
}


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
        """[B, H, W, C], [B, E] -> the feature map after each step; the last continues."""
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
        """[B, H, W, C], [B, E] -> [B, H, W, C]."""
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
        """[B, H, W, C], skips in the order of use, [B, E] -> [B, *size, C'].

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
        x: [B, H, W, C] after `conv_in`.
        temb: [B, E].
        remat: whether the backward pass computes each block again instead of keeping its inside.

    Returns:
        The middle block's output, and the skips, first to last.
    """
    skips = [x]
    for level in range(len(cfg.block_out_channels)):
        skips += DownBlock(cfg, level, remat, name=f"down_blocks.{level}")(skips[-1], temb)
    return MidBlock(cfg, remat, name="mid_block")(skips[-1], temb), skips


class UNetModule(nn.Module):
    """The network itself; `UNet` below is how the rest of the house sees it."""

    config: UNetConfig
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Array, time: Array, added: tuple[Array, ...] = (), guidance: tuple[Array, ...] = ()
    ) -> Array:
        """[B, H, W, in_channels] noisy, time [] or [B] -> [B, H, W, out_channels].

        Args:
            added: SDXL's pooled text and sizes, [B, projection_class_embeddings_input_dim].
            guidance: distilled UNets' embedding of the guidance scale, [B, time_cond_proj_dim].
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
        cache: Cache = {"text": _keys_values(params, inputs.text.astype(dtype))}
        cache["concat"] = inputs.concat
        cache["added"] = cache["guidance"] = ()
        if cfg.addition_embed_type:
            pooled, sizes = inputs.added
            waves = sinusoids(
                sizes, cfg.addition_time_embed_dim or 0, cfg.freq_shift, cfg.flip_sin_to_cos
            )
            waves = waves.reshape(sizes.shape[0], -1)
            cache["added"] = (jnp.concatenate([pooled.astype(dtype), waves.astype(dtype)], -1),)
        if cfg.time_cond_proj_dim:
            # Luo et al. 2023: the scale less one, in thousandths of a unit, as if it were a time.
            scale = (inputs.guidance[0] - 1) * 1000
            cache["guidance"] = (
                sinusoids(scale, cfg.time_cond_proj_dim, 1.0, False).astype(dtype),
            )
        return cache

    @full_precision
    def apply(self, params: Params, x: Array, point: Point, cache: Cache) -> Array:
        """The raw prediction for noisy latents [B, H, W, C], in float32 at least.

        `x` is already scaled to unit variance; `point.time` is [] or [B].
        """
        dtype = params["conv_in"]["kernel"].dtype
        x = jnp.concatenate([x, *cache["concat"]], -1).astype(dtype)
        variables = {"params": params, "cache": cache["text"]}
        out = UNetModule(self.config, self.remat).apply(
            variables, x, point.time, cache["added"], cache["guidance"]
        )
        return at_least_float32(out)


def _keys_values(params: Params, text: Array) -> Cache:
    """Keys and values of every cross-attention (`attn2`), under the paths of their modules."""
    cache: Cache = {}
    for name, node in params.items():
        if name == "attn2":
            cache[name] = {"k": linear(node["to_k"], text), "v": linear(node["to_v"], text)}
        elif isinstance(node, dict) and (inner := _keys_values(node, text)):
            cache[name] = inner
    return cache
