"""Learning to follow hints: ten steps against PyTorch and diffusers, and what learns, and when."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from jaxgen import trees
from jaxgen.data.annotators import maps
from jaxgen.data.pipeline import Images
from jaxgen.load import open_model
from jaxgen.tasks.controlnet import ControlNet
from jaxgen.tasks.denoising import TextToImage
from jaxgen.training import loop, setup
from jaxgen.training.recipe import EMA, AdamW, Mesh, Samples, Train
from jaxgen.types import UserError
from tests.test_controls import from_unet
from tests.torch_oracle import params_of
from tests.training.pictures import write_folder
from tests.training.test_truth import (
    BATCH,
    STEPS,
    TINY,
    host,
    nchw,
    our_steps,
    pixels,
    quick,
    relative,
)  # fmt: skip

RATE = 4e-3  # parameters near 1 have steps of 1e-7, which are to be little beside what they move


def recipe_for(folder, task, **more):
    settings = {
        "data": Images(source=str(folder / "data"), size=32, crop="random", caption_dropout=0.5),
        "optimizer": AdamW(learning_rate=RATE, epsilon=1e-4, warmup=3),
        "ema": EMA(decay=0.7, warmup=True),
        "batch_size": BATCH,
        "steps": STEPS,
        "mesh": Mesh(data=1),
        "out": folder / "run",
    } | more
    return Train(task=dataclasses.replace(task, model=str(TINY)), **settings)


@pytest.fixture
def data(tmp_path):
    """Pictures of noise in blocks, each with a hint."""
    write_folder(tmp_path / "data", count=12, columns=("hint",))
    return tmp_path


@pytest.mark.parametrize(
    "unlocked", [pytest.param(False, marks=pytest.mark.slow), True], ids=["locked", "unlocked"]
)
def test_ten_steps_are_those_of_a_pytorch_loop(unlocked, data):
    net = from_unet(UNet2DConditionModel.from_pretrained(TINY, subfolder="unet"))
    net.save_pretrained(data / "net")
    recipe = recipe_for(data, ControlNet(control=str(data / "net"), unlocked=unlocked))
    ours, before, after, averaged, seen = our_steps(recipe)
    theirs, expected = their_steps(data / "net", unlocked, seen)

    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert after.keys() == expected.keys() == averaged.keys()
    for path in after:
        change, wanted = after[path] - before[path], expected[path] - before[path]
        assert relative(change, wanted) < 1e-3, path


def their_steps(folder, unlocked, seen):
    """The same by diffusers' models and torch's optimizer."""
    vae = AutoencoderKL.from_pretrained(TINY, subfolder="vae")
    encoder = CLIPTextModel.from_pretrained(TINY, subfolder="text_encoder")
    unet = UNet2DConditionModel.from_pretrained(TINY, subfolder="unet")
    net = ControlNetModel.from_pretrained(folder)
    scheduler = DDPMScheduler.from_pretrained(TINY, subfolder="scheduler")
    freed = [unet.up_blocks, unet.conv_norm_out, unet.conv_out] if unlocked else []
    learned = [*net.parameters(), *(p for module in freed for p in module.parameters())]
    optimizer = torch.optim.AdamW(learned, lr=RATE, eps=1e-4, weight_decay=1e-2)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, n / 3))
    found = []
    for batch, vae_noise, chance in seen:
        with torch.no_grad():
            posterior = vae.encode(pixels(batch["image"])).latent_dist
            latents = (posterior.mean + posterior.std * nchw(vae_noise)) * vae.config.scaling_factor
            text = encoder(torch.tensor(batch["ids"]).long())[0]
        time, noise = torch.tensor(np.asarray(chance.time)).long(), nchw(chance.noise)
        noisy = scheduler.add_noise(latents, noise, time)
        hint = nchw(batch["hint"]).float() / 255
        skips, middle = net(noisy, time, text, hint, return_dict=False)
        prediction = unet(
            noisy, time, text,
            down_block_additional_residuals=skips, mid_block_additional_residual=middle,
        ).sample  # fmt: skip
        loss = ((prediction - noise) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        warmup.step()
        found.append(loss.item())
    after = {f"controlnet/{p}": v for p, v in host(params_of(net)).items()}
    if unlocked:
        rest = {f"unet/{p}": v for p, v in host(params_of(unet)).items()}
        starts = ("unet/up_blocks", "unet/conv_norm_out", "unet/conv_out")
        after |= {p: v for p, v in rest.items() if p.startswith(starts)}
    return found, after


PLAIN = AdamW(learning_rate=1e-3, weight_decay=0.0)
ZEROS = ("controlnet/controlnet_down_blocks.", "controlnet/controlnet_mid_block/")


def test_zero_convolutions_learn_first_and_the_base_never(data):
    """At the first step they alone, then all of the copy; after a hundred the base is the same."""
    recipe = recipe_for(data, ControlNet(), optimizer=PLAIN, ema=None)
    run = loop.Run(recipe)
    begun, base, step = host(run.state.learned), host(run.frozen), quick(recipe, run)
    changed = lambda: {p for p, x in host(run.state.learned).items() if (x != begun[p]).any()}  # noqa: E731
    with run.loader():
        run.state, _ = step(run.state, run.frozen, run.batch)
        assert changed() == {path for path in begun if path.startswith(ZEROS)}
        for _ in range(99):
            run.state, _ = step(run.state, run.frozen, run._next_batch())
    assert all(path.startswith("controlnet/") for path in begun)
    moved = changed()
    for path in ("controlnet_cond_embedding/conv_in/kernel", "mid_block/resnets.0/conv1/kernel"):
        assert f"controlnet/{path}" in moved
    _, tensors = open_model(TINY)
    after = host(run.frozen)
    for path, tensor in tensors["unet"].items():
        assert np.array_equal(after[f"unet/{path}"], base[f"unet/{path}"]), path
        assert np.array_equal(after[f"unet/{path}"], tensor.numpy()), path


def test_a_run_ends_with_a_model_and_its_controlnet_and_another_goes_on_from_it(data):
    """At first the middle alone is linked, which leaves zeros where later runs begin.

    On two devices, and in bf16, of which what did not learn keeps no trace.
    """
    hint = data / "data" / "000hint.png"
    samples = Samples(prompts=("a cat", "a dog"), hints=(hint,), steps=2)
    task = ControlNet(links="middle")
    more = {"dtype": "bf16", "mesh": Mesh(data=2), "samples": samples}
    recipe = recipe_for(data, task, optimizer=PLAIN, ema=None, steps=2, **more)
    folder = loop.train(recipe, progress=False)
    assert list((data / "run" / "samples").glob("*.png"))
    ControlNetModel.from_pretrained(folder / "controlnet")

    _, base = open_model(TINY)
    model, found = open_model(folder)
    plain, _ = open_model(folder, control=())
    assert not plain.controls
    assert not model.controls[0].middle_only
    for path, tensor in base["unet"].items():
        assert np.array_equal(tensor.numpy(), found["unet"][path].numpy()), path
    for path, tensor in found["controlnet"].items():
        if path.startswith(("controlnet_down_blocks.", "controlnet_mid_block")):
            assert np.any(tensor.numpy()) == path.startswith("controlnet_mid_block"), path

    recipe = recipe_for(data, ControlNet(control=str(folder)), out=data / "on")
    run = loop.Run(recipe)
    run.data.close()
    assert not run.task.model.controls[0].middle_only
    for path, leaf in host(run.state.learned).items():
        name = path.removeprefix("controlnet/")
        assert np.array_equal(leaf, found["controlnet"][name].numpy()), path


def test_hints_of_samples_are_resized_and_that_is_said_once(data, caplog):
    hint = data / "data" / "000hint.png"
    recipe = recipe_for(data, ControlNet(), samples=Samples(prompts=("a cat",), hints=(hint,)))
    for _ in range(2):
        (pictures,) = setup.sampling(recipe)["control"]
    assert pictures.shape == (1, 32, 32, 3)
    assert caplog.text.count(f"{hint} is resized from 48x48 to 32x32") == 1


def test_hints_of_samples_are_drawn_as_those_of_training(data):
    labels = np.arange(16, dtype=np.uint8).repeat(64).reshape(32, 32)
    Image.fromarray(labels).save(data / "map.png")
    Image.fromarray(np.repeat(255 * (labels[..., None] > 7), 3, -1).astype(np.uint8)).resize(
        (256, 256)
    ).save(data / "photo.png")

    def pictures(hint):
        wanted = Samples(prompts=("a cat",), hints=(hint,))
        return setup.sampling(recipe_for(data, ControlNet(), samples=wanted))["control"][0][0]

    np.testing.assert_array_equal(
        pictures(f"distinct:{data / 'map.png'}"), maps.distinct(256)[labels]
    )
    assert set(np.unique(pictures(f"canny:{data / 'photo.png'}"))) == {0, 255}
    with pytest.raises(UserError, match=r"samples\.hints: .*follow hints at a scale of 1"):
        pictures(f"{data / 'photo.png'}@0.5")


def test_labels_without_a_colour_are_said_once(caplog):
    task = ControlNet()
    for _ in range(2):
        hint = task._coloured(np.array([[150, 151]]))
    assert hint[0, 0].any()
    assert not hint[0, 1].any()
    assert caplog.text.count("those from 151 on are black") == 1


@pytest.mark.parametrize("fields", [{"model": "fresh:mini"}, {"fresh": ("unet",)}])
def test_a_random_base_is_refused(data, fields):
    recipe = recipe_for(data, ControlNet())
    recipe = dataclasses.replace(recipe, task=dataclasses.replace(recipe.task, **fields))
    with pytest.raises(UserError, match="random; name one that is trained"):
        loop.Run(recipe)


def test_columns_are_named_with_their_ending_or_without_and_hold_pictures(data):
    listing = data / "data" / "metadata.jsonl"
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    for row in rows:
        row["conditioning_image"] = "000hint.png"
    listing.write_text("\n".join(map(json.dumps, rows)) + "\n")
    for name in ("conditioning_image", "conditioning"):
        run = loop.Run(recipe_for(data, ControlNet(hint=name)))
        run.data.close()
        assert run.rows["hint"].shape == (BATCH, 32, 32, 3)
    with pytest.raises(UserError, match="the column 'text' holds no pictures"):
        loop.Run(recipe_for(data, ControlNet(hint="text")))


HINTS = {
    "edges": ("edges", lambda example: example["hint"].max() == 255),
    "segmentation": (
        "segmentation",
        lambda example: (
            {tuple(c) for c in example["hint"].reshape(-1, 3)}
            <= {tuple(c) for c in maps.distinct(256)}
        ),
    ),
    "canny": ("canny", lambda example: set(np.unique(example["hint"])) == {0, 255}),
}


@pytest.mark.parametrize("kind", HINTS)
def test_hints_are_read_from_data_or_made_on_the_fly(kind, tmp_path):
    hint, check = HINTS[kind]
    task = ControlNet(hint=hint, palette="distinct")
    recipe = recipe_for(tmp_path, task, data=Images(source="emoji_scenes", size=64))
    run = loop.Run(recipe)
    with run.loader():
        rows = run.rows
    assert rows["hint"].shape == (BATCH, 64, 64, 3)
    assert rows["hint"].dtype == np.uint8
    assert check(rows)


def test_the_encoder_of_hints_is_as_wide_as_asked(data):
    task, _ = setup.open_task(recipe_for(data, ControlNet(hint_widths=(4, 8, 12))))
    (net,) = task.model.controls
    theirs = ControlNetModel.from_config(net.config.dump())
    ours = {path: leaf.shape for path, leaf in trees.flatten(trees.shapes(net.init)).items()}
    assert ours == {path: leaf.shape for path, leaf in trees.flatten(params_of(theirs)).items()}
    assert ours["controlnet_cond_embedding/conv_out/kernel"][2] == 12


def test_what_goes_on_from_a_controlnet_has_its_widths(data):
    net = from_unet(UNet2DConditionModel.from_pretrained(TINY, subfolder="unet"))
    net.save_pretrained(data / "net")
    task = ControlNet(control=str(data / "net"), hint_widths=(4, 8, 12))
    setup.open_task(recipe_for(data, task))
    other = dataclasses.replace(task, hint_widths=(4, 8, 16))
    with pytest.raises(UserError, match=r"hint_widths .* this goes on from \(4, 8, 12\)"):
        setup.open_task(recipe_for(data, other))


@pytest.mark.parametrize(
    ("task", "more", "words"),
    [
        (ControlNet(links="some"), {}, "is neither all nor middle"),
        (ControlNet(palette="mine"), {}, "is not one of ade20k, distinct"),
        (ControlNet(hint_widths=(4, 8)), {}, "hint_widths has 2 numbers; .* there are 3"),
        (ControlNet(hint_widths=(4, 8, 0)), {}, "is not above zero"),
        (ControlNet(control="nowhere"), {}, "no ControlNet folder or file nowhere"),
        (ControlNet(learn=("control/",)), {}, "fits no parameter; perhaps controlnet/"),
        (ControlNet(), {"samples": Samples(prompts=("a", "b"))}, "samples.hints: 0 for 2 prompts"),
        (
            ControlNet(),
            {"samples": Samples(prompts=("a",), hints=(Path("gone.png"),))},
            "no such file: gone.png",
        ),
        (TextToImage(), {"samples": Samples(hints=(Path("a.png"),))}, "hints have no effect"),
    ],
)
def test_bad_input_is_one_line(task, more, words, data):
    with pytest.raises(UserError, match=words) as caught:
        setup.open_task(recipe_for(data, task, **more))
    assert "\n" not in str(caught.value)
