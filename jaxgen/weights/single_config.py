"""The config files of a single file's parts, read off the names and shapes of its tensors."""

from jaxgen.types import UserError
from jaxgen.weights.files import Tensors
from jaxgen.weights.single_names import indices
from jaxgen.weights.single_scheduler import Config


def unet_config(part: Tensors, second: bool) -> Config:
    """Of a UNet, of Stable Diffusion 2.x or 1.x, under diffusers' names."""
    found = encoder_config(part, second)
    kinds = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
    return found | {
        "_class_name": "UNet2DConditionModel",
        "out_channels": _shape(part, "conv_out.weight", 4)[0],
        "up_block_types": [kinds[kind] for kind in reversed(found["down_block_types"])],
    }


def encoder_config(part: Tensors, second: bool | None = None) -> Config:
    """What the first half of a UNet says of itself, under diffusers' names.

    Args:
        second: whether it is of Stable Diffusion 2.x; by default, as its projections say.
    """
    attending = indices(part, "down_blocks.#.attentions.")
    first = f"down_blocks.{min(attending, default=0)}.attentions.0"
    widths = _widths(part, "down_blocks")
    attends = [i in attending for i in range(len(widths))]
    linear = len(_shape(part, f"{first}.proj_in.weight", 2)) == 2
    second = linear if second is None else second
    return {
        "in_channels": _shape(part, "conv_in.weight", 4)[1],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "block_out_channels": widths,
        "layers_per_block": len(indices(part, "down_blocks.0.resnets.#.")),
        "cross_attention_dim": _shape(part, f"{first}.transformer_blocks.0.attn2.to_k.weight", 2)[
            1
        ],
        # diffusers' name for the number of heads
        "attention_head_dim": [max(1, width // 64) for width in widths] if second else 8,
        "use_linear_projection": linear,
    }


def vae_config(part: Tensors) -> Config:
    """Of an autoencoder, under diffusers' names."""
    widths = _widths(part, "encoder.down_blocks")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": _shape(part, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(part, "decoder.conv_out.weight", 4)[0],
        "latent_channels": _shape(part, "decoder.conv_in.weight", 4)[1],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": len(indices(part, "encoder.down_blocks.0.resnets.#.")),
        "scaling_factor": 0.18215,
    }


def text_config(part: Tensors, second: bool) -> Config:
    """Of a text encoder, OpenCLIP's in 2.x, under transformers' names."""
    tokens = _shape(part, "text_model.embeddings.token_embedding.weight", 2)
    positions = _shape(part, "text_model.embeddings.position_embedding.weight", 2)
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": tokens[0],
        "max_position_embeddings": positions[0],
        "hidden_size": tokens[1],
        "intermediate_size": _shape(part, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": len(indices(part, "text_model.encoder.layers.#.")),
        "num_attention_heads": max(1, tokens[1] // 64),
        "hidden_act": "gelu" if second else "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }


def _widths(part: Tensors, side: str) -> list[int]:
    """Channels of each level, noted where its first residual block ends."""
    levels = len(indices(part, f"{side}.#.resnets."))
    return [_shape(part, f"{side}.{i}.resnets.0.conv2.weight", 4)[0] for i in range(max(1, levels))]


def _shape(part: Tensors, key: str, ndim: int) -> tuple[int, ...]:
    if key not in part or len(part[key].shape) < ndim:
        raise UserError(f"has no {key} of {ndim} axes or more; was it cut or changed?")
    return part[key].shape
