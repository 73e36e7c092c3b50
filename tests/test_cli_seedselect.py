"""`jaxgen seedselect`: what it writes, that it replays and goes on, and what it refuses."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

import jaxgen
from jaxgen import seedselect, sharding
from jaxgen.diffusion import shell
from jaxgen.plan import plan
from jaxgen.request import Request
from jaxgen.seedselect import references, starts
from jaxgen.types import UserError
from tests.test_cli import TINY, compile_cache, run  # noqa: F401  a fixture
from tests.torch_oracle import randomise

SHAPE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "projection_dim": 12, "image_size": 32, "patch_size": 8,
}  # fmt: skip
OPTIONS = ("--steps", "3", "--iterations", "2", "--guidance", "2", "--batch", "1")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """An image encoder as transformers saves it."""
    folder = tmp_path_factory.mktemp("judge")
    config = transformers.CLIPVisionConfig(**SHAPE)
    randomise(transformers.CLIPVisionModelWithProjection(config)).save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, judge):
    """A working folder with a model that has an image encoder, and pictures of two classes."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "tiny")
    shutil.copytree(judge, "tiny/image_encoder")
    random = np.random.default_rng(0)
    for name in ("red_fox", "owl"):
        folder = Path("classes") / name
        folder.mkdir(parents=True)
        for i in range(3 if name == "owl" else 2):
            picture = random.integers(0, 256, (50 + 30 * i, 64, 3), np.uint8)
            Image.fromarray(picture).save(folder / f"{i}.png")
    return tmp_path


def select(*arguments, code=0, images="classes/owl", out="out"):
    run("seedselect", *arguments, "--model", "tiny", "--images", images, "--out", out, code=code)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_seed_is_found_and_replayed(here, capsys):
    select("an owl", *OPTIONS, "--count", "2", "--seed", "7")
    assert "2 pictures are in out" in capsys.readouterr().out
    names = {p.name for p in Path("out").iterdir()}
    pictures = {"00000.png", "00001.png", "grid.png", "strip.png"}
    assert names == pictures | {"samples.jsonl", "seed.npz", "seeds"}
    with np.load("out/seed.npz", allow_pickle=False) as held:
        assert held["noise"].shape == (2, 16, 16, 4)
        assert (held["prompt"], held["sampler"], held["steps"]) == ("an owl", "ddim", 3)
        assert (held["guidance"], held["model"]) == (2.0, "tiny")
        assert (held["judge"], held["start"]) == ("the model's own", "gaussian")
        assert (held["weight"], held["iterations"]) == (10 / 11, 2)
    assert Image.open("out/strip.png").size == (2 * 68 - 4, 2 * 68 - 4)  # two looks, two seeds
    assert "Latents: seeds/00000.npz" in Image.open("out/00000.png").text["parameters"]
    row = json.loads(Path("out/samples.jsonl").read_text().splitlines()[1])
    assert (row["latents"], row["index"]) == ("seeds/00001.npz", 1)
    assert (row["start"], row["iterations"]) == ("gaussian", 2)
    parts = row["weight"] * row["meaning"] + (1 - row["weight"]) * row["appearance"]
    assert row["loss"] == pytest.approx(parts, abs=1e-5)
    assert row["norm"] == pytest.approx(1, abs=0.1)

    same = ("--model", "tiny", "--steps", "3", "--guidance", "2", "--sampler", "ddim")
    run("sample", "an owl", *same, "--count", "2", "--latents", "out/seed.npz", "--out", "again")
    run("sample", "an owl", *same, "--latents", "out/seeds/00001.npz", "--out", "one")
    for i, path in enumerate(("again/00000.png", "again/00001.png")):
        assert np.abs(pixels(path) - pixels(f"out/0000{i}.png")).max() <= 1
    assert np.abs(pixels("one/00000.png") - pixels("out/00001.png")).max() <= 1

    others = {"--sampler": "euler", "--steps": "4", "--guidance": "3", "--negative": "a fox"}
    for option, value in others.items():
        other = [*same, option, value]
        arguments = ("an owl", *other, "--count", "2", "--latents", "out/seed.npz")
        run("sample", *arguments, "--out", "x", code=2)
        assert f"was found under {option[2:]}" in capsys.readouterr().err

    # Seeds that were found are where the next ones start; the folder grows.
    select("an owl", *OPTIONS, "--start", "out/seeds", "--seed", "8")
    assert sorted(p.name for p in Path("out/seeds").iterdir()) == [
        *("00000.npz", "00001.npz", "00002.npz"),
    ]
    select("a fox", *OPTIONS, "--start", "out/seeds", code=2)
    assert "none of the seeds in out/seeds fits" in capsys.readouterr().err
    select("an owl", *OPTIONS, "--start", "out/seed.npz", "--sampler", "euler", code=2)
    assert "was found under sampler ddim (here euler)" in capsys.readouterr().err


