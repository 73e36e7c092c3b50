"""Which `unet/config.json` is read, and how large a network it makes."""

import jax
import pytest
import torch
from diffusers import UNet2DConditionModel

from jaxgen.models.unet import UNet
from jaxgen.trees import shapes, size
from jaxgen.types import UserError

# methods.md 1.2: the published configs, and their measured numbers of parameters and tensors.
FIRST = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "center_input_sample": False,
}
SECOND = FIRST | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "num_class_embeds": None,
}
XL = FIRST | {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "upcast_attention": None,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PUBLISHED = {
    "1.5": (FIRST, 859_520_964, 686),
    "2.1": (SECOND, 865_910_724, 686),
    "XL": (XL, 2_567_463_684, 1680),
    "inpainting": (FIRST | {"in_channels": 9}, 859_535_364, 686),
    "instruction editing": (FIRST | {"in_channels": 8}, 859_532_484, 686),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configs_have_the_measured_number_of_parameters(name):
    data, count, tensors = PUBLISHED[name]
    tree = shapes(UNet.read(data, "unet/config.json").init)
    assert size(tree) == count
    assert len(jax.tree.leaves(tree)) == tensors


def test_absent_fields_have_the_defaults_of_diffusers():
    with torch.device("meta"):
        theirs = UNet2DConditionModel().config
    ours = UNet.read({}, "unet/config.json").config
    assert ours == UNet.read(dict(theirs), "unet/config.json").config


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("attention_type", "gated", "attention_type = 'gated' is not supported"),
        ("class_embed_type", "timestep", "class_embed_type = 'timestep' is not supported"),
        ("act_fn", "gelu", "act_fn = 'gelu' is not supported (only 'silu' or 'swish' is)"),
        ("only_cross_attention", True, "only_cross_attention = True"),
        ("center_input_sample", True, "center_input_sample = True"),
        ("conv_in_kernel", 5, "conv_in_kernel = 5"),
        ("resnet_time_scale_shift", "scale_shift", "resnet_time_scale_shift"),
        ("encoder_hid_dim_type", "ip_image_proj", "encoder_hid_dim_type"),
        ("cross_attenton_dim", 768, "unknown field 'cross_attenton_dim' (perhaps cross_attention"),
        ("flavour", 1, "unknown field 'flavour'"),
        ("addition_embed_type", "text", "addition_embed_type = 'text' is not supported"),
        ("addition_embed_type", "text_time", "lacks the widths of its embedding"),
        ("down_block_types", ["DownBlock2D"] * 3, "down_block_types has 3 entries for 4 levels"),
        ("up_block_types", ["AttnUpBlock2D"] * 4, "up_block_types: AttnUpBlock2D is not supported"),
        ("attention_head_dim", [5, 10], "attention_head_dim = (5, 10) is not one number for each"),
        ("layers_per_block", [2, 2, 2, 2.5], "layers_per_block"),
        ("transformer_layers_per_block", [[1, 1]] * 4, "transformer_layers_per_block"),
        ("num_attention_heads", [1, 2], "num_attention_heads"),
        ("attention_head_dim", 0, "attention_head_dim = 0 is not above zero"),
        ("block_out_channels", [], "block_out_channels"),
        ("cross_attention_dim", None, "cross_attention_dim"),
        ("attention_head_dim", 7, "7 heads do not divide 320"),
        ("norm_num_groups", 30, "30 norm_num_groups do not divide 320"),
        ("norm_num_groups", None, "norm_num_groups"),
        ("block_out_channels", "320", "block_out_channels"),
        ("layers_per_block", 0, "layers_per_block"),
        ("in_channels", "4", "in_channels = '4' is not of type int"),
        ("sample_size", 0, "sample_size = 0 is not above zero"),
        ("sample_size", [64], "sample_size = (64,) is neither one number nor two"),
    ],
)
def test_an_unsupported_config_is_an_error_of_one_line_that_names_the_field(field, value, words):
    with pytest.raises(UserError) as refused:
        UNet.read(FIRST | {field: value}, "unet/config.json")
    assert str(refused.value).startswith("unet/config.json")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_wrong_field_is_named_at_once():
    with pytest.raises(UserError) as refused:
        UNet.read(FIRST | {"flavour": 1, "class_embed_type": "timestep"}, "unet/config.json")
    assert "flavour" in str(refused.value)
    assert "class_embed_type" in str(refused.value)
