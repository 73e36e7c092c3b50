"""The model that ships: whole, small, the zoo's, and diffusers' to read."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

import jaxgen
from benchmarks import obedience, reconstruction
from jaxgen import cli, zoo
from jaxgen.data.emoji_scenes import said
from jaxgen.data.emoji_scenes.scenes import EmojiScenes
from jaxgen.evaluation import clip, judge, report
from jaxgen.evaluation.fidelity import psnr
from jaxgen.evaluation.report import Judges
from jaxgen.load import open_model
from jaxgen.models.controlnet import ControlNet
from jaxgen.models.controlnet_config import ControlNetConfig
from jaxgen.refs import ASSETS, CONTROLS, EMBEDDED, EMBEDDED_CLIP
from jaxgen.types import UserError
from sample import demo

PROMPT = "a red apple left of an owl, flat style, on a blue background"


def test_it_is_what_is_loaded_when_none_is_named(tmp_path, monkeypatch):
    named, _ = open_model("mini")
    unnamed, _ = open_model(None)
    assert named.unet == unnamed.unet
    assert named.name == unnamed.name == "mini"
    monkeypatch.chdir(tmp_path)
    Path("mini").mkdir()  # runs/mini of the miniature's own run, say: no model of that name
    assert open_model("mini")[0].name == "mini"
    Path("mini/model_index.json").write_text("{}")  # but this is one, and comes first
    with pytest.raises(UserError, match=r"mini/model_index\.json is of None"):
        open_model("mini")


def test_its_architecture_is_the_zoos():
    model, fresh = (open_model(ref)[0] for ref in ("mini", "fresh:mini"))
    assert model.unet == fresh.unet
    assert model.text_encoder == fresh.text_encoder
    learned = {"scaling_factor": model.vae.config.scaling_factor}  # from the data
    assert fresh.vae.config.block_out_channels == model.vae.config.block_out_channels
    assert {**vars(fresh.vae.config), **learned} == vars(model.vae.config)
    assert model.scheduler == zoo.configs("fresh:mini")["scheduler"]


def test_it_ships_in_less_than_forty_megabytes():
    def size_of(folder):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size_of(ASSETS / "mini") + size_of(ASSETS / "emoji_scenes") < 25e6
    assert size_of(ASSETS) < 40 * 2**20  # with its ControlNets, the judge, and CLIP's tokenizer
    _, tensors = open_model("mini")
    assert {t.dtype for part in tensors.values() for t in part.values()} == {np.dtype(np.float16)}
    size = sum(np.prod(t.shape) for t in tensors["unet"].values())
    assert 5e6 <= size <= 10e6
    assert open_model("mini")[0].tokenizer.size <= 2000


@torch.no_grad()
def test_its_pictures_are_diffusers_pictures(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "mini")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "mini", dtype=torch.float32, low_cpu_mem_usage=False
    )
    pipe.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((1, 16, 16, 4), np.float32)
    wanted = pipe(
        PROMPT,
        num_inference_steps=8,
        guidance_scale=4.0,
        latents=torch.from_numpy(noise).permute(0, 3, 1, 2),
        output_type="np",
    ).images
    model, params = jaxgen.load()
    ours = jaxgen.sample(model, params, [PROMPT], steps=8, guidance=4.0, latents=noise)
    assert np.abs(ours.astype(int) - np.rint(255 * wanted).astype(int)).max() <= 1

    # The command itself, compiled and on one device as on most machines.
    np.save(tmp_path / "noise.npy", noise)
    users = {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    command = [sys.executable, "-m", "jaxgen", "sample", PROMPT, "--latents", "noise.npy"]
    command += ["--steps", "8", "--guidance", "4", "--out", "out"]
    environment = os.environ | users | {"PYTHONPATH": str(ASSETS.parents[1])}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    alone = np.asarray(Image.open(tmp_path / "out" / "00000.png"), int)
    assert np.abs(alone - np.rint(255 * wanted[0]).astype(int)).max() <= 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["edges", "segmentation"])
def test_its_controlnets_are_found_by_name_and_steer_as_in_diffusers(name, tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "mini")
    net = diffusers.ControlNetModel.from_pretrained(
        CONTROLS / name, dtype=torch.float32, low_cpu_mem_usage=False
    )
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        tmp_path / "mini", controlnet=net, dtype=torch.float32, low_cpu_mem_usage=False
    )
    pipe.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((1, 16, 16, 4), np.float32)
    hint = np.zeros((64, 64, 3), np.uint8)
    hint[20:40, 10:50] = 255
    wanted = pipe(
        PROMPT,
        torch.from_numpy(hint / 255).permute(2, 0, 1)[None].float(),
        num_inference_steps=8,
        guidance_scale=4.0,
        latents=torch.from_numpy(noise).permute(0, 3, 1, 2),
        output_type="np",
    ).images
    asked = {"prompts": [PROMPT], "steps": 8, "guidance": 4.0, "latents": noise}
    ours = jaxgen.sample(*jaxgen.load(control=[name]), control=[hint], **asked)
    assert np.abs(ours.astype(int) - np.rint(255 * wanted).astype(int)).max() <= 1
    without = jaxgen.sample(*jaxgen.load(), **asked)
    assert np.abs(ours.astype(int) - without).max() > 50


def test_a_controlnet_that_has_not_learned_leaves_the_picture_to_the_bit():
    """Compiled as users' runs are; so does one whose scale is zero."""
    model, params = jaxgen.load()
    asked = {"prompts": [PROMPT], "steps": 3, "guidance": 4.0, "seed": 1, "output": "float"}
    plain = jaxgen.sample(model, params, **asked)
    net = ControlNet(ControlNetConfig.of(model.unet.config, model.factor))
    begun = params | {"controlnet": net.begun(jax.random.key(0), params["unet"])}
    hint = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    fresh = dataclasses.replace(model, controls=(net,))
    np.testing.assert_array_equal(jaxgen.sample(fresh, begun, control=hint, **asked), plain)
    model, params = jaxgen.load(control="edges")
    nothing = jaxgen.Hint(hint, scale=0.0)
    np.testing.assert_array_equal(jaxgen.sample(model, params, control=nothing, **asked), plain)


