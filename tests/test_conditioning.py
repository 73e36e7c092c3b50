"""Texts as the network reads them, against transformers' encoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from jaxgen import trees, zoo
from jaxgen.conditioning import encode_text
from jaxgen.load import open_model, read_params
from jaxgen.models.clip import TextEncoder
from jaxgen.tasks import base
from jaxgen.weights import rename
from tests.torch_oracle import error, params_of, quick_jit, randomise

CAPTIONS = ["", "a red apple", "an owl in a tree at night", "a blue car", "a fox in the snow"]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def fresh():
    """Theirs, ours and its parameters: random, but the last norm leaves every token a mean of 0."""
    model, _ = open_model("fresh:mini")
    tensors = zoo.fresh(model.text_encoder, "text_encoder")  # what ships has learned
    params = read_params({"text_encoder": tensors})
    config = CLIPTextConfig(**dataclasses.asdict(model.text_encoder.config))
    theirs, ours = CLIPTextModel(config).eval(), trees.flatten(params["text_encoder"])
    state = {}
    for key, p in theirs.named_parameters():
        array = np.asarray(ours.pop(path_of(key, p)))
        state[key] = torch.tensor(turned(key, array))
    theirs.load_state_dict(state, strict=False)
    assert not ours
    return theirs, model, params


def path_of(key, p):
    return rename.to_path(key if key.startswith("text_model.") else f"text_model.{key}", p.ndim)


def turned(key, array):
    return array.T if array.ndim == 2 and "embedding" not in key else array


def test_what_training_reads_of_a_fresh_encoder_is_the_encoders_own(fresh):
    theirs, model, params = fresh
    ids = np.stack([base.tokens_of(model.tokenizer, caption) for caption in CAPTIONS])
    expected = theirs(torch.tensor(ids).long()).last_hidden_state
    weights = RNG.standard_normal(expected.shape).astype(np.float32)
    (expected * torch.tensor(weights)).sum().backward()

    def weighed(params):
        tokens = base.text_of(model, params, {"ids": ids})
        return (tokens * weights).sum(), tokens

    slopes, tokens = quick_jit(jax.grad(weighed, has_aux=True))(params)
    assert error(tokens, expected.detach()) < 1e-5
    slopes = trees.flatten(slopes["text_encoder"])
    for key, p in theirs.named_parameters():
        if not key.endswith("k_proj.bias"):  # which softmax does not feel
            assert error(turned(key, slopes[path_of(key, p)]), p.grad) < 1e-4, key


@torch.no_grad()
def test_what_sampling_reads_of_a_fresh_encoder_is_the_encoders_own(fresh):
    theirs, model, params = fresh
    ids = np.stack([base.tokens_of(model.tokenizer, caption) for caption in CAPTIONS])
    expected = theirs(torch.tensor(ids).long()).last_hidden_state.numpy()
    weights = np.ones(ids.shape, np.float32)
    weights[1, 2] = weights[3, 1] = 1.5
    tokens = encode_text(
        params["text_encoder"], ids[:, None], weights[:, None], encoder=model.text_encoder
    )
    # There is no mean to restore: the weights are all that happens.
    assert error(tokens, expected * weights[..., None]) < 1e-5


@torch.no_grad()
def test_rows_without_weights_are_left_to_the_bit_beside_rows_with_them():
    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
        max_position_embeddings=9,
        bos_token_id=38,
        eos_token_id=37,
    )
    theirs = randomise(CLIPTextModel(config))
    encoder = TextEncoder.read(config.to_dict(), "config.json")
    params = params_of(theirs, "text_model.")
    ids = RNG.integers(0, 37, (2, 9))
    weights = np.ones((2, 9), np.float32)
    alone = encode_text(params, ids[:, None], weights[:, None], encoder=encoder)
    weights = weights.copy()  # the old ones may still be read
    weights[1, 4] = 2
    both = encode_text(params, ids[:, None], weights[:, None], encoder=encoder)
    np.testing.assert_array_equal(both[0], alone[0])
    expected = theirs(torch.tensor(ids)).last_hidden_state
    assert error(alone, expected) < 1e-5
    weighted = expected[1] * torch.tensor(weights[1])[:, None]
    assert error(both[1], weighted * (expected[1].mean() / weighted.mean())) < 1e-5


def test_weights_have_gradients_whatever_the_mean():
    model, tensors = open_model("tests/assets/tiny")
    params = read_params({"text_encoder": tensors["text_encoder"]})["text_encoder"]
    params = jax.tree.map(jnp.zeros_like, params)  # every mean is zero
    ids = np.zeros((1, 1, 77), np.int32)

    def total(weights):
        return encode_text(params, ids, weights, encoder=model.text_encoder).sum()

    assert bool(jnp.isfinite(jax.grad(total)(2 * jnp.ones(ids.shape))).all())
