"""Model folders there and back: what diffusers writes we read, what we write diffusers reads."""

import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import jaxgen
from jaxgen import trees
from jaxgen.types import UserError
from jaxgen.weights import files
from tests.test_generate import make
from tests.weights.test_single_file import ldm_clip, ldm_unet, ldm_vae

TINY = Path(__file__).parent / "assets" / "tiny"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def weights_of(folder):
    """Every tensor of a folder, by file and released key, with the prefix that all agree on."""
    found = {}
    for path in sorted(Path(folder).rglob("*.safetensors")):
        part = path.parent.name
        for key, value in load_file(path).items():
            start = "text_model." if part == "text_encoder" else ""
            found[part, start + key.removeprefix(start)] = value
    return found


def equal(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype, key
        assert torch.equal(value, other[key]), key


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionPipeline.from_pretrained(TINY, low_cpu_mem_usage=False)


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 2, "latents": latents, "output_type": "np"}
    return pipe("a red fox", **call).images


@pytest.mark.parametrize("dtype", DTYPES)
def test_load_then_save_gives_the_same_keys_and_bits(dtype, folder, tmp_path):
    for path in folder.rglob("*.safetensors"):
        save_file({k: v.to(DTYPES[dtype]) for k, v in load_file(path).items()}, path)
    model, params = jaxgen.load(folder, dtype=None)
    jaxgen.save(model, params, tmp_path / "out")
    equal(weights_of(tmp_path / "out"), weights_of(folder))


def test_asked_for_bf16_every_parameter_is_rounded_to_it(tmp_path):
    model, params = jaxgen.load(TINY, dtype="bf16")
    jaxgen.save(model, params, tmp_path / "out")
    rounded = {k: v.to(torch.bfloat16) for k, v in weights_of(TINY).items()}
    equal(weights_of(tmp_path / "out"), rounded)


def test_diffusers_draws_the_same_picture_from_what_was_saved(pipeline, tmp_path):
    jaxgen.save(*jaxgen.load(TINY), tmp_path / "out")
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    np.testing.assert_array_equal(drawn(saved), drawn(pipeline))


@pytest.mark.parametrize("name", ["inpaint", "edit", "lcm"])
def test_diffusers_loads_what_was_saved_of_every_pipeline(name, tmp_path):
    made = make(name, tmp_path / "theirs")
    jaxgen.save(*made.ours, tmp_path / "out")
    saved = DiffusionPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    assert type(saved).__name__ == f"{made.kind}Pipeline"
    equal(weights_of(tmp_path / "out"), weights_of(tmp_path / "theirs"))


def test_a_folder_that_diffusers_wrote_loads(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "theirs")  # no `text_model.`, tokenizer in one file
    model, params = jaxgen.load(tmp_path / "theirs")
    ours, expected = jaxgen.load(TINY)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, expected))
    assert model.unet == ours.unet
    assert model.tokenizer.size == ours.tokenizer.size


@pytest.mark.parametrize("kind", ["sharded", "variant", "sharded variant"])
def test_shards_and_variants_that_diffusers_wrote_load(kind, pipeline, folder):
    variant = "fp16" if "variant" in kind else None
    size = {"max_shard_size": "200KB"} if "sharded" in kind else {}
    for name in ("unet", "vae", "text_encoder"):
        for path in (folder / name).glob("*.safetensors"):
            path.unlink()
        getattr(pipeline, name).save_pretrained(folder / name, variant=variant, **size)
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1 or "sharded" not in kind
    assert bool(list((folder / "unet").glob("*fp16*"))) == bool(variant)
    expected = jaxgen.load(TINY)[1]
    for asked in {"", variant or ""}:
        params = jaxgen.load(folder, variant=asked)[1]
        assert jax.tree.all(jax.tree.map(np.array_equal, params, expected))


