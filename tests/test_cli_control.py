"""`jaxgen sample --control`: what it reads, writes, and says of bad input."""

from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from PIL import Image

from jaxgen import generate
from jaxgen.commands import controls
from jaxgen.controls import open_control
from jaxgen.data.annotators import lines, maps
from jaxgen.data.hints import Hint
from jaxgen.load import open_model, read_params
from jaxgen.models.controlnet import ControlNet
from jaxgen.models.controlnet_config import ControlNetConfig
from jaxgen.plan import plan
from jaxgen.refs import CONTROLS, control_here
from jaxgen.request import Request
from jaxgen.save import save, save_control
from jaxgen.types import UserError
from tests.test_cli import compile_cache, here, run, sample  # noqa: F401


@pytest.fixture
def nets(here):  # noqa: F811
    """Two folders of ControlNets for the tiny model, and a hint."""
    model, _ = open_model("tiny")
    net = ControlNet(ControlNetConfig.of(model.unet.config, model.factor))
    params = net.init(jax.random.key(0))
    for name in ("net", "other"):
        save_control(net, params, name)
    hint = np.zeros((64, 64, 3), np.uint8)
    hint[20:40] = 255
    Image.fromarray(hint).save("hint.png")
    return here


def test_pictures_follow_and_their_settings_say_what(nets, capsys):
    sample("a fox", "--seed", "3")
    sample("a fox", "--seed", "3", "--control", "net=hint.png@0.5", "--guess")
    text = Image.open("out/00001.png").text["parameters"]
    assert "Control: net=hint.png@0.5, Guess: yes" in text
    first, second = (np.asarray(Image.open(f"out/0000{i}.png")) for i in range(2))
    assert (first != second).any()


def test_several_each_with_its_own_range(nets):
    options = ["net=hint.png", "other=canny:photo.png@-0.25"]
    (_, first), (ref, second) = controls.parse(options, ["0,0.5", "0.25,1"])
    assert (first.scale, first.span) == (1.0, (0.0, 0.5))
    assert (ref, second.scale, second.span) == ("other", -0.25, (0.25, 1.0))
    photo = np.asarray(Image.open("photo.png"))
    np.testing.assert_array_equal(second.at(64, 64).picture, lines.canny(photo))
    for _, hint in controls.parse(options, ["0.1,0.9"]):
        assert hint.span == (0.1, 0.9)


def test_lines_of_a_large_photo_are_as_wide_as_those_of_a_small_one(nets):
    photo = np.zeros((1024, 1024, 3), np.uint8)
    photo[300:700, 300:700] = 255
    Image.fromarray(photo).save("large.png")
    model, _ = open_model("tiny", control=["net"])
    for name in ("canny", "scribble"):
        ((_, hint),) = controls.parse([f"net={name}:large.png"], [])
        (ready,) = plan(model, Request(prompts=["a"], control=[hint])).hints
        assert ready.picture.shape == (64, 64, 3)
        assert (ready.picture == 255).mean() > 0.02
    with pytest.raises(UserError, match="no annotator 'cany' of photos; there are canny"):
        plan(model, Request(prompts=["a"], control=[Hint(photo, annotator="cany")]))


def test_a_base_of_a_variant_takes_controlnets_without_one(nets):
    _, plain = open_control("net")
    _, found = open_control("net", "fp16")
    assert plain.keys() == found.keys()


def test_folders_of_hints_do_not_hide_the_embedded_controlnets(nets):
    Path("segmentation").mkdir()
    Path("hint.png").rename("segmentation/0.png")
    assert control_here("segmentation") == CONTROLS / "segmentation"
    Path("net").rename("edges")
    assert control_here("edges") == Path("edges")


def test_a_map_of_labels_is_coloured_as_the_embedded_model_learns_it(nets):
    labels = np.arange(64, dtype=np.uint8).repeat(64).reshape(64, 64)
    Image.fromarray(labels).save("labels.png")
    ((_, hint),) = controls.parse(["net=distinct:labels.png@0.5"], [])
    np.testing.assert_array_equal(hint.picture, maps.distinct(256)[labels])
    assert (hint.scale, hint.name) == (0.5, "net=distinct:labels.png")


