"""What a `unet/config.json` states: the supported fields, and those with one supported value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxgen import config
from jaxgen.types import UserError

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
    dropout: float = 0.0  # of training with diffusers; here nothing is dropped

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
        config.check_size(self)
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
