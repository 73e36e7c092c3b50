"""Bad input to training is one line and exit code 2, before anything is read, compiled or written.

And where a run fails on the way, it says so in one line, ends, and loses nothing that was saved.
"""

import errno
import gc
import json
import os
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

from jaxgen import cli, locks, trees
from jaxgen.data.pipeline import Loader
from jaxgen.training import configs, loop, metrics, result, samples
from jaxgen.types import UserError
from tests.training.pictures import write_folder

TINY = Path(__file__).parents[1] / "assets" / "tiny"
CONFIG = """
from pathlib import Path
from jaxgen.training.recipe import *
from jaxgen.training.recipe import Mesh

config = Train(
    task={task}(model="tiny"{more}),
    data=Images(source="data", size=32),
    optimizer=AdamW(learning_rate=1e-3),
    batch_size=8,
    steps=6,
    save_every=2,
    log_every=1,
    out=Path("run"),
    mesh=Mesh({mesh}),
)
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pictures"), 16, columns=("mask",))


@pytest.fixture(scope="module")
def shapes():
    """As `trees.shapes`, in which most of the time goes to open a model; remembers."""
    known, shapes = {}, trees.shapes

    def remembered(init):
        key = type(init.__self__), init.__self__.config
        if key not in known:
            known[key] = shapes(init)
        return known[key]

    return remembered


@pytest.fixture
def here(tmp_path, monkeypatch, pictures, shapes):
    """A folder with a config, a model and data."""
    monkeypatch.setattr(trees, "shapes", shapes)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    Path("tiny").symlink_to(TINY)
    shutil.copytree(pictures, "data")
    write_config()
    return tmp_path


def write_config(task="TextToImage", more="", mesh=""):
    Path("config.py").write_text(CONFIG.format(task=task, more=more, mesh=mesh))


def write_small():
    """Little learns, on one device."""
    write_config(more=', learn=("unet/mid_block/",)', mesh="data=1")


def train(*options, code=None):
    """The command, which ends with an exit code or well."""
    if code is None:
        cli.main(["train", "config.py", *options])
        return
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "config.py", *options])
    assert stop.value.code == code


def one_line(capsys):
    """What was said, which is one line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    lines = [line for line in lines if not re.match(r"[\w ]*:? *\d+%\|", line)]  # bars
    assert len(lines) == 1, lines
    assert lines[0].startswith("jaxgen: ")
    return lines[0]