def test_a_single_file_becomes_a_folder_that_diffusers_reads(tmp_path):
    shapes = ldm_unet([32, 64], 1, 64, linear=False) | ldm_vae([32, 64], 1)
    shapes |= ldm_clip(64, 1, 49408)
    generator = torch.Generator().manual_seed(0)
    values = {
        key: torch.randn(shape, generator=generator) * int(np.prod(shape[1:])) ** -0.5
        for key, shape in shapes.items()
    }
    save_file(values, tmp_path / "single.safetensors")
    single = tmp_path / "single.safetensors"
    for prediction in ("v_prediction", "epsilon"):
        model, params = jaxgen.load(single, prediction=prediction)
        assert model.scheduler["prediction_type"] == prediction
    assert trees.size(params) == sum(v.numel() for v in values.values())
    jaxgen.save(model, params, tmp_path / "out")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    conv_in = values["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(pipe.unet.conv_in.weight.data, conv_in)
    again = jaxgen.load(tmp_path / "out")[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))


def test_a_projecting_text_encoder_stays_one(folder, tmp_path):
    config = CLIPTextConfig.from_pretrained(TINY / "text_encoder", projection_dim=24)
    theirs = CLIPTextModelWithProjection(config).eval()
    theirs.save_pretrained(folder / "text_encoder")
    model, params = jaxgen.load(folder)
    jaxgen.save(model, params, tmp_path / "out")

    again, params_again = jaxgen.load(tmp_path / "out")
    assert again.text_encoder == model.text_encoder
    assert jax.tree.all(jax.tree.map(np.array_equal, params_again, params))
    saved = CLIPTextModelWithProjection.from_pretrained(tmp_path / "out" / "text_encoder").eval()
    equal(saved.state_dict(), theirs.state_dict())
    ids = torch.arange(77)[None]
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).text_embeds, theirs(ids).text_embeds)


def test_fields_that_change_nothing_here_are_kept_for_others(folder, tmp_path):
    fields = {"vae": "force_upcast", "unet": "dropout", "text_encoder": "attention_dropout"}
    values = {"vae": False, "unet": 0.1, "text_encoder": 0.2}
    for part, name in fields.items():
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: values[part]}))
    jaxgen.save(*jaxgen.load(folder), tmp_path / "out")
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    for part, name in fields.items():
        assert getattr(getattr(saved, part).config, name) == values[part]


def test_save_refuses_a_place_that_holds_something(folder, tmp_path):
    model, params = jaxgen.load(TINY)
    (tmp_path / "file").write_text("mine")
    for place in (folder, tmp_path / "file"):
        with pytest.raises(UserError, match="exists already; name a new or empty folder"):
            jaxgen.save(model, params, place)
    assert (tmp_path / "file").read_text() == "mine"
    equal(weights_of(folder), weights_of(TINY))


def test_save_fills_an_empty_folder_and_makes_those_above(tmp_path):
    model, params = jaxgen.load(TINY)
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "new" / "deep"):
        jaxgen.save(model, params, place)
        equal(weights_of(place), weights_of(TINY))


@pytest.mark.parametrize("there", [True, False], ids=["in an empty folder", "in a new one"])
def test_what_a_killed_save_left_is_removed(there, tmp_path):
    out = tmp_path / "out"
    left = (out if there else tmp_path) / ".out.unfinished-x"
    (left / "unet").mkdir(parents=True)
    jaxgen.save(*jaxgen.load(TINY), out)
    assert not left.exists()
    equal(weights_of(out), weights_of(TINY))


def test_sigterm_ends_a_save_as_ctrl_c_does(tmp_path, monkeypatch):
    model, params = jaxgen.load(TINY)

    def stopped(*args):
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(files, "save_folder", stopped)
    with pytest.raises(KeyboardInterrupt):
        jaxgen.save(model, params, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_midway_leaves_nothing(error, tmp_path, monkeypatch):
    model, params = jaxgen.load(TINY)
    write = files.save_folder

    def fail(folder, *args, **kwargs):
        write(folder, *args, **kwargs)
        if folder.name == "vae":
            raise error

    monkeypatch.setattr(files, "save_folder", fail)
    with pytest.raises((UserError, KeyboardInterrupt)) as caught:
        jaxgen.save(model, params, tmp_path / "out")
    assert isinstance(caught.value, KeyboardInterrupt) or "No space left" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
