"""The programs in sample/, as one would run them, on the tiny model."""

import runpy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxgen
from jaxgen.sharding import data_mesh

HERE = Path(__file__).parent
TINY = str(HERE / "assets" / "tiny")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """program(name, *arguments) runs its `main` in a folder of its own, on one device."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jaxgen, "sample", partial(jaxgen.sample, mesh=data_mesh(1)))
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (32, 40, 3), np.uint8)).save("photo.png")
    mask = np.zeros((32, 40), np.uint8)
    mask[8:24, 12:] = 255
    Image.fromarray(mask).save("mask.png")

    def run(name, *arguments, folder=TINY):
        runpy.run_path(str(HERE.parent / "sample" / f"{name}.py"))["main"](folder, *arguments)

    return run


def pixels(name):
    return np.asarray(Image.open(name), int)


def test_text_to_image_writes_two_pictures_for_each_prompt(program):
    program("text_to_image", "a fox in snow", "an owl")
    shown = [pixels(f"text_{i}.png") for i in range(4)]
    assert {picture.shape for picture in shown} == {(64, 64, 3)}
    assert len(np.unique(np.stack(shown).reshape(4, -1), axis=0)) == 4


def test_image_to_image_writes_a_picture_for_each_strength_and_heeds_a_mask(program):
    names = [f"image_{strength}.png" for strength in (0.4, 0.6, 0.8)]
    shown = []
    for mask in ([], ["mask.png"]):
        program("image_to_image", "a fox in snow", "photo.png", *mask)
        shown += [pixels(name) for name in names]
    assert {picture.shape for picture in shown} == {(32, 40, 3)}
    assert len(np.unique(np.stack(shown).reshape(6, -1), axis=0)) == 6


@pytest.mark.slow
def test_the_gradient_brightens_the_picture(program, capsys):
    program("gradient", "a fox in snow")
    values = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(values) == 5
    assert values[-1] > values[0]


@pytest.mark.parametrize("name", ["edges", pytest.param("segmentation", marks=pytest.mark.slow)])
def test_what_follows_a_hint_is_shown_between_hints_and_what_does_not(program, name):
    program("control", name, folder="mini")
    assert pixels(f"control_{name}.png").shape == (2 * (3 * 68 - 4), 2 * (6 * 68 - 4), 3)
