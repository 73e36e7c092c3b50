"""What a ControlNet's `config.json` states: the encoder's fields, and four of its own."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from jaxgen import config
from jaxgen.models.unet_config import FIXED as UNET_FIXED
from jaxgen.models.unet_config import UNetConfig
from jaxgen.types import UserError

# Of the UNet's.
_ABSENT = ("sample_size", "out_channels", "up_block_types", "time_cond_proj_dim", "dropout")


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
    def of(unet: UNetConfig, factor: int, widths: tuple[int, ...] = ()) -> "ControlNetConfig":
        """Of a ControlNet for a UNet.

        Args:
            factor: of the VAE, a power of two.
            widths: channels of the encoder of hints, from pixels to latents; by default those of
                the released ones. UserError where they are not one for each halving, and one more.
        """
        latent = unet.out_channels  # an inpainting UNet reads more, its ControlNet does not
        widths = widths or (16, 32, 96, *(256,) * 8)[: factor.bit_length()]
        if len(widths) != factor.bit_length():
            raise UserError(
                f"hint_widths has {len(widths)} numbers; from pixels to latents of a {factor}th of "
                f"their side there are {factor.bit_length()}"
            )
        encoder = replace(unet, in_channels=latent, sample_size=None, time_cond_proj_dim=None)
        up = ("UpBlock2D",) * len(unet.block_out_channels)
        encoder = replace(encoder, up_block_types=up, dropout=UNetConfig.dropout)
        encoder = replace(encoder, out_channels=UNetConfig.out_channels)
        return ControlNetConfig(encoder, conditioning_embedding_out_channels=widths)

    def dump(self) -> dict[str, Any]:
        """The object of a `config.json`."""
        data = asdict(self)
        encoder = data.pop("encoder")
        kept = {name: value for name, value in encoder.items() if name not in _ABSENT}
        return {"_class_name": "ControlNetModel"} | kept | data
