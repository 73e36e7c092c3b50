"""Released names and paths, on every key that diffusers and transformers write."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from jaxgen.types import UserError
from jaxgen.weights import rename
from jaxgen.weights.files import Tensor


def full_size(name):
    """The state dict of a published architecture, as shapes."""
    with torch.device("meta"):
        networks = {
            "unet": lambda: UNet2DConditionModel(),
            "unet XL": lambda: UNet2DConditionModel(
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
                up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
                transformer_layers_per_block=(1, 2, 10),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
                time_cond_proj_dim=256,
            ),
            "vae": lambda: AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            ),
            "text": lambda: CLIPTextModelWithProjection(CLIPTextConfig()),
            "vision": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig()),
        }
        return {k: tuple(v.shape) for k, v in networks[name]().state_dict().items()}


@pytest.mark.parametrize("name", ["unet", "unet XL", "vae", "text", "vision"])
def test_key_to_path_to_key_is_the_identity(name):
    shapes = full_size(name)
    paths = {key: rename.to_path(key, len(shape)) for key, shape in shapes.items()}
    assert all(rename.to_key(path) == key for key, path in paths.items())
    assert len(set(paths.values())) == len(shapes) > 100


@pytest.mark.parametrize(
    ("key", "ndim", "path"),
    [
        ("conv_in.weight", 4, "conv_in/kernel"),
        ("down_blocks.0.resnets.1.conv1.weight", 4, "down_blocks.0/resnets.1/conv1/kernel"),
        ("mid_block.resnets.0.norm1.weight", 1, "mid_block/resnets.0/norm1/scale"),
        ("time_embedding.linear_1.weight", 2, "time_embedding/linear_1/kernel"),
        (
            "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0.bias",
            1,
            "up_blocks.3/attentions.2/transformer_blocks.0/attn2/to_out.0/bias",
        ),
        (
            "text_model.embeddings.token_embedding.weight",
            2,
            "text_model/embeddings/token_embedding/embedding",
        ),
        (
            "vision_model.embeddings.patch_embedding.weight",
            4,
            "vision_model/embeddings/patch_embedding/kernel",
        ),
        (
            "vision_model.embeddings.class_embedding",
            1,
            "vision_model/embeddings/class_embedding",
        ),
    ],
)
def test_paths_read_as_they_should(key, ndim, path):
    assert rename.to_path(key, ndim) == path
    assert rename.to_key(path) == key


def test_kernels_turn_to_flax_and_back():
    for ndim in rename.TO_FLAX:
        array = np.random.default_rng(0).normal(size=(2, 3, 4, 5)[:ndim])
        turned = array.transpose(rename.TO_FLAX[ndim])
        assert turned.shape[-2:] == array.shape[1::-1]  # ..., in, out
        np.testing.assert_array_equal(turned.transpose(rename.TO_TORCH[ndim]), array)


def tensors(**arrays):
    return {
        key.replace("__", "."): Tensor(a.shape, a.dtype, lambda index, a=a: a[index])
        for key, a in arrays.items()
    }


def test_attention_of_old_vae_files_gets_its_present_names_and_rank():
    with torch.device("meta"):
        present = AutoencoderKL().state_dict()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in present.items():
        shape = tuple(value.shape)
        for new_name, old_name in names.items():
            if f".attentions.0.{new_name}." in key:
                key = key.replace(f".{new_name}.", f".{old_name}.")
                shape = (*shape, 1, 1) if len(shape) == 2 else shape
        old[key] = Tensor(shape, np.dtype(np.float32), lambda index: None)
    assert old.keys() != present.keys()
    shapes = {key: tensor.shape for key, tensor in rename.modern_vae(old).items()}
    assert shapes == {key: tuple(value.shape) for key, value in present.items()}


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_read_alike_with_and_without_their_prefix(prefix):
    data = np.ones(3, np.float32)
    keys = ("final_layer_norm.bias", "embeddings.position_ids", "encoder.layers.0.mlp.fc1.bias")
    given = {prefix + key: tensors(x=data)["x"] for key in keys}
    given["text_projection.weight"] = tensors(x=data)["x"]
    assert list(rename.prefixed_text(given)) == [
        "text_model.final_layer_norm.bias",
        "text_model.encoder.layers.0.mlp.fc1.bias",
        "text_projection.weight",
    ]


def test_a_weight_of_no_known_rank_fits_nothing():
    assert "(3 axes)" in next(iter(rename.by_path(tensors(a__weight=np.ones((1, 2, 3))))))


@pytest.mark.parametrize("key", ["conv_in.kernel", "conv_in/weight", "norm.scale", "a.embedding"])
def test_a_name_that_no_released_file_has_fits_nothing(key):
    given = tensors(x=np.ones((2, 2)))["x"]
    assert list(rename.by_path({key: given})) == [f"{key} (no such name)"]


def test_a_tensor_under_an_old_name_and_a_new_one_is_an_error():
    given = tensors(x=np.ones(2))["x"]
    with pytest.raises(UserError, match="twice"):
        rename.prefixed_text({"a.bias": given, "text_model.a.bias": given})