def spoil(path, old, new):
    path = Path(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def lose_pictures():
    for path in Path("data").glob("*.png"):
        path.write_bytes(b"no picture")


def other_kind(kind):
    return lambda: write_config(kind)


def other_place():
    Path("run").write_text("a file where the folder should be")


BAD = {
    # the mesh
    "mesh too large": (None, ["--mesh.data", "9"], "mesh (data 9, fsdp 1, tensor 1) does not fit"),
    "mesh of nothing": (None, ["--mesh.data", "0"], "sizes are from 1, and one of them may be -1"),
    "mesh that does not divide the batch": (
        None,
        ["--mesh.data", "3"],
        "batch_size 8 is not divisible by the 3 devices",
    ),
    "batch smaller than the devices": (None, ["--batch-size", "4"], "by the 8 devices"),
    "parts smaller than the devices": (None, ["--accumulate", "2"], "in 2 parts is not divisible"),
    # the model
    "no such model": (None, ["--task.model", "nowhere"], "no model folder or file nowhere"),
    "misspelt model": (None, ["--task.model", "tinny"], "did you mean tiny"),
    "unknown architecture": (None, ["--task.model", "fresh:minni"], "fresh:mini"),
    "unknown part": (None, ["--task.fresh", "unett"], "'unett' is not one of unet, vae"),
    "unknown prediction": (None, ["--task.prediction", "eps"], "epsilon, v_prediction, sample"),
    "zero SNR of epsilon": (None, ["--task.zero-snr", "True"], "use v_prediction"),
    "negative gamma": (None, ["--task.snr-gamma", "-1"], "snr_gamma = -1.0 is not above 0"),
    "gamma that is not a number": (None, ["--task.snr-gamma", "nan"], "task.snr_gamma = nan"),
    "another kind of model": (
        lambda: shutil.copytree(TINY, "wide") and widen("wide"),
        ["--task.model", "wide"],
        "text_to_image needs a UNet without",
    ),
    # what learns
    "pattern that fits nothing": (
        None,
        ["--task.learn", "unett/"],
        "'unett/' fits no parameter; perhaps unet/?",
    ),
    "second pattern that fits nothing": (
        None,
        ["--task.learn", "unet/", "clip/"],
        "'clip/' fits no parameter; paths begin with text_encoder/, unet/, vae/",
    ),
    "pattern that is none": (None, ["--task.learn", "unet/("], "'unet/(' is no regular expression"),
    "no pattern": (None, ["--task.learn"], "nothing learns"),
    "rates that fit nothing": (None, ["--optimizer.rates", "bios$", "2"], "'bios$' fits no param"),
    "rates that freeze all": (None, ["--optimizer.rates", ".", "0"], "nothing learns"),
    # sizes
    "size that the VAE does not divide": (
        None,
        ["--data.size", "34"],
        "data.size 34 is not divisible by the VAE's 4; 32 is",
    ),
    "buckets that the VAE does not divide": (
        None,
        ["--data.size", "30", "--data.buckets", "--data.bucket-step", "10"],
        "data.bucket_step 10 is not divisible by the VAE's 4; 8 is",
    ),
    "size that the image encoder does not read": (
        other_kind("Contrastive"),
        [],
        "task.image_size 64",
    ),
    # samples
    "sample of 17 chunks": (
        None,
        ["--samples.prompts", "a " * 1201],
        "samples: the prompt has",
    ),
    "samples of too many steps": (
        None,
        ["--samples.prompts", "a fox", "--samples.steps", "2000"],
        "samples: steps = 2000",
    ),
    "samples of a model that reads pictures": (
        other_kind("Inpainting"),
        ["--samples.prompts", "a fox"],
        "samples.prompts: this model draws from a picture",
    ),
    # the data
    "no data": (None, ["--data.source", ""], "set data.source"),
    "no such data": (None, ["--data.source", "dta"], "did you mean data?"),
    "an empty folder": (lambda: Path("empty").mkdir(), ["--data.source", "empty"], "is empty"),
    "pictures without captions": (
        lambda: Path("data/metadata.jsonl").unlink(),
        [],
        "data has no metadata.jsonl beside its 32 pictures",
    ),
    "an empty list": (lambda: Path("data/metadata.jsonl").write_text(""), [], "one line for each"),
    "a caption missing": (
        lambda: spoil("data/metadata.jsonl", '"text": "a green picture, number 1"', '"txt": "x"'),
        [],
        "line 2 has no column 'text' or 'caption'; it has file_name, txt",
    ),
    "another column": (None, ["--data.caption", "prompt"], "no column 'prompt'; it has file_name"),
    "no masks": (
        lambda: (
            write_config("Inpainting", ', masks="data"'),
            spoil("data/metadata.jsonl", "mask_file_name", "msk"),
        ),
        [],
        "has no column 'mask'",
    ),
    "pictures that are none": (
        lose_pictures,
        [],
        "in a row are bad; the first is data/0",
    ),
    "pictures that are too small": (
        None,
        ["--data.least-side", "64"],
        "48x48 is below least_side",
    ),
    "more in a bucket's batch than pictures": (
        None,
        ["--data.buckets", "--data.bucket-step", "32", "--batch-size", "24"],
        "no bucket fills a batch of 24",
    ),
    # where it is written
    "a file for a folder": (other_place, [], "cannot write run/model"),
    "a file above the folder": (
        lambda: Path("file").write_text(""),
        ["--out", "file/run"],
        "file is not a folder one may write to",
    ),
    "an endless name": (None, ["--out", "x" * 300], "File name too long"),
    "a model that is not ours": (
        lambda: (Path("run/model").mkdir(parents=True), Path("run/model/mine").write_text("")),
        [],
        "run/model exists already",
    ),
}


def widen(folder):
    """Makes a model folder one for inpainting."""
    import safetensors.numpy

    config = Path(folder, "unet", "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    weights = Path(folder, "unet", "diffusion_pytorch_model.safetensors")
    tensors = safetensors.numpy.load_file(weights)
    kernel = tensors["conv_in.weight"]
    tensors["conv_in.weight"] = np.pad(kernel, ((0, 0), (0, 5), (0, 0), (0, 0)))
    weights.unlink()
    safetensors.numpy.save_file(tensors, weights)


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_before_weights_are_read(here, capsys, monkeypatch, case):
    prepare, options, words = case
    if prepare:
        prepare()
    before = sorted(Path().rglob("*"))

    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(loop, "read_params", read)
    train(*options, code=2)
    assert words in one_line(capsys)
    assert sorted(Path().rglob("*")) == before  # nothing is written
    assert ended()


def ended():
    """Whether the threads that prepare batches and write checkpoints end by themselves."""
    deadline = time.monotonic() + 10
    names = ("grain", "save_finalize", "async_save")
    while any(t.name.startswith(names) for t in threading.enumerate()):
        time.sleep(0.01)
        if time.monotonic() > deadline:
            return False
    return True


class Compiled:
    """What jit returns, of a function that is not compiled."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def lower(self, *_):
        return self

    def compile(self):
        return self


class Steps:
    """Stands for the compiled step: counts, and has the loss it is told to have."""

    def __init__(self, name="loss", values=None):
        self.name, self.values, self.made = name, values or {}, []

    def __call__(self, *_):
        return Compiled(lambda *args: self.step(*args))

    def step(self, state, frozen, batch):
        done = state.step + 1
        found = {"loss": jnp.float32(1.0) / done, "grad_norm": jnp.float32(1.0)}
        for step, value in self.values.items():
            found[self.name] = jnp.where(done == step, value, found[self.name])
        if not isinstance(done, Tracer):
            self.made.append(int(done))
        return state._replace(step=done), found


@pytest.fixture
def steps(monkeypatch):
    """Nothing is compiled: steps only count."""
    steps = Steps()
    monkeypatch.setattr(loop, "compiled_once", steps)
    return steps


@pytest.fixture
def ran(here, steps, ran_once):
    """The folder of a run that ended well, in a folder of its own."""
    shutil.copytree(ran_once, "run")
    write_small()
    return here


@pytest.fixture(scope="module")
def ran_once(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp("ran")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
        patch.setattr(loop, "compiled_once", Steps())
        Path("tiny").symlink_to(TINY)
        shutil.copytree(pictures, "data")
        write_small()
        train()
    return folder / "run"


def content(folder):
    return {p: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def lose_a_line():
    path = Path("data/metadata.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def truncate(pattern):
    largest = max(Path("run/checkpoints/6").rglob(pattern), key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)


OTHER = {
    "another rate": (
        None,
        ["--optimizer.learning-rate", "0.01"],
        "run/checkpoints is of another run (optimizer.learning_rate: 0.001, now 0.01): "
        "undo the change, or name another folder (out)",
    ),
    "two changes": (
        None,
        ["--seed", "1", "--data.flip"],
        "(data.flip: False, now True; seed: 0, now 1)",
    ),
    "an average": (
        lambda: spoil("config.py", "batch_size", "ema=EMA(), batch_size"),
        [],
        "(ema: None, now EMA)",
    ),
    "another task": (
        lambda: write_config("Autoencoder", mesh="data=1"),
        [],
        "(task: TextToImage, now Autoencoder)",
    ),
    "fewer steps": (None, ["--steps", "5"], "is at step 6 already, beyond steps = 5"),
    "other data": (
        lose_a_line,
        ["--steps", "8"],
        "the data are not those of",
    ),
    "a damaged record": (
        lambda: truncate("record/metadata"),
        [],
        "checkpoints/6: a file in it is damaged or missing; remove it to go on from step 4",
    ),
    "checkpoints of another program": (
        lambda: Path("run/checkpoints/6/record/metadata").write_text('{"epoch": 3}'),
        [],
        "run/checkpoints is of another program; name another folder (out)",
    ),
    "a model that is not the run's": (
        lambda: Path("run/model", result.MARK).unlink(),
        ["--steps", "8"],
        "run/model exists already",
    ),
}


@pytest.mark.parametrize("case", OTHER.values(), ids=OTHER.keys())
def test_another_run_s_folder_is_refused_by_what_differs(ran, capsys, monkeypatch, case):
    prepare, options, words = case
    if prepare:
        prepare()
    before = content("run")

    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(loop, "read_params", read)
    train(*options, code=2)
    assert words in one_line(capsys)
    assert content("run") == before


def test_other_data_are_named_by_what_differs(ran, capsys):
    lose_a_line()
    train("--steps", "8", code=2)
    assert "sources.0.length: 16, now 15; sources.0.crc32: " in one_line(capsys)


def test_data_may_be_moved_and_not_exchanged(ran, capsys, steps):
    Path("data").rename("moved")
    shutil.copytree("moved", "others")
    shutil.copy("others/001.png", "others/000.png")
    train("--steps", "8", "--data.source", "others", code=2)
    assert "sources.0.some_pictures: " in one_line(capsys)
    train("--steps", "8", "--data.source", "moved")
    assert steps.made == [7, 8]


def test_bad_pictures_are_counted_in_the_metrics_of_a_run_that_is_resumed_too(here, steps):
    Path("data/003.png").write_text("no picture")

    def skipped():
        lines = Path("run/metrics.jsonl").read_text().splitlines()
        return [json.loads(line).get("skipped", 0) for line in lines]

    write_small()
    options = ("--data.bad-share", "1", "--log-every", "1", "--samples.every", "99")
    train("--steps", "9", *options)
    whole = skipped()
    shutil.rmtree("run")
    train("--steps", "4", *options)
    train("--steps", "9", *options)
    assert skipped() == whole
    assert whole == sorted(whole)
    assert whole[-1] > 1


def test_a_truncated_checkpoint_can_be_left_out(ran, capsys, steps):
    truncate("state/ocdbt.process_0/d/*")
    before = content("run")
    train("--steps", "8", code=2)
    assert "damaged or missing; remove it to go on from step 4" in one_line(capsys)
    assert content("run") == before
    shutil.rmtree("run/checkpoints/6")
    train("--steps", "8")
    assert steps.made == [5, 6, 7, 8]


def test_two_runs_do_not_write_to_one_folder(ran, capsys):
    other = locks.hold(Path("run/checkpoints"), "folder (out)")
    before = content("run")
    train("--steps", "8", code=2)
    assert "another run is writing to" in one_line(capsys)
    assert content("run") == before
    os.close(other)


def test_a_finished_run_is_done_without_its_data(ran, capsys, steps):
    shutil.rmtree("data")
    before = content("run")
    train()
    assert "the model is in run/model" in capsys.readouterr().out
    assert content("run") == before
    assert not steps.made


def test_the_model_of_an_earlier_end_is_replaced(ran, steps):
    assert result.step_of(Path("run/model")) == 6
    train("--steps", "8")
    assert steps.made == [7, 8]
    assert result.step_of(Path("run/model")) == 8


@pytest.mark.parametrize("lost", ["training.json", "model_index.json", "unet/config.json", None])
def test_a_model_that_was_lost_is_made_from_the_checkpoint(ran, steps, lost):
    expected = content("run/model")
    if lost:
        Path("run/model", lost).unlink()
    else:
        shutil.rmtree("run/model")
    if lost == "training.json":  # then nobody knows whose it is
        train(code=2)
        return
    train()
    assert content("run/model") == expected
    assert not steps.made


def test_what_a_killed_run_left_half_written_is_removed(ran):
    shutil.rmtree("run/model")
    Path("run", result.UNFINISHED, "new").mkdir(parents=True)
    Path("run/checkpoints/8.orbax-checkpoint-tmp").mkdir()
    train()
    assert sorted(p.name for p in Path("run/checkpoints").iterdir()) == ["4", "6"]
    assert not Path("run", result.UNFINISHED).exists()


def saved():
    return sorted(int(p.name) for p in Path("run/checkpoints").iterdir())


@pytest.mark.parametrize(("name", "value"), [("loss", np.nan), ("grad_norm", np.inf)])
def test_a_run_that_diverges_stops_and_keeps_what_was_good(here, capsys, monkeypatch, name, value):
    monkeypatch.setattr(loop, "compiled_once", Steps(name, {5: value}))
    write_small()
    train(code=2)
    said = one_line(capsys)
    assert (
        f"{name} is {value} at step 5; the checkpoint of step 4 is whole (steps = 4 makes" in said
    )
    assert saved() == [2, 4]
    assert not Path("run/model").exists()
    assert ended()

    before = content("run")
    train("--optimizer.learning-rate", "1e-5", code=2)
    assert "learning_rate: 0.001, now 1e-05" in one_line(capsys)
    assert content("run") == before

    train("--steps", "4")  # what there is becomes a model
    assert result.step_of(Path("run/model")) == 4


def test_a_run_that_diverges_at_once_has_no_checkpoint(here, capsys, monkeypatch):
    monkeypatch.setattr(loop, "compiled_once", Steps("loss", {1: np.nan}))
    write_small()
    train(code=2)
    assert "loss is nan at step 1; no checkpoint yet; " in one_line(capsys)
    assert saved() == []


@pytest.fixture
def disk():
    """A disk that can be full: no file takes more than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size or before[0], before[1]))

    yield limit
    limit(None)