@pytest.mark.parametrize(("name", "least"), [("edges", 0.65), ("segmentation", 0.55)])
def test_its_controlnets_are_followed(name, least):
    """Far below the card's figures; without control they are 0.52 and 0.30."""
    bench = obedience.Bench(count=20, steps=10)
    truth, judges = obedience.read(bench.count), judge.read()
    loaded = jaxgen.load(control=[name])
    made = obedience.sampled(bench, loaded, truth.captions, truth.hints(name))
    figure = {"edges": obedience.edges_of_real, "segmentation": obedience.any_subject}[name]
    assert figure(made, truth, judges) > least


def test_it_still_does_what_its_card_says():
    """Far below the card's figures, which are of 500 scenes, and far above a broken model's."""
    model, params = jaxgen.load()
    scenes = EmojiScenes("emoji_scenes:test")
    pictures, captions = report.read_all(scenes, 100)
    found = clip.retrieval(clip.open_clip(EMBEDDED_CLIP), pictures, captions)
    assert min(found.values()) >= 0.5
    copies = reconstruction.copies(model, params, np.stack(pictures[:32]))
    assert psnr(copies, np.stack(pictures[:32])).mean() > 26
    made = jaxgen.sample(model, params, captions[:32], steps=10, guidance=4.0, batch=16)
    right = report.evaluate(Judges.read(None), list(made), captions[:32]).right
    assert right["background"][0] >= 0.9 * right["background"][1]
    assert right["style"][0] >= 0.6 * right["style"][1]
    assert right["subject, head"][0] >= 0.5 * right["subject, head"][1]


def test_every_file_of_weights_has_its_sum():
    for path in ASSETS.rglob("*.safetensors"):
        said = path.with_name(f"{path.name}.sha256").read_text()
        assert said == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n", path


def test_a_prompt_of_unknown_words_simply_samples(tmp_path):
    arguments = ["a dinosaur in Reykjavík", "--steps", "2", "--out", str(tmp_path / "out")]
    cli.main(["sample", *arguments])
    assert (tmp_path / "out" / "00000.png").is_file()


def test_the_demo_samples_its_prompts(tmp_path, monkeypatch, capsys):
    """As `make demo` does, but here, of one prompt, once, in a single step."""
    for prompt in demo.PROMPTS:
        asked = said.read(prompt)
        assert asked.subjects
        assert asked.style
        assert asked.colour

    def run(command):
        words = command[3:]
        for name in ("--count", "--batch"):
            words[words.index(name) + 1] = "1"
        cli.main([*words, "--steps", "1"])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:1])
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit) as stop:
        demo.main()
    assert stop.value.code == 0
    assert {"00000.png", "grid.png", "samples.jsonl"} == {p.name for p in Path("demo").iterdir()}
    assert f'$ jaxgen sample "{demo.PROMPTS[0]}"' in capsys.readouterr().out


def cut(content):
    return content[:-1000]


def hole(content):
    middle = len(content) // 2
    return content[:middle] + b"\xff" * 4096 + content[middle + 4096 :]


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("file", "damage", "summed", "named"),
    [
        (UNET, cut, True, f"{UNET} is damaged"),
        (UNET, flip, True, f"{UNET} is damaged"),
        (UNET, hole, False, "weights of the model's unet"),
        ("tokenizer/merges.txt", cut, True, "tokenizer/merges.txt is damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path, monkeypatch, capsys, file, damage, summed, named):
    shutil.copytree(EMBEDDED, tmp_path / "mini")
    path = tmp_path / "mini" / file
    path.write_bytes(damage(path.read_bytes()))
    if not summed:  # as most folders are
        path.with_name(f"{path.name}.sha256").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", PROMPT, "--model", "mini", "--steps", "2"])
    assert stop.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    (line,) = (line for line in said if "%|" not in line)  # beside bars
    assert line.startswith("jaxgen: ")
    assert named in line
