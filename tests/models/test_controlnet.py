"""The ControlNet of every supported family against diffusers' ControlNetModel."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from jaxgen import denoiser, flops
from jaxgen.denoiser import Network
from jaxgen.models.controlnet import ControlNet
from jaxgen.models.unet import UNet
from jaxgen.trees import flatten, shapes
from jaxgen.types import Control, Inputs, UserError
from tests.models.test_unet import SECOND, XL, blocks, noise
from tests.torch_oracle import error, nhwc, params_of, quick_jit, randomise

TOLERANCE = 1e-5
TINY = {k: v for k, v in blocks(True, False).items() if k.startswith("down")} | {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
    "norm_num_groups": 8,
    "conditioning_embedding_out_channels": [4, 8, 12],
}
LARGE = {k: v for k, v in XL.items() if k != "up_block_types"}
KINDS = {
    "1.x": {},
    "2.x": SECOND,
    "XL": LARGE,
    "blue first": {"controlnet_conditioning_channel_order": "bgr"},
    "pooled": {"global_pool_conditions": True},
    "one channel, other widths": {
        "conditioning_channels": 1,
        "conditioning_embedding_out_channels": [6, 10],
        "layers_per_block": 2,
    },
    "other embedding": {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-4},
}


def pair(seed=0, **fields):
    """Theirs, ours, and the parameters of both."""
    theirs = randomise(ControlNetModel(**TINY | fields), seed)
    return theirs, ControlNet.read(dict(theirs.config), "config.json"), params_of(theirs)


def base(family):
    """The UNet that such ControlNets belong to."""
    fields = KINDS[family]
    whole = TINY | blocks(True, False) | {"sample_size": 8} | fields
    whole.pop("conditioning_embedding_out_channels")
    up = {"up_block_types": XL["up_block_types"]} if fields is LARGE else {}
    return randomise(UNet2DConditionModel(**whole | up))


def added(config, rows=2):
    """What SDXL is told beside the text; nothing to the others."""
    if not config.addition_embed_type:
        return (), None
    pooled = noise(rows, 6, seed=3)
    ids = torch.tensor([[512.0, 640.0, 0.0, 16.0, 512.0, 512.0]] * rows)
    return (pooled.numpy(), ids.numpy()), {"text_embeds": pooled, "time_ids": ids}


def run(net, params, x, time, inputs, hint):
    """Prepare and apply in one program."""

    def whole(params, x, time, inputs, hint):
        cache = net.prepare(params, inputs, hint)
        return net.apply(params, x, SimpleNamespace(time=time), cache)

    return quick_jit(whole)(params, x, time, inputs, hint)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_residuals_match_diffusers(kind):
    theirs, net, params = pair(**KINDS[kind])
    cfg = net.config
    x, text = noise(2, 4, 6, 8), noise(2, 5, 12, seed=2)
    side = 6 * cfg.factor, 8 * cfg.factor
    hint = torch.rand(2, cfg.conditioning_channels, *side, generator=torch.Generator())
    ours_added, theirs_added = added(cfg.encoder)
    skips, middle = theirs(x, 500, text, hint, added_cond_kwargs=theirs_added, return_dict=False)

    tree = {path: leaf.shape for path, leaf in flatten(params).items()}
    assert tree == {path: leaf.shape for path, leaf in flatten(shapes(net.init)).items()}
    found = run(net, params, nhwc(x), 500.0, Inputs(text.numpy(), added=ours_added), nhwc(hint))
    assert error(found.middle, nhwc(middle)) < TOLERANCE
    for ours, expected in zip(found.skips, skips, strict=True):
        assert error(ours, nhwc(expected)) < TOLERANCE


@pytest.mark.parametrize("hints", [1, 2])
@pytest.mark.parametrize("family", ["1.x", "XL"])
def test_an_image_under_several_conditions_is_those_rows_side_by_side(family, hints):
    _, net, params = pair(**KINDS[family])
    x, text = nhwc(noise(2, 4, 6, 8)), noise(4, 5, 12, seed=2).numpy()
    hint = nhwc(noise(hints, 3, 6 * net.config.factor, 8 * net.config.factor, seed=3))
    inputs = Inputs(text, added=added(net.config.encoder, 4)[0])
    found = run(net, params, x, 500.0, inputs, hint)
    expected = run(net, params, np.repeat(x, 2, axis=0), 500.0, inputs, hint)
    assert len(found.middle) == 4
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert error(ours, theirs) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", ["1.x", "2.x", "XL"])
def test_unet_with_two_controls_matches_diffusers(family):
    """Residuals add up, each by its weights, and one hint may serve a whole batch."""
    unet, nets = base(family), [pair(i, **KINDS[family]) for i in (1, 2)]
    x, text = noise(2, 4, 6, 8), noise(2, 5, 12, seed=2)
    ours_added, theirs_added = added(nets[0][1].config.encoder)
    scales, hints = (0.7, 1.3), [torch.rand(1, 3, 24, 32) for _ in nets]

    total = None
    for (net, _, _), scale, hint in zip(nets, scales, hints, strict=True):
        skips, middle = net(
            x, 500, text, hint.expand(2, -1, -1, -1), scale, added_cond_kwargs=theirs_added,
            return_dict=False,
        )  # fmt: skip
        found = [*skips, middle]
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    expected = unet(
        x, 500, text, added_cond_kwargs=theirs_added,
        down_block_additional_residuals=total[:-1], mid_block_additional_residual=total[-1],
    ).sample  # fmt: skip

    network = Network(UNet.read(dict(unet.config), "unet"), tuple(net for _, net, _ in nets))
    params = {"unet": params_of(unet), "controlnet": nets[0][2], "controlnet_1": nets[1][2]}
    controls = tuple(
        Control(nhwc(hint), np.full(len(total), scale, np.float32))
        for scale, hint in zip(scales, hints, strict=True)
    )
    inputs = Inputs(text.numpy(), added=ours_added, controls=controls)

    def denoise(params, x, inputs):
        bound = denoiser.bind(network, params, denoiser.prepare(network, params, inputs))
        return bound(x, SimpleNamespace(time=500.0, scale=1.0))

    assert error(quick_jit(denoise)(params, nhwc(x), inputs), nhwc(expected)) < TOLERANCE


def begun():
    """A ControlNet that begins from a random UNet, and the UNet."""
    whole = TINY | blocks(True, False) | {"sample_size": 8}
    whole.pop("conditioning_embedding_out_channels")
    unet = randomise(UNet2DConditionModel(**whole))
    net = pair()[1]
    base = params_of(unet)
    return UNet.read(dict(unet.config), "unet"), base, net, net.begun(jax.random.key(0), base)


def test_what_has_not_learned_leaves_the_prediction_to_the_bit():
    unet, base, net, params = begun()
    x, text = jnp.asarray(nhwc(noise(2, 4, 6, 8))), noise(2, 5, 12).numpy()
    control = Control(
        np.random.rand(1, 24, 32, 3).astype(np.float32),
        np.ones(net.config.residuals, np.float32),
    )

    def predict(network, params, inputs):
        bound = denoiser.bind(network, params, denoiser.prepare(network, params, inputs))
        return bound(x, SimpleNamespace(time=500.0, scale=1.0))

    plain = quick_jit(lambda p: predict(Network(unet), p, Inputs(text)))({"unet": base})
    controlled = quick_jit(
        lambda p: predict(Network(unet, (net,)), p, Inputs(text, controls=(control,)))
    )({"unet": base, "controlnet": params})
    assert np.array_equal(plain, controlled)


@pytest.mark.parametrize("family", ["XL"])
def test_where_the_last_condition_alone_sees_the_hint_the_copy_runs_for_that(family):
    """The others are predicted as without it, and less is computed."""
    unet, (_, net, params) = base(family), pair(1, **KINDS[family])
    network = Network(UNet.read(dict(unet.config), "unet"), (net,))
    params = {"unet": params_of(unet), "controlnet": params}
    x, text = nhwc(noise(2, 4, 6, 8)), noise(4, 5, 12, seed=2).numpy()
    told, _ = added(net.config.encoder, rows=4)
    weights = np.linspace(0.1, 1, net.config.residuals, dtype=np.float32)
    everyone = Control(np.random.default_rng(0).random((1, 24, 32, 3), np.float32), weights)
    alone = everyone._replace(texts=(text.reshape(2, 2, *text.shape[1:]),))
    nobody = everyone._replace(weights=0 * weights)

    def predict(params, x, control):
        inputs = Inputs(text, added=told, controls=(control,))
        bound = denoiser.bind(network, params, denoiser.prepare(network, params, inputs))
        return bound(x, SimpleNamespace(time=500.0, scale=1.0))

    everywhere, last, plain = (
        quick_jit(predict)(params, x, control) for control in (everyone, alone, nobody)
    )
    assert error(last[1::2], everywhere[1::2]) < TOLERANCE
    assert error(last[::2], plain[::2]) < TOLERANCE
    assert error(plain, everywhere) > 0.01
    assert flops.count(predict, params, x, alone) < 0.9 * flops.count(predict, params, x, everyone)


def test_it_begins_as_diffusers_lets_it():
    """Every parameter but the hint's encoder is the UNet's, or zero."""
    whole = TINY | blocks(True, False) | {"sample_size": 8}
    widths = whole.pop("conditioning_embedding_out_channels")
    unet = randomise(UNet2DConditionModel(**whole))
    theirs = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths)
    _, net, _ = pair()
    ours = flatten(net.begun(jax.random.key(0), params_of(unet)))
    for path, expected in flatten(params_of(theirs)).items():
        if path.startswith("controlnet_cond_embedding") and "conv_out" not in path:
            assert ours[path].shape == expected.shape
        else:
            assert np.array_equal(ours[path], expected), path


def test_config_files_both_ways():
    theirs, net, _ = pair(**KINDS["blue first"])
    again = ControlNetModel.from_config(net.config.dump())
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert ControlNet.read(net.config.dump(), "config.json") == net


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"controlnet_conditioning_channel_order": "gbr"}, "is not rgb or bgr"),
        ({"conditioning_embedding_out_channels": []}, "is empty"),
        ({"conditioning_channels": 0}, "is not above zero"),
        ({"conditioning_chanels": 3}, "perhaps conditioning_channels?"),
        ({"down_block_types": ["DownBlock3D", "DownBlock2D"]}, "DownBlock3D is not supported"),
    ],
)
def test_bad_configs_are_one_line(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        ControlNet.read(TINY | changes, "here/config.json")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("here/config.json")
