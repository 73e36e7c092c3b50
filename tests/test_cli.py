"""The command: what it writes, and what it says of bad input."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
import zipfile
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from jaxgen import cli, generate, locks, output, terminal
from jaxgen.commands import sample as commands_sample
from jaxgen.data import images, latents
from jaxgen.data.folder import Folder
from jaxgen.load import open_model
from jaxgen.plan import plan
from jaxgen.request import Request
from jaxgen.seedselect import seeds
from tests.weights.test_single_file import SHAPES

TINY = Path(__file__).parent / "assets" / "tiny"


@pytest.fixture(autouse=True)
def compile_cache(monkeypatch, tmp_path_factory):
    """A cache of the tests' own: they leave the user's alone and still compile once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with a picture, a mask and a copy of the model."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)).save("photo.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[16:40, 8:48] = 255
    Image.fromarray(mask).save("mask.png")
    shutil.copytree(TINY, "tiny")
    return tmp_path


def run(*arguments: str, code: int = 0) -> None:
    if code:
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == code
    else:
        cli.main(arguments)


def sample(*arguments: str, code: int = 0) -> None:
    run("sample", *arguments, "--model", "tiny", "--steps", "2", "--out", "out", code=code)


def test_a_folder_of_samples_is_a_training_folder(here, capsys):
    sample("a fox", "an owl", "--count", "2", "--seed", "7", "--negative", "blurry, grey")

    names = [f"{i:05}.png" for i in range(4)]
    assert sorted(p.name for p in Path("out").iterdir()) == [*names, "grid.png", "samples.jsonl"]
    rows = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == names
    assert [(row["text"], row["index"]) for row in rows] == [
        ("a fox", 0),
        ("a fox", 1),
        ("an owl", 0),
        ("an owl", 1),
    ]
    assert [*rows[0]] == [
        *("file_name", "text", "negative", "seed", "index"),
        *("steps", "sampler", "guidance", "size", "model"),
    ]
    text = Image.open("out/00003.png").text["parameters"]
    assert text.startswith("an owl\nNegative prompt: blurry, grey\nSteps: 2, Sampler: PLMS,")
    assert "Seed: 7" in text
    assert text.endswith("Size: 64x64, Model: tiny, Index: 1")  # what is at its default is left out
    assert Image.open("out/grid.png").size == (132, 132)
    assert "4 pictures are in out" in capsys.readouterr().out


