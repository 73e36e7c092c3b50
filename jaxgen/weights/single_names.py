"""The names of a single file's tensors, translated into diffusers'.

The file numbers the blocks of a network in one row where diffusers counts levels and layers, hence
the arithmetic; how many there are is read off the names, so that models of any size pass.
"""

import re
from collections.abc import Iterator

from jaxgen.weights.files import Tensor, Tensors

Rules = list[tuple[str, str]]  # (regular expression, replacement), applied one after the other

_UNET: Rules = [
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^(down_blocks\.\d+)\.resnets\.\d+\.op\.", r"\1.downsamplers.0.conv."),
    (r"^(up_blocks\.\d+)\.\w+\.\d+\.conv\.", r"\1.upsamplers.0.conv."),
    (r"^middle_block\.0\.", "mid_block.resnets.0."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^middle_block\.2\.", "mid_block.resnets.1."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
]

_VAE: Rules = [
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"(_blocks\.\d+)\.block\.", r"\1.resnets."),
    (r"(_blocks\.\d+)\.(down|up)sample\.", r"\1.\2samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(\.attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.0)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.0)\.proj_out\.", r"\1.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
]

_OPEN_CLIP: Rules = [
    (r"^model\.positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^model\.token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^model\.ln_final\.", "text_model.final_layer_norm."),
    (r"^model\.transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
]


def unet_names(part: Tensors) -> Iterator[tuple[str, Tensor]]:
    """A UNet's tensors, or those of its first half, under diffusers' names."""
    # A level is a stretch of the row: its layers, then its downsampler, which the last level lacks.
    samplers = indices(part, "input_blocks.#.0.op.") - {0}
    blocks = indices(part, "input_blocks.#.")
    stretch = min(samplers, default=max(blocks, default=0) + 1)
    sides = {"in": "down_blocks", "out": "up_blocks"}
    slots = {"0": "resnets", "1": "attentions", "2": "upsamplers"}

    def place(match: re.Match[str]) -> str:
        # The way down opens with conv_in; on the way up a layer stands in the downsampler's stead.
        level, j = divmod(int(match[2]) - (match[1] == "in"), stretch)
        return f"{sides[match[1]]}.{level}.{slots[match[3]]}.{j}."

    numbered = r"^(?!input_blocks\.0\.)(in|out)put_blocks\.(\d{1,3})\.([012])\."
    for key, tensor in part.items():
        yield _rename(re.sub(numbered, place, key), _UNET), tensor


def vae_names(part: Tensors) -> Iterator[tuple[str, Tensor]]:
    """An autoencoder's tensors, under diffusers' names."""
    levels = len(indices(part, "decoder.up.#."))

    def reverse(match: re.Match[str]) -> str:  # the file numbers by resolution, diffusers by order
        return f"decoder.up_blocks.{levels - 1 - int(match[1])}."

    for key, tensor in part.items():
        key = _rename(re.sub(r"^decoder\.up\.(\d{1,3})\.", reverse, key), _VAE)
        if ".attentions." in key and tensor.shape[2:] == (1, 1):
            tensor = tensor.squeezed()
        yield key, tensor


def clip_names(part: Tensors) -> Iterator[tuple[str, Tensor]]:
    """The tensors of 1.x's text encoder, under transformers' names."""
    for key, tensor in part.items():  # files of transformers' early days lack `text_model.`
        yield re.sub(r"^transformer\.(text_model\.)?", "text_model.", key), tensor


def open_clip_names(part: Tensors) -> Iterator[tuple[str, Tensor]]:
    """The tensors of 2.x's, which fuses queries, keys and values, under the same names."""
    # The condition is what enters the last block, so diffusers keeps 23 of the 24 of ViT-H. A file
    # that was written from a diffusers folder holds those 23, all of them needed.
    blocks = indices(part, "model.transformer.resblocks.#.")
    unused = max(blocks, default=0) if len(blocks) != 23 else 23

    for key, tensor in part.items():
        if key.startswith(f"model.transformer.resblocks.{unused}."):
            continue
        key = _rename(key, _OPEN_CLIP)
        fused = re.fullmatch(r"(.+\.self_attn)\.in_proj_(weight|bias)", key)
        if fused and tensor.shape:
            width = tensor.shape[0] // 3
            for i, name in enumerate("qkv"):
                rows = tensor.rows(i * width, (i + 1) * width)
                yield f"{fused[1]}.{name}_proj.{fused[2]}", rows
        else:
            yield key, tensor


def indices(part: Tensors, start: str) -> set[int]:
    """The numbers that stand at the # in the keys that start so."""
    pattern = re.compile(re.escape(start).replace(r"\#", r"(\d{1,3})"))
    return {int(match[1]) for key in part if (match := pattern.match(key))}


def _rename(key: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