def test_a_file_may_hold_what_parts_an_option(nets):
    Path("hint.png").rename("canny:a=b@2.png")
    for text, scale in (("net=canny:a=b@2.png", 1.0), ("net=canny:a=b@2.png@0.5", 0.5)):
        ((ref, hint),) = controls.parse([text], [])
        assert (ref, hint.scale) == ("net", scale)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--control", "hint.png"], "is not REF=FILE, as in edges=drawing.png@0.8"),
        (["--control", "net="], "is not REF=FILE"),
        (["--control", "net=gone.png"], "no such file: gone.png"),
        (["--control", "net=hint.png@much"], "the scale 'much' after the @"),
        (["--control", "net=hint.png@nan"], "the scale 'nan' after the @"),
        (["--control", "net=cany:photo.png"], "no annotator 'cany'"),
        (["--control", "net=cany:photo.png"], "did you mean canny?"),
        (["--control", "net=labels:photo.png"], "photo.png holds colours, not the numbers"),
        (["--control", "nets=hint.png"], "no ControlNet folder or file nets; did you mean net?"),
        (["--control", "empty=hint.png"], "empty is empty"),
        (["--control", "tiny/vae=hint.png"], "is of AutoencoderKL, not of ControlNetModel"),
        (["--control", "photo.png=hint.png"], "photo.png"),
        (["--control", "net=hint.png", "--control-range", "0.7,0.2"], "is not 0 <= from < to <= 1"),
        (["--control", "net=hint.png", "--control-range", "1"], "--control-range 1 is not two"),
        (["--control-range", "0,1"], "has no effect without --control"),
        (["--guess"], "guess has no effect without a ControlNet"),
        (
            ["--control", "net=hint.png", "--control-range", "0,1", "--control-range", "0,1"],
            "is given 2 times for 1 of --control",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(nets, capsys, monkeypatch, options, words):
    Path("empty").mkdir()
    monkeypatch.setattr(generate, "run", None)
    sample("a fox", *options, code=2)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("jaxgen: ")
    assert words in said[0]
    assert not Path("out").exists()


def test_a_hint_of_another_size_is_resized_and_that_is_said_once(nets, capsys, monkeypatch):
    grey = np.full((64, 64, 3), 128, np.uint8)
    monkeypatch.setattr(generate, "run", lambda *args, **kwargs: iter([(0, grey)]))
    Image.fromarray(np.zeros((50, 30, 3), np.uint8)).save("small.png")
    sample("a fox", "a dog", "--control", "net=small.png")
    said = capsys.readouterr().err
    assert said.count("resized") == 1
    assert "net=small.png is resized from 30x50 to 64x64" in said


def test_info_names_them_and_a_converted_folder_keeps_them(nets, capsys):
    model, tensors = open_model("tiny", control=["net"])
    save(model, read_params(tensors), "whole")
    run("info", "whole")
    said = capsys.readouterr().out
    assert "branches      controlnet" in said
    run("convert", "whole", "copy")
    _, found = open_model("copy")
    for path, tensor in tensors["controlnet"].items():
        assert np.array_equal(tensor.numpy(), found["controlnet"][path].numpy()), path


def test_a_whole_model_that_has_them_needs_their_hints(nets, capsys):
    model, tensors = open_model("tiny", control=["net"])
    save(model, read_params(tensors), "whole")
    whole = ("sample", "a fox", "--model", "whole", "--steps", "2", "--out", "out")
    run(*whole, code=2)
    assert "whole has 1 ControlNet, and 0 hints are given (control)" in capsys.readouterr().err
    run(*whole, "--control", "whole=hint.png")  # in the stead of its own
    assert Path("out/00000.png").exists()


def test_a_controlnet_alone_is_shown_and_converted(nets, capsys):
    run("info", "net")
    said = capsys.readouterr().out
    assert "net: a ControlNet" in said
    assert "3 channels, f = 4" in said
    run("convert", "net", "copy")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert Path("copy", name).read_bytes() == Path("net", name).read_bytes()


def test_a_controlnet_of_the_hub_is_shown_and_converted(nets, capsys, monkeypatch):
    net = Path("net").absolute()
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda ref, name: str(net / name))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(net))
    run("info", "someone/canny")
    assert "someone/canny: a ControlNet" in capsys.readouterr().out
    run("convert", "someone/canny", "copy")
    weights = "diffusion_pytorch_model.safetensors"
    assert Path("copy", weights).read_bytes() == Path("net", weights).read_bytes()