def test_a_folder_in_use_is_added_to(here):
    sample("a fox")
    before = Path("out/00000.png").read_bytes()
    sample("an owl")
    assert Path("out/00000.png").read_bytes() == before
    assert Path("out/00001.png").exists()
    assert len(Path("out/samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "prompt",
    ["", "🦊 in ❄️", "a\x00 fox\x1b[31m", "a \udcff fox", " ".join(["a"] * 16 * 75)],
    ids=["empty", "emoji", "control characters", "badly decoded", "16 chunks"],
)
def test_every_text_is_a_prompt(here, prompt):
    sample(prompt)
    (row,) = map(json.loads, Path("out/samples.jsonl").read_text("utf-8").splitlines())
    assert row["text"] == prompt.replace("\udcff", "?")
    Image.open("out/00000.png").load()


def test_a_line_separator_in_a_prompt_ends_no_line_of_the_list(here):
    Path("prompts.txt").write_text("a fox\u2028in snow\nan owl\n", "utf-8")
    sample("--prompts", "prompts.txt")
    with Path("out/samples.jsonl").open(encoding="utf-8") as lines:
        assert [json.loads(line)["text"] for line in lines] == ["a fox\u2028in snow", "an owl"]
    Path("out/samples.jsonl").rename("out/metadata.jsonl")
    source = Folder(Path("out"))
    assert [source.read(i)["caption"] for i in range(2)] == ["a fox\u2028in snow", "an owl"]


def test_a_full_disk_leaves_whole_lines_in_the_list(here, monkeypatch, capsys):
    sample("a fox")
    before = Path("out/samples.jsonl").read_text()
    opened = Path.open

    class Full(io.StringIO):
        def __exit__(self, *error):
            with opened(Path("out/samples.jsonl"), "a") as file:
                file.write(self.getvalue()[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(self, mode="r", *rest, **options):
        if self.name == "samples.jsonl" and options.get("errors") == "replace":
            return Full()
        return opened(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", full)
    sample("an owl", code=2)
    assert "No space left on device" in capsys.readouterr().err
    assert Path("out/samples.jsonl").read_text() == before


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    """As in a container: nothing is kept, and nothing fails."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    before = jax.config.jax_compilation_cache_dir
    terminal.use_compile_cache()
    assert jax.config.jax_compilation_cache_dir == before


def test_a_picture_carries_the_settings_that_are_not_at_their_defaults(here, monkeypatch):
    grey = np.full((64, 64, 3), 128, np.uint8)
    monkeypatch.setattr(generate, "run", lambda *args, **kwargs: iter([(0, grey)]))
    sample(
        *("a fox", "--sampler", "ddim", "--eta", "0.5", "--rescale", "0.3", "--clip-skip", "1"),
        *("--guidance-interval", "0,0.8", "--image", "photo.png", "--mask", "mask.png"),
        *("--strength", "0.5", "--dtype", "bf16"),
    )
    fields = Image.open("out/00000.png").text["parameters"].splitlines()[-1].split(", ")
    assert {
        "Eta: 0.5",
        "Guidance rescale: 0.3",
        "Clip skip: 2",  # counted from the end, from 1
        "Guidance interval: 0 to 0.8",
        "Denoising strength: 0.5",
        "Mask: yes",
        "Dtype: bf16",
    } <= {*fields}


def test_prompts_come_from_a_file_too(here):
    Path("prompts.txt").write_text("a fox\n\nan owl\n")
    sample("a red boat", "--prompts", "prompts.txt")
    rows = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["a red boat", "a fox", "an owl"]


@pytest.mark.parametrize(("batch", "steps"), [("1", 6), ("3", 2)], ids=["1 device", "3 devices"])
def test_the_bar_counts_every_step_of_every_batch(batch, steps, here, capsys):
    sample("a fox", "--sampler", "ddim", "--count", "3", "--batch", batch)
    last = capsys.readouterr().err.split("\r")[-1]
    assert f"| {steps}/{steps} [" in last
    assert "step" in last


def transparent() -> None:
    images.warn_once.cache_clear()
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save("clear.png")


def test_an_rgba_picture_stands_on_white_as_is_said(here, capsys):
    transparent()
    Image.new("RGB", (64, 64), "white").save("white.png")
    for name in ("clear", "white"):
        run(
            *("sample", "a fox", "--image", f"{name}.png", "--strength", "0.5", "--steps", "2"),
            *("--model", "tiny", "--out", name),
        )
    assert np.array_equal(Image.open("clear/00000.png"), Image.open("white/00000.png"))
    assert capsys.readouterr().err.count("jaxgen: transparent pictures are composited") == 1


def test_latents_replace_the_seed_and_a_seed_file_replays(here):
    noise = np.random.default_rng(0).standard_normal((1, 16, 16, 4), dtype=np.float32)
    np.save("noise.npy", noise)
    settings = {"sampler": "pndm", "steps": 2, "guidance": 7.5, "model": "tiny"}
    np.savez("seed.npz", noise=noise, **settings)
    sample("a fox", "--latents", "noise.npy", "--seed", "1")
    sample("a fox", "--latents", "seed.npz", "--seed", "2")
    assert np.array_equal(Image.open("out/00000.png"), Image.open("out/00001.png"))


def test_convert_and_info(here, capsys):
    run("convert", "tiny", "copy")
    run("info", "copy")
    assert "203,204 parameters" in capsys.readouterr().out
    run("convert", "tiny", "copy", code=2)
    assert "copy exists already" in capsys.readouterr().err


def test_half_precision_goes_to_files(here, capsys):
    run("convert", "tiny", "half", "--dtype", "f16")
    assert {str(v.dtype) for v in safetensors.numpy.load_file("half" + UNET[4:]).values()} == {
        "float16"
    }
    run("info", "half", "--variant", "fp16", code=2)
    assert "no part of half has files of variant fp16" in capsys.readouterr().err
    Path("half" + UNET[4:]).rename("half/unet/diffusion_pytorch_model.fp16.safetensors")
    run("info", "half", "--variant", "fp16")  # of the other parts plain files serve
    assert capsys.readouterr().err == ""
    run("info", "half")
    assert "half/unet holds no plain weights; those of fp16 serve" in capsys.readouterr().err
    shutil.copy(UNET, "half/unet")
    for part in ("vae", "text_encoder"):
        (path,) = Path("half", part).glob("*.safetensors")
        path.rename(path.with_suffix(".fp16.safetensors"))
    run("info", "half")
    assert "float32" in capsys.readouterr().out
    run("info", "half", "--variant", "fp16")
    assert "float32" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "single.safetensors", "new", "--dtype", "f8"], "--dtype f8 is not one of f32"),
        (["convert", "single.safetensors", "new", "--prediction", "eps"], "prediction 'eps'"),
        (["convert", "single.safetensors", "new"], "the tokenizer knows 49408 tokens"),
        (["info", "single.safetensors"], "the tokenizer knows 49408 tokens"),
    ],
)
def test_a_bad_file_is_one_line_whatever_there_is_to_say_of_it(arguments, words, here, capsys):
    # It does not say what it predicts, of which there is a notice, and has too few tokens.
    values = {key: np.zeros(shape, np.float32) for key, shape in SHAPES["2.x"].items()}
    safetensors.numpy.save_file(values, "single.safetensors")
    run(*arguments, code=2)
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert words in said.err
    assert said.out == ""
    assert not Path("new").exists()


def spoil(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)


def weights(path: str = "tiny/unet/diffusion_pytorch_model.safetensors") -> bytes:
    return Path(path).read_bytes()


def edit(path: str, **fields) -> None:
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | fields))


def misshapen() -> None:
    from safetensors.numpy import load_file, save_file

    path = "tiny/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.weight"] = np.zeros((16, 5, 3, 3), np.float32)
    tensors["spare.bias"] = tensors.pop("conv_out.bias")
    save_file(tensors, path)


def bomb() -> None:
    Image.new("1", (12000, 12000)).save("bomb.png")


def boast() -> None:
    header = io.BytesIO()
    form = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 16, 16, 4)}
    np.lib.format.write_array_header_1_0(header, form)
    with zipfile.ZipFile("boast.npz", "w") as file:
        file.writestr("noise.npy", header.getvalue())


UNET = "tiny/unet/diffusion_pytorch_model.safetensors"
BAD = {
    "missing folder": (None, ["--model", "nowhere"], "nowhere"),
    "misspelt folder": (None, ["--model", "tinny"], "did you mean tiny"),
    "truncated weights": (lambda: spoil(UNET, weights()[:5000]), ["tiny"], UNET),
    "empty weights": (lambda: spoil(UNET, b""), ["tiny"], "is empty"),
    "other weights": (lambda: spoil(UNET, b"PK\3\4" + bytes(4000)), ["tiny"], "not safetensors"),
    "wrong shapes": (misshapen, ["tiny"], "conv_out.bias"),
    "pickled weights": (lambda: Path(UNET).rename("tiny/unet/model.bin"), ["tiny"], "pickle"),
    "another family": (
        lambda: edit("tiny/model_index.json", _class_name="FluxPipeline"),
        ["tiny"],
        "FluxPipeline",
    ),
    "SDXL folder": (
        lambda: edit("tiny/model_index.json", _class_name="StableDiffusionXLPipeline"),
        ["tiny"],
        "whole SDXL folders are not yet",
    ),
    "config of another network": (
        lambda: edit("tiny/unet/config.json", _class_name="FluxTransformer2DModel"),
        ["tiny"],
        "FluxTransformer2DModel",
    ),
    "no pipeline": (lambda: edit("tiny/model_index.json", _class_name=None), ["tiny"], "of None"),
    "no scheduler": (
        lambda: spoil("tiny/scheduler/scheduler_config.json", b"{}"),
        ["tiny"],
        "does not name its _class_name",
    ),
    "unknown config field": (
        lambda: edit("tiny/unet/config.json", blok_out_channels=[1]),
        ["tiny"],
        "perhaps block_out_channels",
    ),
    "broken config": (lambda: spoil("tiny/vae/config.json", b"{"), ["tiny"], "vae/config.json"),
    "indivisible size": (None, ["tiny", "--size", "66x64"], "66x64 is not divisible by 4"),
    "size in words": (None, ["tiny", "--size", "big"], "WIDTHxHEIGHT"),
    "size of terabytes": (None, ["tiny", "--size", "400000x400000"], "over 64,000,000 pixels"),
    "too many images": (None, ["tiny", "--count", "2000000"], "count = 2000000"),
    "model of an endless name": (None, ["--model", "x" * 300], "x" * 80),
    **{
        f"{name} of an endless name": (None, ["tiny", f"--{name}", "x" * 295 + ".npy"], "x" * 80)
        for name in ("image", "mask", "latents", "prompts", "out")
    },
    "no steps": (None, ["tiny", "--steps", "0"], "steps = 0"),
    "negative steps": (None, ["tiny", "--steps", "-3"], "steps = -3"),
    "too many steps": (None, ["tiny", "--steps", "1001"], "steps = 1001"),
    "strength 0": (None, ["tiny", "--image", "photo.png", "--strength", "0"], "strength = 0"),
    "strength 1.5": (None, ["tiny", "--image", "photo.png", "--strength", "1.5"], "strength = 1.5"),
    "strength 2 of a transparent image": (
        transparent,  # of which nothing is said then
        ["tiny", "--image", "clear.png", "--strength", "2"],
        "strength = 2",
    ),
    "image guidance without editing": (
        None,
        ["tiny", "--image", "photo.png", "--image-guidance", "2"],
        "tiny does not edit pictures",
    ),
    "unknown prediction": (None, ["tiny", "--prediction", "eps"], "epsilon, v_prediction"),
    "strength without image": (None, ["tiny", "--strength", "0.5"], "strength"),
    "guidance nan": (None, ["tiny", "--guidance", "nan"], "guidance = nan"),
    "guidance inf": (None, ["tiny", "--guidance", "inf"], "guidance = inf"),
    "guidance in words": (None, ["tiny", "--guidance", "much"], "--guidance"),
    "mask of another size": (
        lambda: Image.new("L", (32, 64), 255).save("narrow.png"),
        ["tiny", "--image", "photo.png", "--mask", "narrow.png"],
        "32x64",
    ),
    "empty mask": (
        lambda: Image.new("L", (64, 64)).save("black.png"),
        ["tiny", "--image", "photo.png", "--mask", "black.png"],
        "black",
    ),
    "mask without image": (None, ["tiny", "--mask", "mask.png"], "mask needs the image"),
    "unreadable image": (
        lambda: spoil("noise.png", bytes(range(256))),
        ["tiny", "--image", "noise.png"],
        "noise.png",
    ),
    "missing image": (None, ["tiny", "--image", "gone.png"], "gone.png"),
    "huge image": (bomb, ["tiny", "--image", "bomb.png"], "12000x12000"),
    "17 chunks": (None, ["tiny", "a " * (16 * 75 + 1)], "1201 tokens"),
    "latents of another shape": (
        lambda: np.save("noise.npy", np.zeros((1, 8, 8, 4), np.float32)),
        ["tiny", "--latents", "noise.npy"],
        "[1, 16, 16, 4]",
    ),
    "latents of another kind": (
        lambda: np.save("noise.npy", np.zeros((1, 16, 16, 4), int)),
        ["tiny", "--latents", "noise.npy"],
        "latents is int64",
    ),
    "latents that are a picture": (None, ["tiny", "--latents", "photo.png"], "photo.png"),
    "pickled latents": (
        lambda: np.save("noise.npy", np.array([{}], object), allow_pickle=True),
        ["tiny", "--latents", "noise.npy"],
        "noise.npy",
    ),
    "latents that promise petabytes": (boast, ["tiny", "--latents", "boast.npz"], "boast.npz"),
    "latents with half a header": (
        lambda: Path("noise.npy").write_bytes(
            b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,2"
        ),
        ["tiny", "--latents", "noise.npy"],
        "noise.npy is damaged",
    ),
    "a seed whose model is a number": (
        lambda: np.savez("s.npz", noise=np.zeros((1, 16, 16, 4), np.float32), model=3.0),
        ["tiny", "--latents", "s.npz"],
        "should be texts",
    ),
    "a seed of another sampler": (
        lambda: np.savez("s.npz", noise=np.zeros((1, 16, 16, 4), np.float32), sampler="ddim"),
        ["tiny", "--latents", "s.npz"],
        "sampler ddim (here pndm)",
    ),
    "unknown sampler": (
        None,
        ["tiny", "--sampler", "euler_z"],
        "ddim, ddpm, euler, euler_a, dpmpp, pndm, lcm",
    ),
    "eta of another sampler": (None, ["tiny", "--eta", "0.5"], "eta = 0.5 has no meaning for pndm"),
    "karras of another sampler": (None, ["tiny", "--karras"], "karras belongs to"),
    "no such branch": (None, ["tiny", "--box", "a fox@0,0,1,1"], "--box"),
    "no such branch, subjects": (None, ["tiny", "--demo", "photo.png@a fox"], "--demo"),
    "no such branch, LoRA": (None, ["tiny", "--lora", "style.safetensors@0.5"], "--lora"),
    "no such branch, words": (None, ["tiny", "--token", "cat.safetensors"], "--token"),
    "no such option": (None, ["tiny", "--stepz", "3"], "--steps"),
    "unknown dtype": (None, ["tiny", "--dtype", "f8"], "f32, bf16"),
    "damaged tokenizer": (
        lambda: spoil("tiny/tokenizer/vocab.json", b"[]"),
        ["tiny"],
        "tokenizer/vocab.json",
    ),
    "interval of no step": (None, ["tiny", "--guidance-interval", "0.52,0.54"], "none of the 31"),
    "interval upside down": (None, ["tiny", "--guidance-interval", "0.8,0.2"], "0.8,0.2"),
    "guidance beyond float32": (None, ["tiny", "--guidance", "1e39"], "guidance = 1e+39"),
    "negative seed": (None, ["tiny", "--seed", "-1"], "seed = -1"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(here, capsys, case):
    prepare, arguments, words = case
    if prepare:
        prepare()
    if arguments[:1] == ["tiny"]:
        arguments = ["--model", *arguments]
    prompt = arguments[2:3] if arguments[2:3] and arguments[2][0] != "-" else ["a fox"]
    run("sample", *prompt, *arguments[:2], *(a for a in arguments[2:] if a not in prompt), code=2)

    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("jaxgen: ")
    assert words in lines[0]
    assert not Path("samples").exists()  # nothing half-written


def test_a_seed_file_may_hold_its_guidance_in_float32(here):
    noise = np.zeros((1, 16, 16, 4), np.float32)
    np.savez("seed.npz", noise=noise, guidance=np.float32(7.4))
    sample("a fox", "--latents", "seed.npz", "--guidance", "7.4")
    sample("a fox", "--latents", "seed.npz", "--guidance", "7.5", code=2)


def changed(folder: str, delta: float) -> None:
    """Weights as after a little more training."""
    path = f"{folder}/{UNET.removeprefix('tiny/')}"
    tensors = {k: v + np.float32(delta) for k, v in safetensors.numpy.load_file(path).items()}
    Path(path).unlink()
    safetensors.numpy.save_file(tensors, path)


def test_a_seed_is_of_weights_whatever_their_folder_is_called(here, capsys, monkeypatch):
    for run_name in ("one", "two"):
        shutil.copytree("tiny", f"{run_name}/model")
    changed("two/model", 1e-4)
    model, tensors = open_model("one/model")
    checked = plan(model, Request(prompts=["a fox"], steps=2))
    noise = np.random.default_rng(0).standard_normal((1, 16, 16, 4), dtype=np.float32)
    seeds.write(Path("seed.npz"), noise, output.identity(model, checked, tensors))

    replay = ("sample", "a fox", "--steps", "2", "--latents", str(Path("seed.npz").resolve()))
    run(*replay, "--model", "two/model", code=2)
    assert "seed.npz was found under weights " in capsys.readouterr().err
    run(*replay, "--model", "one/model", "--prediction", "v_prediction", code=2)
    assert "prediction epsilon (here v_prediction)" in capsys.readouterr().err
    run(*replay, "--model", "tiny")
    monkeypatch.chdir("one/model")
    run(*replay, "--model", ".")
    assert ", Model: model," in Image.open("samples/00000.png").text["parameters"]


def test_a_run_that_writes_nothing_leaves_no_folder(here, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands_sample, "read_params", stopped)
    Path("mine").mkdir()
    for out in ("new/deep", "mine"):
        run("sample", "a fox", "--model", "tiny", "--steps", "2", "--out", out, code=130)
    assert not Path("new").exists()
    assert [*Path("mine").iterdir()] == []


def test_a_grid_that_cannot_be_written_does_not_hold_the_folder(here, monkeypatch):
    save = images.save_png

    def full(path, *args):
        if path.name == "grid.png":
            raise OSError(28, "No space left on device")
        save(path, *args)

    grey = np.full((64, 64, 3), 128, np.uint8)
    monkeypatch.setattr(generate, "run", lambda *args, **kwargs: iter([(0, grey)]))
    with monkeypatch.context() as patched:
        patched.setattr(images, "save_png", full)
        sample("a fox", code=2)
    sample("a fox")
    assert Path("out/00001.png").exists()


def test_two_runs_do_not_write_to_one_folder(here, capsys):
    Path("out").mkdir()
    other = locks.hold(Path("out"), "--out")
    sample("a fox", code=2)
    assert "another run is writing to out" in capsys.readouterr().err
    os.close(other)
    sample("a fox")


@pytest.mark.parametrize("place", [".", "link"])
def test_convert_fills_the_empty_folder_one_is_in_or_a_link_to_one(place, here, monkeypatch):
    source = Path("tiny").resolve()
    Path("empty").mkdir()
    Path("link").symlink_to("empty")
    if place == ".":
        monkeypatch.chdir("empty")
    run("convert", str(source), place)
    run("info", place)
    assert sorted(p.name for p in Path(place).iterdir()) == sorted(
        p.name for p in source.iterdir() if p.name != "README.md"
    )


def test_weights_that_are_whole_numbers_are_an_error(here, capsys):
    path = Path("tiny/unet/diffusion_pytorch_model.safetensors")
    tensors = safetensors.numpy.load_file(path)
    key = "conv_in.bias"
    tensors[key] = tensors[key].astype(np.int32)
    path.unlink()
    safetensors.numpy.save_file(tensors, path)
    sample("a fox", code=2)
    assert key in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 1 TiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nAt"),
    ],
)
def test_out_of_memory_is_one_line(error, here, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(generate, "run", full)
    sample("a fox", code=2)
    expected = "jaxgen: out of memory; smaller pictures, or fewer at once, need less\n"
    assert capsys.readouterr().err == expected
    assert not Path("out").exists()


def test_an_option_that_does_not_exist_is_named_once(here, capsys):
    sample("a fox", "--stepz", "3", code=2)
    assert capsys.readouterr().err.count("--stepz") == 1


def test_a_seed_file_that_unpacks_to_too_much_is_not_unpacked(here, capsys, monkeypatch):
    monkeypatch.setattr(latents, "MAX_BYTES", 1 << 20)
    np.savez_compressed("seed.npz", noise=np.zeros(1 << 19, np.float32))
    sample("a fox", "--latents", "seed.npz", code=2)
    assert capsys.readouterr().err == "jaxgen: seed.npz unpacks to more than 1 MiB\n"


def test_the_prediction_that_is_given_is_sampled_and_converted(here):
    sample("a fox", "--sampler", "ddim")
    sample("a fox", "--sampler", "ddim", "--prediction", "v_prediction")
    assert not np.array_equal(Image.open("out/00000.png"), Image.open("out/00001.png"))
    run("convert", "tiny", "copy", "--prediction", "v_prediction")
    scheduler = json.loads(Path("copy/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    texts = [Image.open(f"out/0000{i}.png").text["parameters"] for i in (0, 1)]
    assert ["Prediction: v_prediction" in text for text in texts] == [False, True]


@pytest.mark.parametrize("name", ["out", "out/samples.jsonl"])
def test_an_unwritable_folder_is_named(here, capsys, name):
    if name == "out":
        Path("out").write_text("a file where the folder should be")
    else:
        Path("out/samples.jsonl").mkdir(parents=True)
    sample("a fox", code=2)
    said = capsys.readouterr().err
    assert said.startswith("jaxgen: cannot write to out: ")
    assert said.count("\n") == 1
    assert not [*here.glob("out/*.png")]


def test_a_hub_id_offline_says_what_to_do(here, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(here))
    run("sample", "a fox", "--model", "nobody/nothing-here", code=2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "nobody/nothing-here" in lines[0]
    assert "copy the model folder here" in lines[0]


def test_ctrl_c_is_not_lost_where_python_calls_back():
    """As in garbage collection, in which JAX has it call: an exception ends nothing there."""

    class Thing:
        pass

    def interrupted(_):
        raise KeyboardInterrupt

    def loop():
        thing = Thing()
        watch = weakref.ref(thing, interrupted)
        with terminal.interruptible():
            del thing
            assert watch() is None
            for _ in range(200):
                time.sleep(0.1)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
    try:
        with pytest.raises(KeyboardInterrupt):
            loop()
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_only_finished_images(here):
    command = [sys.executable, "-m", "jaxgen", "sample", "a fox", "--model", "tiny"]
    command += ["--count", "500", "--batch", "1", "--out", "out"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Whatever a background shell starts ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not Path("out/00001.png").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Traceback" not in err
    rows = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    pictures = sorted(p.name for p in Path("out").glob("0*.png"))
    assert 2 <= len(pictures) < 500
    assert len(rows) in (len(pictures), len(pictures) - 1)
    for name in pictures:
        Image.open(f"out/{name}").load()
    assert not list(Path("out").glob(".*"))  # no half of a picture
