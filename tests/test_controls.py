"""Pictures that follow hints against diffusers' ControlNet pipelines, and folders both ways."""

import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import save_file

import jaxgen
from jaxgen import Hint, UserError, controls
from jaxgen.diffusion.schedule import KINDS as SCHEDULES
from jaxgen.load import open_model
from jaxgen.models.controlnet import ControlNet
from jaxgen.sharding import data_mesh
from jaxgen.trees import flatten
from tests.test_generate import HEIGHT, IMAGE, LATENTS, MASK, WIDTH, assert_same, make
from tests.torch_oracle import error, nhwc, params_of, randomise

RNG = np.random.default_rng(1)
HINTS = [RNG.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8) for _ in range(2)]
KINDS = {  # what each pair of ControlNets has beyond the base's first half
    "plain": [{}, {}],
    "pooled": [{"global_pool_conditions": True}, {}],
    "pooled second": [{}, {"global_pool_conditions": True}],
}
KEYWORDS = {"guidance": "guidance_scale", "guess": "guess_mode"}


def from_unet(unet, seed=1, **more):
    """A random ControlNet for a UNet, of diffusers."""
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=[4, 8, 12])
    latent = {"in_channels": 4, **more}  # of the latents alone, where the UNet reads more
    return randomise(ControlNetModel(**{**net.config, **latent}), seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(variant of the base, kind) -> its parts, two ControlNets and their folders."""
    bases, pairs = {}, {}

    def get(name, kind):
        if name not in bases:
            folder = tmp_path_factory.mktemp(name)
            bases[name] = make(name, folder), folder
        if (name, kind) not in pairs:
            base, folder = bases[name]
            unet = base.parts["unet"]
            nets = [from_unet(unet, i + 1, **more) for i, more in enumerate(KINDS[kind])]
            folders = [tmp_path_factory.mktemp("net") for _ in nets]
            for net, place in zip(nets, folders):
                net.save_pretrained(place)
            pairs[name, kind] = SimpleNamespace(
                parts=base.parts, folder=folder, nets=nets, folders=folders
            )
        return pairs[name, kind]

    return get


def theirs(made, count, scales, spans, monkeypatch, *, steps=5, sampler=None, **settings):
    """diffusers' images, float [B, H, W, 3] in 0 to 1."""
    image, mask = settings.pop("image", None), settings.pop("mask", None)
    hints = [Image.fromarray(hint) for hint in HINTS[:count]]
    call = {KEYWORDS.get(key, key): value for key, value in settings.items()}
    call |= {"num_inference_steps": steps, "controlnet_conditioning_scale": list(scales)}
    call |= dict(zip(("control_guidance_start", "control_guidance_end"), map(list, zip(*spans))))
    noise = torch.from_numpy(LATENTS).permute(0, 3, 1, 2)
    kind, call["height"], call["width"] = "ControlNet", HEIGHT, WIDTH
    if image is None:
        call |= {"image": hints, "latents": noise}
    else:
        kind = "ControlNetInpaint" if mask is not None else "ControlNetImg2Img"
        call |= {"image": Image.fromarray(image), "control_image": hints}
    if mask is not None:
        call["mask_image"] = Image.fromarray(mask.astype(np.uint8) * 255)
    nets = made.nets[:count]
    if count == 1:
        for key in call.keys() & {"image" * (image is None), "control_image"}:
            call[key] = call[key][0]
        for key in (
            "controlnet_conditioning_scale",
            "control_guidance_start",
            "control_guidance_end",
        ):
            call[key] = call[key][0]
    parts, cls = made.parts, getattr(diffusers, f"StableDiffusion{kind}Pipeline")
    if sampler:
        scheduler = getattr(diffusers, SCHEDULES[sampler].name)
        parts = parts | {"scheduler": scheduler.from_config(parts["scheduler"].config)}
    pipe = cls(**parts, controlnet=nets if count > 1 else nets[0], requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder  # not so in transformers 5
    pipe.check_inputs = lambda *args, **kwargs: None  # wants sizes divisible by 8, needs 4
    module = import_module(cls.__module__)
    mean = lambda encoded, *args, **kwargs: encoded.latent_dist.mean  # noqa: E731
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noise, raising=False)
    monkeypatch.setattr(module, "retrieve_latents", mean, raising=False)
    return pipe("a red apple", **call, output_type="np").images


def ours(made, count, scales, spans, *, steps=5, **settings):
    model, params = jaxgen.load(made.folder, control=made.folders[:count])
    control = [Hint(*one) for one in zip(HINTS, scales, spans)][:count]
    size = (WIDTH, HEIGHT)
    return jaxgen.sample(
        model, params, "a red apple", size=size, steps=steps, latents=LATENTS, control=control,
        **settings,
    )  # fmt: skip


WHOLE = [(0.0, 1.0)] * 2
CASES = {  # base, kind, how many, scales, spans, settings
    "one": ("plain", "plain", 1, [0.8], WHOLE, {}),
    "two": ("plain", "plain", 2, [0.6, 1.2], WHOLE, {}),
    "two in parts of the run": (
        "plain", "plain", 2, [0.6, 1.2], [(0.0, 0.5), (0.2, 0.8)], {"steps": 10}
    ),
    "euler": ("plain", "plain", 2, [0.6, 1.2], WHOLE, {"sampler": "euler"}),
    "guess": ("plain", "plain", 2, [1.0, 0.5], WHOLE, {"guess": True, "guidance": 4.0}),
    "guess without guidance": ("plain", "plain", 1, [1.0], WHOLE, {"guess": True, "guidance": 1.0}),
    "pooled": ("plain", "pooled", 1, [1.0], WHOLE, {}),
    "pooled, after another": ("plain", "pooled second", 2, [1.0, 0.7], WHOLE, {}),
    "v, linear": ("v", "plain", 1, [1.0], WHOLE, {}),
    "image": (
        "plain", "plain", 2, [0.6, 1.2], [(0.0, 0.6), (0.3, 1.0)],
        {"image": IMAGE, "strength": 0.7, "steps": 10},
    ),
    "guess, image": (
        "plain", "plain", 2, [1.0, 0.5], WHOLE,
        {"image": IMAGE, "strength": 0.7, "guess": True, "guidance": 4.0},
    ),
    "mask": ("plain", "plain", 1, [0.9], WHOLE, {"image": IMAGE, "mask": MASK, "strength": 1.0}),
    "two, mask, spans": (
        "plain", "plain", 2, [0.6, 1.2], [(0.0, 0.6), (0.3, 1.0)],
        {"image": IMAGE, "mask": MASK, "strength": 0.7, "steps": 10},
    ),
    "inpainting model": (
        "inpaint", "plain", 1, [0.9], WHOLE, {"image": IMAGE, "mask": MASK, "strength": 1.0}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_within_one_grey_level_of_diffusers(case, made, monkeypatch):
    base, kind, count, scales, spans, settings = CASES[case]
    pair = made(base, kind)
    expected = theirs(pair, count, scales, spans, monkeypatch, **settings)
    assert_same(ours(pair, count, scales, spans, **settings), expected)


def test_a_hint_changes_the_picture_and_a_scale_of_zero_does_not(made):
    pair = made("plain", "plain")
    model, params = jaxgen.load(pair.folder)
    plain = jaxgen.sample(
        model, params, "a red apple", size=(WIDTH, HEIGHT), steps=5, latents=LATENTS
    )
    np.testing.assert_array_equal(ours(pair, 1, [0.0], WHOLE), plain)
    assert (ours(pair, 1, [1.0], WHOLE) != plain).any()


def test_each_prompt_may_have_a_hint_of_its_own(made):
    pair = made("plain", "plain")
    model, params = jaxgen.load(pair.folder, control=pair.folders[:1])
    settings = {"size": (WIDTH, HEIGHT), "steps": 3, "latents": LATENTS, "guidance": 4.0}
    prompts = ["a red apple", "two cats"]
    together = jaxgen.sample(model, params, prompts, control=[np.stack(HINTS)], batch=2, **settings)
    for image, prompt, hint in zip(together, prompts, HINTS):
        alone = jaxgen.sample(model, params, prompt, control=[hint], **settings)
        assert np.abs(image.astype(int) - alone[0]).max() <= 1
    with pytest.raises(UserError, match="there are 2 hints for 1 prompts"):
        jaxgen.sample(model, params, "a red apple", control=[np.stack(HINTS)], **settings)


def test_devices_and_batches_do_not_matter_and_bf16_is_near(made):
    """In guess mode, with a hint for each prompt, in a part of the run."""
    pair = made("plain", "plain")
    model, params = jaxgen.load(pair.folder, control=pair.folders)
    control = [Hint(np.stack(HINTS), 0.7, (0.0, 0.6)), Hint(HINTS[1])]
    settings = {"size": (WIDTH, HEIGHT), "steps": 3, "seed": 5, "guidance": 4.0, "guess": True}
    draw = lambda params, mesh, batch: jaxgen.sample(  # noqa: E731
        model, params, ["a red apple", "two cats"], count=2, control=control,
        mesh=mesh, batch=batch, **settings,
    ).astype(int)  # fmt: skip
    alone, together = draw(params, data_mesh(1), 1), draw(params, data_mesh(2), 4)
    assert np.abs(alone - together).max() <= 1
    halves = jax.tree.map(lambda p: p.astype(jax.numpy.bfloat16), params)
    assert 0 < np.abs(draw(halves, data_mesh(2), 4) - together).mean() <= 4


def test_folders_both_ways(made, tmp_path):
    pair = made("plain", "plain")
    model, params = jaxgen.load(pair.folder, control=pair.folders)
    jaxgen.save(model, params, tmp_path / "whole")
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "whole")
    for net, found in zip(pair.nets, pipe.controlnet.nets, strict=True):
        for key, value in net.state_dict().items():
            assert torch.equal(value, found.state_dict()[key]), key
    again, tensors = jaxgen.load(tmp_path / "whole")
    assert again.controls == model.controls
    for path, leaf in flatten(params["controlnet_1"]).items():
        assert np.array_equal(leaf, flatten(tensors["controlnet_1"])[path]), path
    net, _ = controls.open_control(tmp_path / "whole")  # a model's first one
    assert net == model.controls[0]


def authors(net):
    """A ControlNet's tensors under its authors' names, by the numbers of their lists."""
    config, state = net.config, net.state_dict()
    blocks, out = ["conv_in"], {}
    for level in range(len(config.block_out_channels)):
        blocks += [f"down_blocks.{level}.{{}}.{i}" for i in range(config.layers_per_block)]
        if level < len(config.block_out_channels) - 1:
            blocks.append(f"down_blocks.{level}.downsamplers.0.conv")
    inner = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    hint = ["conv_in", *(f"blocks.{i}" for i in range(4)), "conv_out"]
    for key, value in state.items():
        for i, name in enumerate(blocks):
            if key.startswith(f"{name}."):
                key = f"input_blocks.{i}.{'0' if i == 0 else '0.op'}.{key.removeprefix(name + '.')}"
            for j, what in enumerate(("resnets", "attentions")):
                start = name.format(what) + "."
                if "{" in name and key.startswith(start):
                    key = f"input_blocks.{i}.{j}.{key.removeprefix(start)}"
        for i, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
            key = key.replace(f"mid_block.{name}.", f"middle_block.{i}.")
        if key.startswith(("input_blocks", "middle_block")):
            head, _, tail = key.rpartition(".")
            for ours, released in inner.items():
                if head.endswith(f".{ours}"):
                    head = head.removesuffix(ours) + released
            key = f"{head}.{tail}"
        for i, name in enumerate(hint):
            key = key.replace(f"controlnet_cond_embedding.{name}.", f"input_hint_block.{2 * i}.")
        key = key.replace("time_embedding.linear_1", "time_embed.0")
        key = key.replace("time_embedding.linear_2", "time_embed.2")
        key = key.replace("controlnet_mid_block.", "middle_block_out.0.")
        if key.startswith("controlnet_down_blocks."):
            _, i, leaf = key.split(".")
            key = f"zero_convs.{i}.0.{leaf}"
        out[f"control_model.{key}"] = value.contiguous()
    return out


FAMILIES = {  # what is not seen in the shapes of released ones: heads
    "1.x": {"block_out_channels": [32, 64], "attention_head_dim": 8},
    "2.x": {
        "block_out_channels": [64, 128],
        "attention_head_dim": [1, 2],
        "use_linear_projection": True,
    },
}


def small_but_released(family="1.x"):
    """A ControlNet of 32 groups, as released ones, which is not seen in shapes, either."""
    more = {"conditioning_embedding_out_channels": [4, 8, 12], "cross_attention_dim": 24}
    kinds = ["CrossAttnDownBlock2D", "DownBlock2D"]
    more |= {"down_block_types": kinds, "layers_per_block": 2}
    return randomise(ControlNetModel(**FAMILIES[family], **more))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_authors_single_file(family, tmp_path):
    net = small_but_released(family)
    save_file(authors(net), tmp_path / "net.safetensors")
    found, tensors = controls.open_control(tmp_path / "net.safetensors")
    assert found == ControlNet.read(dict(net.config), "config.json")
    expected = flatten(params_of(net))
    assert tensors.keys() == expected.keys()
    for path, tensor in tensors.items():
        assert np.array_equal(tensor.numpy(), expected[path]), path


@pytest.mark.parametrize(
    ("name", "yaml", "pools", "said"),
    [
        ("control_v11e_sd15_shuffle", "  global_average_pooling: True\n", True, ""),
        ("control_v11e_sd15_shuffle", None, False, "pools what it adds, as the released one"),
        ("control_v11p_sd15_canny", "  global_average_pooling: False\n", False, ""),
        ("control_sd15_normal", "model:\n", False, "reads hints as blue, green, red, as the"),
        ("control_v11p_sd15_normalbae", None, False, ""),
    ],
)
def test_what_shapes_do_not_say_is_read_beside_a_file_or_warned_of(
    name, yaml, pools, said, tmp_path, caplog
):
    save_file(authors(small_but_released()), tmp_path / f"{name}.safetensors")
    if yaml:
        (tmp_path / f"{name}.yaml").write_text(yaml)
    net, _ = controls.open_control(tmp_path / f"{name}.safetensors")
    assert net.config.global_pool_conditions == pools
    assert bool(caplog.text) == bool(said)
    assert said in caplog.text


def test_a_file_that_holds_its_base_too_is_a_controlnet(tmp_path):
    """As the authors' 1.0."""
    net = small_but_released()
    base = {"model.diffusion_model.out.2.bias": torch.ones(4), "first_stage_model.x": torch.ones(1)}
    save_file(authors(net) | base, tmp_path / "net.safetensors")
    assert controls.is_control(tmp_path / "net.safetensors")
    found, _ = controls.open_control(tmp_path / "net.safetensors")
    assert found == ControlNet.read(dict(net.config), "config.json")


def test_a_file_of_differences_is_refused(tmp_path):
    tensors = authors(small_but_released()) | {"difference": torch.ones(1)}
    save_file(tensors, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match="holds differences from a base"):
        controls.open_control(tmp_path / "net.safetensors")


def test_a_model_that_lacks_the_controlnet_it_names_is_refused(made, tmp_path):
    pair = made("plain", "plain")
    model, params = jaxgen.load(pair.folder, control=pair.folders[:1])
    jaxgen.save(model, params, tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "controlnet")
    with pytest.raises(UserError, match="lacks controlnet/, which its model_index"):
        jaxgen.load(tmp_path / "whole")


def test_diffusers_names_in_a_single_file(tmp_path):
    net = small_but_released()
    net.save_pretrained(tmp_path)
    found, _ = controls.open_control(tmp_path / "diffusion_pytorch_model.safetensors")
    assert found == ControlNet.read(dict(net.config), "config.json")


@torch.no_grad()
def test_one_hint_is_encoded_once_for_a_whole_batch(made):
    """Whose features are those of each of its rows."""
    net = made("plain", "plain").nets[0]
    found = ControlNet.read(dict(net.config), "config.json")
    hint = HINTS[0][None].astype(np.float32) / 255
    inputs = jaxgen.types.Inputs(np.zeros((4, 5, 32), np.float32))
    cache = found.prepare(params_of(net), inputs, hint)
    assert cache["features"].shape[0] == 1
    expected = net.controlnet_cond_embedding(torch.from_numpy(hint).permute(0, 3, 1, 2))
    assert error(cache["features"], nhwc(expected)) < 1e-5


BAD = {
    "another base": (
        lambda net: {"cross_attention_dim": 48},
        r"is a ControlNet of another base: it has text 48 wide, .* has text 32 wide",
    ),
    "other blocks": (
        lambda net: {"block_out_channels": [32, 128]},
        "of another base: it has blocks of",
    ),
    "hints that are no pictures": (
        lambda net: {"conditioning_channels": 5},
        "reads hints of 5 channels; pictures have 3 or 1",
    ),
    "other factor": (
        lambda net: {"conditioning_embedding_out_channels": [4, 8, 12, 16]},
        "makes 1/8 of its hint's sides, .* needs 1/4",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_controlnet_that_does_not_fit_is_named(case, made, tmp_path):
    pair = made("plain", "plain")
    changes, words = BAD[case]
    net = ControlNetModel(**{**pair.nets[0].config, **changes(pair.nets[0])})
    net.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        jaxgen.load(pair.folder, control=[tmp_path])
    assert "\n" not in str(caught.value)


def test_a_decoder_that_learned_with_it_and_is_left_out_is_named(made, tmp_path, caplog):
    """Not where the base was frozen, or is the one beside it."""
    pair = made("plain", "plain")
    model, params = jaxgen.load(pair.folder, control=pair.folders[:1])
    last = {name: value + 1e-3 for name, value in params["unet"]["conv_out"].items()}
    locked, unlocked = tmp_path / "locked", tmp_path / "unlocked"
    jaxgen.save(model, params, locked)
    jaxgen.save(model, params | {"unet": params["unet"] | {"conv_out": last}}, unlocked)
    for base, control, said in (
        (pair.folder, [locked], False),
        (pair.folder, [unlocked], True),
        (pair.folder, [unlocked / "controlnet"], True),
        (unlocked, [unlocked], False),
        (unlocked, None, False),
    ):
        caplog.clear()
        open_model(base, control=control)
        assert (f"name the model, too: --model {unlocked}" in caplog.text) == said


def test_bad_hints_are_one_line(made, tmp_path):
    pair = made("plain", "plain")
    model, params = jaxgen.load(pair.folder, control=pair.folders[:1])
    good = HINTS[0]
    for control, words in (
        ([], "has 1 ControlNet, and 0 hints are given"),
        (good[..., :2], "must be uint8"),
        (Hint(good, span=(0.5, 0.2)), "is not 0 <= from < to <= 1"),
        (None, "has 1 ControlNet, and 0 hints are given"),
        (Hint(good, span=(0.51, 0.54)), "range 0.51,0.54 holds none of the 31 steps that run"),
        ([good, good], "has 1 ControlNet, and 2 hints are given"),
        ([good[..., :2]], "must be uint8"),
        ([good.astype(np.float32)], "must be uint8"),
        (["hint.png"], "is a str, not a numpy array"),
        ([Hint(good, scale=float("nan"))], "not a finite number"),
        ([Hint(good, span=(0.5, 0.5))], "is not 0 <= from < to <= 1"),
    ):
        with pytest.raises(UserError, match=words):
            jaxgen.sample(model, params, "a red apple", control=control)
    with pytest.raises(UserError, match="guess has no effect"):
        jaxgen.sample(*jaxgen.load(pair.folder), "a red apple", guess=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is empty"):
        jaxgen.load(pair.folder, control=[tmp_path / "empty"])
    with pytest.raises(UserError, match="no ControlNet folder or file"):
        jaxgen.load(pair.folder, control=[Path("nowhere")])


def test_a_hint_of_another_size_is_resized_and_that_is_said(made, caplog):
    pair = made("plain", "plain")
    model, params = jaxgen.load(pair.folder, control=pair.folders[:1])
    settings = {"size": (WIDTH, HEIGHT), "steps": 2, "latents": LATENTS}
    large = HINTS[0].repeat(2, 0).repeat(2, 1)
    jaxgen.sample(model, params, "a red apple", control=[large], **settings)
    assert f"resized from {2 * WIDTH}x{2 * HEIGHT} to {WIDTH}x{HEIGHT}" in caplog.text