def full_at(disk, monkeypatch, owner, name, when):
    """Fills the disk at a call of a function, if `when(*arguments)`."""
    original = getattr(owner, name)

    def call(*arguments, **keywords):
        if when(*arguments):
            disk(30_000)
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("keep", ["1", "2"])
def test_a_disk_that_is_full_at_a_checkpoint_loses_none(
    here, capsys, monkeypatch, steps, disk, keep
):
    write_small()
    with monkeypatch.context() as patch:
        full_at(
            disk, patch, loop.Checkpoints, "save", lambda self, step, *_: self.wait() or step == 4
        )
        train("--keep", keep, code=2)
        said = one_line(capsys)
        assert "cannot save step 4 in" in said
        assert said.endswith("File too large; the checkpoint of step 2 is whole")
        assert ended()
    assert saved() == [2]
    assert not Path("run/model").exists()

    disk(None)
    steps.made.clear()
    train("--keep", keep)
    assert steps.made == [3, 4, 5, 6]
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_is_full_at_the_model_leaves_no_half_of_it(
    here, capsys, monkeypatch, steps, disk
):
    write_small()
    with monkeypatch.context() as patch:
        full_at(disk, patch, result, "save", lambda *_: True)
        train(code=2)
    said = one_line(capsys)
    assert "cannot write" in said
    assert said.endswith("run/model: File too large; the checkpoint of step 6 is whole")
    assert sorted(p.name for p in Path("run").iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
    ]

    disk(None)
    steps.made.clear()
    train()
    assert not steps.made
    assert result.step_of(Path("run/model")) == 6


