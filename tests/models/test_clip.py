"""CLIP's encoders against transformers."""

import jax
import numpy as np
import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from jaxgen.models.clip import TextEncoder
from jaxgen.models.clip_vision import VisionEncoder
from jaxgen.trees import shapes, size
from jaxgen.types import UserError
from tests.torch_oracle import error, nhwc, params_of, quick_jit, randomise

TOLERANCE = 1e-5
WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
TEXT = WIDTHS | {
    "num_hidden_layers": 3,
    "vocab_size": 40,
    "max_position_embeddings": 9,
    "projection_dim": 6,
    "bos_token_id": 38,
    "eos_token_id": 37,  # not the largest id: an added token may stand behind it
}
IDS = np.array([[38, 3, 39, 37, 37, 0, 0, 0, 0], [38, 5, 6, 7, 8, 9, 1, 2, 37]])
FULL = {  # methods.md 1.4: widths, activation, whether projected, measured number of parameters
    "L": ((768, 3072, 12, 12), "quick_gelu", False, 123_060_480),
    "H": ((1024, 4096, 23, 16), "gelu", False, 340_387_840),
    "bigG": ((1280, 5120, 32, 20), "gelu", True, 694_659_840),
}


def text_pair(projected=False, **fields):
    """Theirs, ours, and the parameters of both."""
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    theirs = randomise(kind(CLIPTextConfig(**TEXT | fields)))
    data = theirs.config.to_dict() | {"architectures": [kind.__name__]}
    params = params_of(theirs, "" if projected else "text_model.")
    return theirs, TextEncoder.read(data, "text_encoder/config.json"), params


@torch.no_grad()
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_encoder_matches_transformers(activation, projected):
    theirs, encoder, params = text_pair(projected, hidden_act=activation)
    expected = theirs(torch.from_numpy(IDS), output_hidden_states=True)
    pooled = expected.text_embeds if projected else expected.pooler_output
    tokens, ours = quick_jit(encoder.apply)(params, IDS)
    assert error(tokens, expected.last_hidden_state) < TOLERANCE
    assert error(ours, pooled) < TOLERANCE
    for state, wanted in zip(
        quick_jit(encoder.hidden_states)(params, IDS), expected.hidden_states, strict=True
    ):
        assert error(state, wanted) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("eos", [2, 37, 39])
def test_pooling_finds_the_end_as_transformers_does(eos):
    theirs, encoder, params = text_pair(eos_token_id=eos)
    expected = theirs(torch.from_numpy(IDS)).pooler_output
    assert error(quick_jit(encoder.apply)(params, IDS)[1], expected) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip_norms_the_state_before_the_layers_left_out(skip):
    theirs, encoder, params = text_pair()
    states = theirs(torch.from_numpy(IDS), output_hidden_states=True).hidden_states
    norm = getattr(theirs, "text_model", theirs).final_layer_norm
    tokens, pooled = quick_jit(encoder.apply, static_argnames="skip")(params, IDS, skip=skip)
    assert error(tokens, norm(states[-(skip + 1)])) < TOLERANCE
    assert error(pooled, theirs(torch.from_numpy(IDS)).pooler_output) < TOLERANCE


def test_a_token_does_not_see_those_behind_it():
    _, encoder, params = text_pair()
    apply = quick_jit(encoder.apply)
    changed = IDS.copy()
    changed[:, 5:] = 11
    before, after = apply(params, IDS)[0], apply(params, changed)[0]
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert not np.allclose(before[:, 5:], after[:, 5:])


@torch.no_grad()
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_image_encoder_matches_transformers(activation):
    config = CLIPVisionConfig(
        **WIDTHS,
        num_hidden_layers=2,
        image_size=12,
        patch_size=4,
        projection_dim=6,
        hidden_act=activation,
    )
    theirs = randomise(CLIPVisionModelWithProjection(config))
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    expected = theirs(images)
    encoder = VisionEncoder.read(theirs.config.to_dict(), "image_encoder/config.json")
    params = params_of(theirs)
    tree = jax.tree.map(lambda leaf: leaf.shape, params)
    assert tree == jax.tree.map(lambda leaf: leaf.shape, shapes(encoder.init))
    hidden, embedding = quick_jit(encoder.apply)(params, nhwc(images))
    assert error(hidden, expected.last_hidden_state) < TOLERANCE
    assert error(embedding, expected.image_embeds) < TOLERANCE


@pytest.mark.parametrize("name", FULL)
def test_the_published_configs_have_the_measured_number_of_parameters(name):
    (width, inner, layers, heads), activation, projected, count = FULL[name]
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    data = {
        "architectures": [kind],
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "projection_dim": width,
    }
    assert size(shapes(TextEncoder.read(data, "config.json").init)) == count


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("hidden_act", "relu", "hidden_act = 'relu'"),
        ("num_attention_heads", 3, "3 heads do not divide 16"),
        ("model_type", "t5", "model_type 't5' is no CLIP text encoder"),
        ("hiden_size", 16, "unknown field 'hiden_size' (perhaps hidden_size?)"),
        ("is_decoder", True, "is_decoder = True is not supported"),
        ("hidden_size", "16", "hidden_size = '16' is not of type int"),
        ("num_attention_heads", 0, "num_attention_heads = 0 is not above zero"),
    ],
)
def test_an_unsupported_config_is_an_error_of_one_line(field, value, words):
    with pytest.raises(UserError) as refused:
        TextEncoder.read(TEXT | {field: value}, "text_encoder/config.json")
    assert "text_encoder/config.json" in str(refused.value)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
