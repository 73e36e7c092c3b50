"""Architectures by name: the sizes of released models, and values that nobody's share changes."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxgen
from jaxgen import trees, zoo
from jaxgen.load import open_model
from jaxgen.sharding import data_mesh
from jaxgen.types import UserError

RELEASED = {  # parameters, as measured in diffusers and transformers (their released configs)
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21-v": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
}


@pytest.mark.parametrize("name", RELEASED)
def test_architectures_have_the_sizes_of_released_models(name):
    _, tensors = open_model(f"fresh:{name}")
    found = {n: sum(int(np.prod(t.shape)) for t in part.values()) for n, part in tensors.items()}
    assert found == RELEASED[name]


def test_a_share_of_a_fresh_parameter_is_a_share_of_the_whole():
    model, tensors = open_model("fresh:mini")
    kernel = tensors["unet"]["down_blocks.1/resnets.0/conv1/kernel"]
    whole = kernel.numpy()
    share = kernel.read((slice(1, 2), slice(0, 3), slice(3, 9), slice(0, 8)))
    np.testing.assert_array_equal(share, whole[1:2, :, 3:9, :8])
    assert abs(whole.std() * np.sqrt(whole[..., 0].size) - 1) < 0.05
    assert np.unique(tensors["unet"]["conv_out/kernel"].numpy()) == [0]

    rules = ((r"unet/.*conv1/kernel", PartitionSpec(None, None, None, "data")),)
    _, split = jaxgen.load("fresh:mini", mesh=data_mesh(8), rules=rules)
    found = trees.flatten(split["unet"])["down_blocks.1/resnets.0/conv1/kernel"]
    assert len({str(shard.index) for shard in found.addressable_shards}) == 8
    np.testing.assert_array_equal(found, whole)
    assert jax.tree.structure(split["unet"]) == jax.tree.structure(trees.shapes(model.unet.init))


def test_another_seed_makes_other_parameters():
    values = []
    for seed in (0, 0, 1):
        _, tensors = open_model("fresh:mini", seed=seed)
        values.append(tensors["unet"]["down_blocks.1/resnets.0/conv1/kernel"].numpy().ravel())
    np.testing.assert_array_equal(values[0], values[1])
    assert abs(np.corrcoef(values[0], values[2])[0, 1]) < 0.02


@pytest.mark.parametrize("name", ["sd15", "sd21-v"])
def test_captions_are_filled_up_as_the_family_does(name):
    tokenizer = open_model(f"fresh:{name}")[0].tokenizer
    assert tokenizer.pad == (tokenizer.eos if name == "sd15" else 0)  # 0 is "!"


def test_a_misspelt_architecture_gets_a_hint():
    with pytest.raises(UserError, match=r"did you mean fresh:sd15\?"):
        zoo.configs("fresh:sd-15")
