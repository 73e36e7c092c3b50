"""The UNet of every supported family against diffusers' UNet2DConditionModel."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from jaxgen import flops
from jaxgen.models.layers import sinusoids
from jaxgen.models.unet import UNet
from jaxgen.trees import flatten, map_with_path, shapes
from jaxgen.types import Inputs
from tests.torch_oracle import error, nhwc, params_of, quick_jit, randomise

TOLERANCE = 1e-5
ATTENDING = ["CrossAttnDownBlock2D", "CrossAttnUpBlock2D"]
PLAIN = ["DownBlock2D", "UpBlock2D"]


def blocks(*attends):
    """Both lists of block types, for levels that attend or not, the finest first."""
    kinds = [ATTENDING if a else PLAIN for a in attends]
    return {
        "down_block_types": [k[0] for k in kinds],
        "up_block_types": [k[1] for k in kinds[::-1]],
    }


TINY = blocks(True, False) | {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
    "norm_num_groups": 8,
    "sample_size": 8,
}
SECOND = {"use_linear_projection": True, "attention_head_dim": [2, 4], "upcast_attention": True}
XL = blocks(False, True, True) | {
    "block_out_channels": [8, 16, 16],
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 2, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 + 6 * 8,
}
KINDS = {
    "1.x": ({}, (8, 8), 981.0),
    "1.x, odd size": ({"layers_per_block": 2, "norm_eps": 1e-4}, (9, 13), 20.5),
    "2.x": (SECOND, (7, 8), 0.0),
    "inpainting": ({"in_channels": 9}, (8, 6), 999.0),
    "instruction editing": ({"in_channels": 8}, (5, 4), 333.25),
    "XL": (XL, (9, 6), 500.0),
    "distilled": ({"time_cond_proj_dim": 10}, (4, 8), 259.0),
    "by level": ({"layers_per_block": [1, 2], "attention_head_dim": [2, 8]}, (3, 5), 7.0),
    "other embedding": ({"flip_sin_to_cos": False, "freq_shift": 1}, (4, 4), 700.0),
}


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(**fields):
    """Theirs, ours, and the parameters of both."""
    theirs = randomise(UNet2DConditionModel(**TINY | fields))
    return theirs, UNet.read(dict(theirs.config), "unet/config.json"), params_of(theirs)


def run(unet, params, x, time, inputs):
    """Prepare and apply in one program."""

    def whole(params, x, time, inputs):
        cache = unet.prepare(params, inputs)
        return unet.apply(params, x, SimpleNamespace(time=time), cache)

    return quick_jit(whole)(params, x, time, inputs)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_unet_matches_diffusers(kind):
    fields, sides, time = KINDS[kind]
    theirs, unet, params = pair(**fields)
    cfg = unet.config
    x, text = noise(2, cfg.in_channels, *sides), noise(2, 5, 12, seed=2)
    pooled = noise(2, 6, seed=3)
    ids = torch.tensor([[512.0, 640.0, 0.0, 16.0, 512.0, 512.0]] * 2)
    added, guidance, condition = (), (), None
    if cfg.addition_embed_type:
        added = (pooled.numpy(), ids.numpy())
    if cfg.time_cond_proj_dim:
        guidance = (np.array([2.0, 8.5], np.float32),)
        # The pipeline of latent consistency models embeds (w - 1) * 1000, sine first.
        condition = torch.from_numpy(
            np.array(sinusoids((guidance[0] - 1) * 1000, cfg.time_cond_proj_dim, 1.0, False))
        )
    expected = theirs(
        x,
        time,
        text,
        timestep_cond=condition,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
    ).sample

    x = nhwc(x)
    concat = (x[..., 4:],) if cfg.in_channels > 4 else ()
    inputs = Inputs(text.numpy(), concat, added, guidance)
    tree = jax.tree.map(lambda leaf: leaf.shape, params)
    assert tree == jax.tree.map(lambda leaf: leaf.shape, shapes(unet.init))
    assert error(run(unet, params, x[..., :4], time, inputs), nhwc(expected)) < TOLERANCE


def test_the_guidance_embedding_is_that_of_diffusers_pipeline():
    from diffusers import LatentConsistencyModelPipeline as Pipeline

    scale = torch.tensor([1.0, 4.5, 8.0])
    embed = Pipeline.get_guidance_scale_embedding
    theirs = embed(None, scale - 1, embedding_dim=16)
    _, unet, params = pair(time_cond_proj_dim=16)
    inputs = Inputs(jnp.zeros((3, 1, 12)), guidance=(scale.numpy(),))
    (ours,) = unet.prepare(params, inputs)["guidance"]
    np.testing.assert_allclose(ours, theirs, atol=5e-4)  # angles up to 7000, in float32


def test_each_image_of_a_batch_has_its_own_time():
    _, unet, params = pair()
    x, text = nhwc(noise(2, 4, 4, 4)), noise(2, 5, 12).numpy()
    both = run(unet, params, x, np.array([10.0, 800.5], np.float32), Inputs(text))
    alone = run(unet, params, x[1:], 800.5, Inputs(text[1:]))
    assert error(both[1:], alone) < TOLERANCE


FAST = ("1.x", "inpainting", "XL", "distilled")  # of each kind of input one


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k not in FAST)) for k in KINDS]
)
def test_an_image_under_several_conditions_is_those_rows_side_by_side(kind):
    fields, sides, time = KINDS[kind]
    _, unet, params = pair(**fields)
    cfg = unet.config
    x, text = nhwc(noise(2, 4, *sides)), noise(6, 5, 12, seed=2).numpy()
    more = nhwc(noise(6, cfg.in_channels - 4, *sides, seed=3))
    added = (noise(6, 6, seed=4).numpy(), noise(6, 6, seed=5).numpy())
    scale = np.linspace(2, 8, 6, dtype=np.float32)
    inputs = Inputs(
        text,
        (more,) if cfg.in_channels > 4 else (),
        added if cfg.addition_embed_type else (),
        (scale,) if cfg.time_cond_proj_dim else (),
    )
    times = np.array([time, 20.5], np.float32)
    expected = run(unet, params, *(np.repeat(a, 3, axis=0) for a in (x, times)), inputs)
    assert error(run(unet, params, x, times, inputs), expected) < TOLERANCE


def test_conditions_that_do_not_fit_the_images_are_refused():
    _, unet, params = pair()
    for rows in (1, 3):
        with pytest.raises(ValueError, match=f"{rows} rows of conditions are no multiple of 2"):
            run(unet, params, nhwc(noise(2, 4, 4, 4)), 5.0, Inputs(noise(rows, 5, 12).numpy()))


def test_what_comes_before_the_first_condition_runs_once():
    _, unet, params = pair()
    cache = unet.prepare(params, Inputs(noise(2, 5, 12).numpy()))

    def operations(rows):
        x, point = nhwc(noise(rows, 4, 8, 8)), SimpleNamespace(time=5.0)
        return flops.count(lambda x: unet.apply(params, x, point, cache), x)

    one, two = operations(1), operations(2)
    assert one < 0.95 * two


def test_text_enters_through_what_was_prepared_and_nowhere_else():
    _, unet, params = pair()
    text = jnp.asarray(noise(1, 5, 12).numpy())
    cache = unet.prepare(params, Inputs(text))
    paths = {path.rsplit("/", 1)[0] for path in flatten(cache["text"])}
    assert paths == {p.rsplit("/", 2)[0] for p in flatten(params) if "attn2/to_k" in p}

    blind = map_with_path(lambda p, v: v * jnp.nan if "attn2/to_k" in p else v, params)
    x, point = nhwc(noise(1, 4, 4, 4)), SimpleNamespace(time=5.0)
    apply = quick_jit(lambda params, cache: unet.apply(params, x, point, cache))
    np.testing.assert_array_equal(apply(blind, cache), apply(params, cache))
    other = unet.prepare(params, Inputs(text + 1))
    assert error(apply(params, other), apply(params, cache)) > 1e-3
