"""A run that was killed or stopped, and goes on, is the run that never was."""

import json
import shutil
import signal
import time

import diffusers
import numpy as np
import pytest
import torch

import jaxgen
from tests.training.pictures import write_folder
from tests.training.runs import ROOT, Runs, assert_same, metrics, wait_for_line, worst


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return Runs(folder, write_folder(folder / "data", 40))


@pytest.fixture(scope="module")
def whole(runs):
    """The folder of a run that nothing disturbed."""
    runs.finish(runs.folder / "whole")
    return runs.folder / "whole"


def kill(runs, out, rng, options=()):
    """Starts or goes on with a run, and kills it somewhere; whether it was killed in time."""
    process = runs.start(out, *options)
    # From before the first step, compiling and restoring included, to after the last one; steps
    # take hundredths of a second, so most moments that are drawn lie in or about a save.
    done = len(metrics(out)) if (out / "metrics.jsonl").exists() else 0
    wait_for_line(out, min(done + int(rng.integers(0, 3)), runs.steps // 2 - 1), process)
    time.sleep(float(rng.uniform(0, 0.6)))
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "kills", [2, pytest.param(20, marks=pytest.mark.slow)], ids="{}_times".format
)
def test_killed_at_random_it_ends_bit_identical(runs, whole, kills, tmp_path):
    rng = np.random.default_rng(kills)
    killed, trial = 0, 0
    while killed < kills:
        out = tmp_path / f"run{trial}"
        while killed < kills and kill(runs, out, rng):
            killed += 1
        runs.finish(out)
        assert_same(out, whole)
        trial += 1


@pytest.mark.slow
def test_killed_with_workers_it_ends_bit_identical(runs, whole, tmp_path):
    options = ("--data.workers", "2")
    assert kill(runs, tmp_path / "run", np.random.default_rng(1), options)
    runs.finish(tmp_path / "run", *options)
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_exits_well(runs, whole, tmp_path, number):
    out = tmp_path / "run"
    process = runs.start(out)
    wait_for_line(out, 1, process)
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert "goes on from there" in said
    assert not (out / "model").exists()
    runs.finish(out)
    assert_same(out, whole)


def test_two_processes_are_one(runs, whole, tmp_path):
    runs.together(tmp_path / "both")
    # The config's epsilon is no smaller than gradients are: else Adam's first steps are signs, and
    # make a step of a rounding.
    assert worst(tmp_path / "both", whole) < 1e-5
    for ours, theirs in zip(metrics(tmp_path / "both"), metrics(whole), strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)


@pytest.mark.slow
def test_two_processes_stop_together_and_end_bit_identical(runs, tmp_path):
    runs.together(tmp_path / "both")
    said = runs.together(tmp_path / "stopped", stop=2)
    assert all("goes on from there" in text for text in said)
    runs.together(tmp_path / "stopped")
    assert_same(tmp_path / "stopped", tmp_path / "both")


# As train/main.py, but the data of process 1 fail at the fifth batch.
FAILS = """
import sys
sys.path.insert(0, "{root}/train")
import main
main.start()
import jax
from jaxgen.cli import main as command
from jaxgen.data.pipeline import Loader
from jaxgen.types import UserError

following = Loader.__next__

def until_the_fifth(self):
    if self.next_batch == 4 and jax.process_index() == 1:
        raise UserError("20 of 1000 examples are bad")
    return following(self)

Loader.__next__ = until_the_fifth
command(["train", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_where_one_process_fails_all_save_and_end(runs, tmp_path):
    program = tmp_path / "fails.py"
    program.write_text(FAILS.format(root=ROOT))
    said = runs.together(tmp_path / "run", program=program, code=2)
    assert "jaxgen: process 1: 20 of 1000 examples are bad" in said[0]
    assert "jaxgen: 20 of 1000 examples are bad" in said[1]
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()


@pytest.mark.slow
def test_where_one_process_lacks_the_data_all_end(runs, tmp_path):
    lacks = ("--data.source", str(tmp_path / "nowhere"))
    said = runs.together(tmp_path / "run", code=2, each=((), lacks))
    assert "jaxgen: process 1: no folder or file" in said[0]
    assert "jaxgen: no folder or file" in said[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_find_different_checkpoints_are_refused(runs, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "other")
    step = max((tmp_path / "other" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(step)
    elsewhere = ("--out", str(tmp_path / "other"))
    said = runs.together(whole, "--steps", "20", code=2, each=((), elsewhere))
    for text, folder in zip(said, (whole, tmp_path / "other")):
        assert "processes 0 and 1 find different checkpoints" in text
        assert f"{folder / 'checkpoints'}: name a folder that all share (out)" in text
        assert "remove" not in text


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_another_mesh(runs, tmp_path):
    runs.finish(tmp_path / "first", "--steps", "6", *mesh_options((1, 8, 1)), devices=8)
    losses = []
    for shape in ((1, 8, 1), (4, 2, 1), (2, 2, 2)):
        out = tmp_path / str(shape)
        shutil.copytree(tmp_path / "first", out)
        runs.finish(out, "--steps", "12", *mesh_options(shape), devices=8)
        losses.append([line["loss"] for line in metrics(out)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


def mesh_options(shape):
    return [
        word
        for name, size in zip(("data", "fsdp", "tensor"), shape)
        for word in (f"--mesh.{name}", str(size))
    ]


def test_diffusers_samples_the_trained_folder_to_the_same_image(whole):
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(whole / "model")
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        "a red picture",
        latents=torch.tensor(latents.transpose(0, 3, 1, 2)),
        num_inference_steps=4,
        height=32,
        width=32,
        output_type="np",
    ).images
    model, params = jaxgen.load(whole / "model")
    ours = jaxgen.sample(model, params, "a red picture", latents=latents, steps=4, size=(32, 32))
    assert np.abs(ours.astype(int) - np.round(expected * 255).astype(int)).max() <= 1


def test_a_model_that_is_half_written_is_written_again(runs, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "model" / "model_index.json").unlink()
    runs.finish(out)
    assert json.loads((out / "model" / "model_index.json").read_text())
    assert_same(out, whole)