def test_a_disk_that_is_full_at_a_line_of_metrics_ends_the_run(here, capsys, monkeypatch, steps):
    write_small()

    def line(values):
        if values["step"] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return json.dumps({"step": values["step"]}) + "\n"

    monkeypatch.setattr(metrics, "line", line)
    train(code=2)
    said = one_line(capsys)
    assert "No space left on device; the checkpoint of step 2 is whole" in said
    assert ended()


def test_data_that_fail_on_the_way_stop_a_run_that_is_saved(here, capsys, monkeypatch, steps):
    write_small()
    following = Loader.__next__

    def until_the_fourth(self):
        if self.next_batch == 3:
            raise UserError("20 of 1000 examples are bad")
        return following(self)

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "__next__", until_the_fourth)
        train(code=2)
    assert one_line(capsys) == "jaxgen: 20 of 1000 examples are bad"
    assert saved() == [2, 3]
    assert ended()
    train()
    assert steps.made == [1, 2, 3, 4, 5, 6]


def test_devices_that_are_full_are_told_of(here, capsys, monkeypatch):
    def step(self, state, frozen, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to ...")

    monkeypatch.setattr(loop, "compiled_once", Steps())
    monkeypatch.setattr(loop.flops, "count", lambda *_: 0)
    monkeypatch.setattr(Steps, "step", step)
    write_small()
    train(code=2)
    assert "the devices have too little memory; no checkpoint yet; " in one_line(capsys)
    assert ended()


def test_samples_that_fail_do_not_stop_a_run(here, capsys, monkeypatch, steps):
    def pictures(*_):
        raise UserError("the model's output is not finite")

    monkeypatch.setattr(samples, "pictures", pictures)
    write_small()
    train("--samples.prompts", "a fox", "--samples.every", "4")
    said = capsys.readouterr().err
    assert "jaxgen: no samples of step 4: the model's output is not finite" in said
    assert steps.made == [1, 2, 3, 4, 5, 6]


def test_samples_that_devices_have_no_memory_for_do_not_stop_a_run(
    here, capsys, monkeypatch, steps
):
    def pictures(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to ...")

    monkeypatch.setattr(samples, "pictures", pictures)
    write_small()
    train("--samples.prompts", "a fox", "--samples.every", "4")
    said = capsys.readouterr().err
    assert "jaxgen: no samples of step 4: too little memory beside what trains" in said
    assert steps.made == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_stops_a_run_that_goes_on_from_there(
    here, capsys, monkeypatch, steps, number
):
    def read(*arguments):
        signal.raise_signal(number)
        return read_params(*arguments)

    def uncaught(number, frame):
        raise AssertionError("the process ends")

    write_small()
    read_params, before = loop.read_params, signal.signal(number, uncaught)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "read_params", read)
            train()
    finally:
        signal.signal(number, before)
    assert "the same command goes on from there" in capsys.readouterr().out
    assert saved() == steps.made == []
    train()
    assert steps.made == [1, 2, 3, 4, 5, 6]


def test_a_run_that_goes_on_holds_its_state_once(here, monkeypatch, steps):
    write_config(mesh="data=1")
    spoil("config.py", "batch_size", "ema=EMA(), batch_size")
    train("--steps", "1")
    gc.collect()
    before, restore, held = living(), loop.Checkpoints.restore, []

    def restored(self, *arguments):
        held.append(restore(self, *arguments))
        held.append(living() - before)
        return held.pop(0)

    monkeypatch.setattr(loop.Checkpoints, "restore", restored)
    run = loop.Run(configs.read(Path("config.py"), ["--steps", "2"]))
    run.data.close()
    state = sum(x.nbytes for x in jax.tree.leaves((run.state, run.frozen, run.batch)))
    assert held[0] < 1.05 * state


def living():
    """Bytes of all arrays on devices."""
    return sum(x.nbytes for x in jax.live_arrays())