@pytest.fixture
def soon(monkeypatch):
    """Norm-aware starts that are found with less care: these tests are of what starts there."""
    monkeypatch.setattr(shell, "MOST", 20)
    monkeypatch.setattr(starts, "STEPS", 5)


def test_norm_aware_starts_replay_from_two_devices(here, soon):
    few = ("--steps", "3", "--iterations", "2", "--guidance", "2", "--batch", "2")  # two devices
    rare = ("--distance", "euclidean", "--subset", "2", "--truncate", "2", "--remat")
    shutil.move("tiny/image_encoder", "eyes")  # a judge of its own
    select("an owl", *few, "--start", "nao", "--count", "2", *rare, "--judge", "eyes")
    with np.load("out/seed.npz") as held:
        nao, name = held["noise"].reshape(2, -1), held["judge"]
    assert np.abs(nao[0] - nao[1]).max() > 0
    assert name == "eyes"
    same = ("--steps", "3", "--guidance", "2", "--sampler", "ddim", "--model", "tiny")
    run("sample", "an owl", *same, "--latents", "out/seeds/00001.npz", "--out", "nao")
    assert np.abs(pixels("nao/00000.png") - pixels("out/00001.png")).max() <= 1


@pytest.mark.slow
def test_a_seed_of_edict_replays(here):
    select("an owl", *OPTIONS, "--sampler", "edict", out="edict")
    same = ("--steps", "3", "--guidance", "2", "--sampler", "edict", "--model", "tiny")
    run("sample", "an owl", *same, "--latents", "edict/seed.npz", "--out", "again")
    assert np.abs(pixels("again/00000.png") - pixels("edict/00000.png")).max() <= 1


