"""Config files and options: what is wrong with one is said in a line, with the nearest name."""

import json
from functools import partial
from pathlib import Path

import pytest

from jaxgen import cli, terminal
from jaxgen.tasks.contrastive import Contrastive
from jaxgen.tasks.denoising import TextToImage
from jaxgen.training import configs
from jaxgen.training.ema import EMA
from jaxgen.training.recipe import AdamW, Images, Mesh, Samples, Train, differences, fields
from jaxgen.types import UserError

HEAD = "from pathlib import Path\nfrom jaxgen.training.recipe import *\n\n"
WELL = 'Train(task=TextToImage(model="m"), data=Images(source="d"))'
RECIPE = Train(task=TextToImage(model="m"), data=Images(source="d"))


def read(text, *options, path="config.py"):
    Path(path).write_text(text)
    return configs.read(Path(path), options, partial(terminal.parse, prog="jaxgen train config.py"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def stated(value):
    return f"{HEAD}config = {value}\n"


def fails(call, *arguments):
    """The error of a call, which is one line."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


BAD_FILES = {
    "no Python": (
        "config = Train(\nsteps: 3",
        "line 1: not Python: '(' was never closed",
    ),
    "another format": (
        "steps: 3\nmodel: sd15\n---\n",
        "line 3: not Python: invalid syntax",
    ),
    "nothing": ("", "config.py does not state config = Train(...)"),
    "the class itself": (HEAD + "config = Train", "does not state config = Train(...)"),
    "another name": (f"{HEAD}cfg = {WELL}", "does not state config = Train(...); was cfg meant?"),
    "an error of its own": (
        HEAD + "x = 1 / 0",
        "line 4: ZeroDivisionError: division by",
    ),
    "an error without words": ("assert False", "config.py, line 1: AssertionError"),
    "an end of its own": ("import sys\nsys.exit(3)", "config.py, line 2: SystemExit: 3"),
    "a misspelt class": (
        HEAD + "config = Trian()",
        "line 4: NameError: name 'Trian' is not defined; perhaps Train?",
    ),
    "a misspelt import": (
        "from jaxgen.training.recipe import TextToImages",
        "perhaps TextToImage?",
    ),
    "a misspelt attribute": ("import json\njson.lods", "perhaps loads?"),
    "an unknown field": (
        stated("Train(task=TextToImage(), data=Images(), batchsize=4)"),
        "config.py, line 4: Train has no field 'batchsize'; perhaps batch_size?",
    ),
    "an unknown field within": (
        stated('Train(task=TextToImage(modle="m"), data=Images())'),
        "TextToImage has no field 'modle'; perhaps model?",
    ),
    "an unknown field like no other": (
        stated("EMA(zzz=1)"),
        "EMA has no field 'zzz'; there are",
    ),
    "a field that is absent": (
        stated("Train(task=TextToImage())"),
        "line 4: Train needs 'data'",
    ),
    "words for a number": (
        stated('Train(task=TextToImage(), data=Images(), steps="many")'),
        "config.py, line 4: Train: steps = 'many' is not of type int",
    ),
    "words for a size": (
        stated('Images(size="512")'),
        "Images: size = '512' is not of type int",
    ),
    "a number for a source": (
        stated("Images(source=5)"),
        "source = 5 is not of type str |",
    ),
    "words for an average": (
        stated('EMA(decay="0.9")'),
        "decay = '0.9' is not of type finite",
    ),
    "a half for steps": (
        stated("Train(task=TextToImage(), data=Images(), steps=2.5)"),
        "config.py: steps = 2.5 is not of type int",
    ),
    "words for a path": (
        stated('Train(task=TextToImage(), data=Images(), out="runs/a")'),
        "config.py: out = 'runs/a' is not of type Path",
    ),
    "a list for a tuple": (
        stated('Train(task=TextToImage(learn=["unet/"]), data=Images())'),
        "task.learn = ['unet/'] is not of type tuple[str, ...]",
    ),
    "another choice": (
        stated('Train(task=TextToImage(), data=Images(crop="middle"))'),
        "data.crop = 'middle' is not one of 'center', 'random'",
    ),
    "another kind of thing": (
        stated('Train(task="TextToImage", data=Images())'),
        "task = 'TextToImage' is not of type TextToImage | Inpainting | Editing",
    ),
    "no number": (
        stated('Train(task=TextToImage(snr_gamma=float("nan")), data=Images())'),
        "task.snr_gamma = nan is not of type finite number | None",
    ),
    "a value out of range": (
        stated("Train(task=TextToImage(), data=Images(), optimizer=AdamW(learning_rate=-1))"),
        "config.py, line 4: learning_rate = -1 is not a number from 0",
    ),
    "an unknown dtype": (
        stated('Train(task=TextToImage(), data=Images(), dtype="f8")'),
        "dtype = 'f8' is not one of f32, bf16",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_explained(case):
    text, words = case
    assert words in fails(read, text)


def test_a_file_that_is_not_there_may_be_another_one():
    Path("mini.py").write_text("")
    assert fails(configs.read, Path("mimi.py"), ()) == "no config file mimi.py; perhaps mini.py?"
    assert fails(configs.read, Path("far/away.py"), ()) == "no config file far/away.py"


def test_a_file_of_bytes_is_explained():
    Path("config.py").write_bytes(bytes(range(256)) * 4)
    assert "config.py" in fails(configs.read, Path("config.py"), ())


BAD_OPTIONS = {
    "a misspelt option": (["--stepz", "4"], "no option --stepz; perhaps --steps?"),
    "a misspelt option within": (
        ["--optimizer.learning-rte", "3"],
        "no option --optimizer.learning-rte; perhaps --optimizer.learning-rate?",
    ),
    "a misspelt part": (
        ["--optimzer.learning-rate", "3"],
        "no option --optimzer.learning-rate; perhaps --optimizer.learning-rate?",
    ),
    "an option of what is not there": (["--ema.decay", "0.9"], "no option --ema.decay"),
    "a word too many": (["steps", "4"], "no option steps, 4"),
    "words for a number": (["--steps", "many"], "--steps: 'many' is no whole number"),
    "words for a fraction": (["--ema", "x"], "no option --ema"),
    "words for a rate": (["--optimizer.learning-rate", "x"], "learning-rate: 'x' is no number"),
    "words where none may be": (
        ["--task.snr-gamma", "x"],
        "'x' is not {None}|FLOAT",
    ),
    "no value": (["--steps"], "Missing value for argument '--steps'"),
    "another choice": (["--data.crop", "middle"], "'middle' for argument '--data.crop'"),
    "no steps": (["--steps", "0"], "steps = 0 is not a whole number from 1"),
    "no batch": (["--batch-size", "0"], "batch_size = 0 is not a whole number from 1"),
    "no samples": (["--samples.every", "0"], "samples: every = 0 is not a whole number from 1"),
    "a batch of odd parts": (
        ["--accumulate", "3"],
        "8 is not divisible by accumulate 3",
    ),
    "an unknown dtype": (["--dtype", "f8"], "dtype = 'f8' is not one of f32, bf16"),
    "half a profile": (["--profile", "3"], "'--profile'. Expected 2 values"),
    "a profile upside down": (["--profile", "10", "3"], "profile = 10 3 is not a first and a last"),
    "an infinite number": (["--task.snr-gamma", "inf"], "options: task.snr_gamma = inf is not"),
    "a seed too large": (["--seed", "4294967296"], "seed = 4294967296 is not within"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_a_bad_option_is_explained(case):
    options, words = case
    assert words in fails(read, stated(WELL), *options)


def test_an_error_of_an_option_tells_where_the_options_are():
    said = fails(read, stated(WELL), "--stepz", "4")
    assert said.endswith("; see jaxgen train config.py --help")


def test_options_change_the_fields_of_a_file():
    options = ["--steps", "7", "--optimizer.learning-rate", "1e-3", "--mesh.fsdp", "2"]
    recipe = read(stated(WELL), *options, "--task.learn", "unet/", "vae/", "--out", "b")
    assert (recipe.steps, recipe.optimizer.learning_rate, recipe.mesh) == (7, 1e-3, Mesh(fsdp=2))
    assert (recipe.task.learn, recipe.out) == (("unet/", "vae/"), Path("b"))
    assert recipe.task.model == "m"


def test_rules_of_a_mesh_are_pairs_of_words():
    recipe = read(stated(WELL), "--mesh.rules", "attn", "fsdp", "kernel$", ". . fsdp tensor")
    assert recipe.mesh.rules == (("attn", "fsdp"), ("kernel$", ". . fsdp tensor"))


def test_the_configs_of_the_repository_are_read():
    for path in (Path(cli.__file__).parents[1] / "configs").glob("*.py"):
        assert isinstance(configs.read(path, ()), Train)


def changed(**values):
    return json.loads(json.dumps(fields(RECIPE))), fields(RECIPE.__class__(**vars(RECIPE) | values))


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 7, "out": Path("b"), "keep": 5, "save_every": 3, "log_every": 2},
        {"mesh": Mesh(fsdp=2), "accumulate": 2, "remat": True, "profile": (1, 2)},
        {"samples": Samples(prompts=("a fox",)), "data": Images(source="d", workers=2, threads=1)},
        {"data": Images(source="moved", bad_share=0.5)},  # that it is the same, its content tells
    ],
)
def test_what_changes_nothing_that_is_learned_is_no_difference(values):
    assert differences(*changed(**values)) == []


def test_differences_are_named_once():
    assert differences(*changed(seed=1)) == ["seed: 0, now 1"]
    assert differences(*changed(ema=EMA())) == ["ema: None, now EMA"]
    assert differences(*changed(optimizer=AdamW(learning_rate=1.0, no_decay=("bias$",)))) == [
        "optimizer.learning_rate: 0.0001, now 1.0",
        "optimizer.no_decay: [], now ['bias$']",
    ]


def test_the_parts_of_a_batch_are_what_a_contrastive_loss_compares():
    one = Train(task=Contrastive(), data=Images(source="d"))
    two = Train(task=Contrastive(), data=Images(source="d"), accumulate=2)
    assert differences(fields(one), fields(two)) == ["accumulate: 1, now 2"]