def test_classes_become_a_training_folder_that_goes_on(here, capsys):
    few = partial(select, "a {}, small", *OPTIONS, "--contrast", "0.1", images="classes")
    few("--count", "5")
    assert "10 pictures of 2 classes are in out" in capsys.readouterr().out
    lines = Path("out/metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 10
    assert all((Path("out") / row["file_name"]).is_file() for row in rows)
    assert {(row["class"], row["text"]) for row in rows} == {
        ("owl", "a owl, small"),
        ("red_fox", "a red fox, small"),
    }
    made = {row["file_name"]: row for row in rows if row["origin"] == "seedselect"}
    assert len(made) == 5
    assert sum(name.startswith("owl") for name in made) == 2  # all classes have five

    before = {name: pixels(Path("out") / name) for name in made}
    lost = [*made][-2:]  # as if the run had been stopped while it drew these
    kept = [line for line in lines if json.loads(line)["file_name"] not in lost]
    cut = '\n{"file_name": "caf\u00e9'.encode()[:-1]  # in a letter of this line
    Path("out/metadata.jsonl").write_bytes("\n".join(kept).encode() + cut)
    (Path("out") / lost[0]).unlink()
    few("--count", "5")
    assert len(Path("out/metadata.jsonl").read_text().splitlines()) == 10
    for name, picture in before.items():
        assert np.abs(pixels(Path("out") / name) - picture).max() <= 1

    (Path("out") / lost[0]).rename("elsewhere.png")
    few("--count", "5", code=2)
    assert f"lists {lost[0]}, which is gone" in capsys.readouterr().err
    Path("elsewhere.png").rename(Path("out") / lost[0])
    Path("classes/red_fox").rename("classes/red-fox")
    few("--count", "5", code=2)
    assert "was begun with classes = ['owl', 'red_fox']" in capsys.readouterr().err
    Path("classes/red-fox").rename("classes/red_fox")

    few("--count", "5", "--seed", "3", code=2)
    assert "was begun with seed = 0 (now 3)" in capsys.readouterr().err
    few("--count", "2", code=2)
    assert "every class has --count 2" in capsys.readouterr().err
    few("--count", "6")  # it grows, by one of each class near those that were found
    assert "12 pictures of 2 classes are in out" in capsys.readouterr().out
    for name, picture in before.items():
        assert np.abs(pixels(Path("out") / name) - picture).max() <= 1
    with np.load("out/seeds/red_fox/00003.npz") as held:
        assert (held["start"], held["judge"]) == ("near others", "the model's own")
    few("--count", "5", code=2)
    assert "was begun with count = 6 (now 5); use the same, or more" in capsys.readouterr().err

    shutil.copy("classes/owl/0.png", "classes/owl/3.png")  # real pictures are never left out
    few("--count", "3", out="new")
    said = capsys.readouterr()
    assert "owl: more references than 3 pictures" in said.err
    assert "7 pictures of 2 classes are in new" in said.out


def test_a_class_whose_first_seed_fails_goes_on(here, capsys, monkeypatch):
    """The next search for it is as long as the first; seeds start near all of the rounds before."""
    from jaxgen.seedselect import search

    begin, near, begun = search.begin, starts.spread, []

    def fails(seeds):
        begun.append(len(begun))
        return begin(seeds * np.nan if len(begun) == 1 else seeds)

    def spread(held, seed, number, variety):
        begun.append((number, len(held)))
        return near(held, seed, number, variety)

    monkeypatch.setattr(search, "begin", fails)
    monkeypatch.setattr(starts, "spread", spread)
    shutil.rmtree("classes/red_fox")
    select("a {}", *OPTIONS, "--count", "8", images="classes")
    assert "image 0 of 'a owl' is left out: its loss is not finite" in capsys.readouterr().err
    rows = map(json.loads, Path("out/metadata.jsonl").read_text().splitlines())
    numbers = [row["index"] for row in rows if row["origin"] == "seedselect"]
    assert numbers == [1, 2, 3, 4]
    assert [one for one in begun if isinstance(one, tuple)] == [(2, 1), (3, 1), (4, 3)]


@pytest.mark.slow
def test_norm_aware_classes_start_each_picture_for_itself(here, soon, capsys, monkeypatch):
    """Not near seeds found; the references of a class are inverted once, whatever its count."""
    inverted, seen = starts.inverted, []

    def counted(*arguments):
        seen.append(arguments[3])  # the prompt
        return inverted(*arguments)

    monkeypatch.setattr(starts, "inverted", counted)
    nao = partial(select, "a {}", *OPTIONS, "--start", "nao", images="classes")
    nao("--count", "5")
    assert seen == [0, 1]
    found = sorted(Path("out/seeds").glob("*/*.npz"))
    assert [str(p.relative_to("out/seeds")) for p in found] == [
        *("owl/00000.npz", "owl/00001.npz"),
        *("red_fox/00000.npz", "red_fox/00001.npz", "red_fox/00002.npz"),
    ]

    def read(path):
        with np.load(path) as held:
            assert (held["start"], held["variety"]) == ("nao", 0.3)
            return held["noise"]

    first, second = (read(f"out/seeds/red_fox/{n:05}.npz").ravel() for n in (0, 1))
    assert np.corrcoef(first, second)[0, 1] < 0.94  # near others: sqrt(1 - 0.3 ** 2) or more

    nao("--count", "6", "--variety", "0.5", code=2)
    assert "was begun with variety = 0.3 (now 0.5)" in capsys.readouterr().err
    lines = Path("out/metadata.jsonl").read_text().splitlines()
    kept = [line for line in lines if "red_fox/00001.png" not in line]  # as if it had been stopped
    Path("out/metadata.jsonl").write_text("\n".join(kept) + "\n")
    nao("--count", "6")  # it grows, too; starts do not depend on how many there are
    np.testing.assert_allclose(read("out/seeds/red_fox/00001.npz").ravel(), second, atol=1e-4)
    assert len(Path("out/metadata.jsonl").read_text().splitlines()) == 12


def test_any_score_takes_the_place_of_meaning_and_branches_take_part(here):
    from tests.test_controls import from_unet

    import diffusers  # isort: skip

    unet = diffusers.UNet2DConditionModel.from_pretrained("tiny", subfolder="unet")
    from_unet(unet).save_pretrained("net")
    model, params = jaxgen.load("tiny", control=["net"])
    hint = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    asked = {"prompts": ["a"], "sampler": "ddim", "steps": 3, "guidance": 2.0, "seed": 1}
    checked = plan(model, Request(control=hint, **asked))

    def dark(params, rows, images):
        return images.mean((1, 2, 3))

    how = seedselect.Search(iterations=3, weight=1.0)
    search = partial(seedselect.select, model, params, score=seedselect.Score(dark))
    (found,) = search(checked, [[]], how)  # no references: the score is all
    assert found.loss < found.history["loss"][0]
    assert found.loss == pytest.approx(found.meaning, rel=1e-6)
    again = jaxgen.sample(model, params, control=hint, latents=found.seed[None], **asked)
    assert np.abs(again[0].astype(int) - found.image).max() <= 1
    without, bare = jaxgen.load("tiny")
    other = jaxgen.sample(without, bare, latents=found.seed[None], **asked)
    assert np.abs(other[0].astype(int) - found.image).max() > 1

    with pytest.raises(UserError, match="a prompt has no references"):
        search(checked, [[]], replace(how, weight=0.9))


def test_references_are_inverted_under_the_hint_of_their_prompt(here, soon):
    """As it was given, whatever the ControlNet reads: here pictures of one channel."""
    from tests.test_controls import from_unet

    import diffusers  # isort: skip

    unet = diffusers.UNet2DConditionModel.from_pretrained("tiny", subfolder="unet")
    from_unet(unet, conditioning_channels=1).save_pretrained("net")
    model, params = jaxgen.load("tiny", control=["net"])
    hints = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    latents = np.random.default_rng(1).standard_normal((1, 16, 16, 4)).astype(np.float32)

    def inverted(prompt, prompts, hint):
        asked = {"sampler": "ddim", "steps": 3, "prompts": prompts}
        checked = plan(model, Request(control=jaxgen.Hint(hint, span=(0, 0.7)), **asked))
        mesh = sharding.data_mesh(1)
        return starts.inverted(model, params, checked, prompt, latents, mesh)

    both = [inverted(i, ["a", "a"], hints) for i in (0, 1)]
    assert np.abs(both[0] - both[1]).max() > 1e-3
    np.testing.assert_array_equal(both[1], inverted(0, ["a"], hints[1]))


def test_references_are_cut_to_the_middle(here):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert references.fit(wide, 8, 8).min() > 200
    for folder, count in (("classes/owl", 3), ("classes/red_fox", 2)):
        assert len(references.find(Path(folder))) == count
    chosen = [references.subset(5, 3, 0, i) for i in range(20)]
    assert len({tuple(c) for c in chosen}) > 3
    np.testing.assert_array_equal(references.subset(5, 3, 0, 4), chosen[4])
    assert len(references.subset(3, 5, 0, 0)) == 3


BAD = [
    (["a {}", "--images", "twice"], "the classes a b and a_b have one prompt, 'a a b'"),
    (["x", "--images", "classes/owl", "--model", "fresh:mini"], "fresh:mini has no image encoder"),
    (["x", "--images", "nowhere"], "no folder of pictures nowhere"),
    (["x", "--images", "empty"], "empty holds no pictures"),
    (["x", "--images", "broken"], "broken/a.png"),
    (["x", "--images", "mixed"], "mixed holds both pictures (a.png) and folders (owl)"),
    (["x", "--images", "classes"], "has no {} for the class's name"),
    (["--images", "classes/owl"], "no prompt is given"),
    (["x", "--images", "classes/owl", "--model", "plain"], "plain has no image encoder of its own"),
    (["x", "--images", "classes/owl", "--judge", "plain"], "plain is no CLIP folder"),
    (["x", "--images", "classes/owl", "--start", "none"], "--start none is neither"),
    (["x", "--images", "classes/owl", "--start", "small.npz"], "small.npz is float32 [1, 8, 8, 4]"),
    (["x", "--images", "classes/owl", "--start", "empty"], "empty holds no seeds"),
    (["x", "--images", "classes/owl", "--weight", "2"], "weight = 2.0"),
    (["x", "--images", "classes/owl", "--variety", "1.5"], "variety = 1.5"),
    (["x", "--images", "classes/owl", "--iterations", "-1"], "iterations = -1"),
    (["x", "--images", "classes/owl", "--contrast", "1"], "contrast needs a judge and other"),
    (["x", "--images", "classes/owl", "--truncate", "30"], "truncate = 30 is more than the 20"),
    (["x", "--images", "classes/owl", "--sampler", "none"], "sampler 'none'"),
    (["a {}", "--images", "classes", "--start", "small.npz", "--count", "9"], "gaussian or nao"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input_is_one_line(here, capsys, arguments, words):
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/a.png").write_bytes(b"no picture")
    for name in ("a_b", "a b"):
        shutil.copytree("classes/owl", Path("twice") / name)
    shutil.copytree("classes", "mixed")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("mixed/a.png")
    shutil.copytree(TINY, "plain")
    np.savez("small.npz", noise=np.zeros((1, 8, 8, 4), np.float32))
    before = sorted(Path().iterdir())
    given = [] if "--model" in arguments else ["--model", "tiny"]
    given += [] if "--out" in arguments else ["--out", "out"]
    run("seedselect", *arguments, *given, code=2)
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert sorted(Path().iterdir()) == before


def test_a_single_reference_is_allowed_and_said(here, capsys):
    Path("one").mkdir()
    shutil.copy("classes/owl/0.png", "one/only.png")
    select("an owl", *OPTIONS, "--dtype", "bf16", images="one")
    assert "one holds a single picture" in capsys.readouterr().err
