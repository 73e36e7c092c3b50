"""Training from a cache is training from its pictures; what a cache cannot serve is refused."""

import dataclasses
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import cache as caching
from jaxgen import cli, locks
from jaxgen.cache import Encoders, cache
from jaxgen.data.pipeline import Images, Loader
from jaxgen.data.sources import open_source
from jaxgen.load import open_model, read_params
from jaxgen.tasks import base
from jaxgen.tasks.autoencoder import Autoencoder
from jaxgen.tasks.contrastive import Contrastive
from jaxgen.tasks.denoising import Editing, Inpainting, TextToImage
from jaxgen.training import loop
from jaxgen.training import step as steps
from jaxgen.training.recipe import AdamW, Mesh, Train
from jaxgen.types import UserError
from tests.torch_oracle import error, quick_jit
from tests.training.pictures import write_folder

TINY = str(Path("tests/assets/tiny").resolve())
COUNT, SIDE, BATCH = 14, 32, 4  # the last batch is not full
TASK = TextToImage(model=TINY)
LAST = ("unet/conv_norm_out/", "unet/conv_out/")  # little to differentiate, and to compile


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of 48x48, some of whose captions say left or right, wider than they are high."""
    folder = write_folder(tmp_path_factory.mktemp("data") / "photos", COUNT)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for line in lines[::5]:
        line["note"] = "seen from the left"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def recipe(source, out="runs", task=TASK, **data):
    return Train(
        task=task,
        data=Images(**({"source": source, "size": SIDE, "caption_dropout": 0.0} | data)),
        optimizer=AdamW(learning_rate=1e-3),
        batch_size=BATCH,
        mesh=Mesh(data=1),
        out=Path(out),
    )


@pytest.fixture(scope="module")
def cached(photos, tmp_path_factory):
    """The cache of the pictures and of mirrored ones, made on two devices."""
    wanted = dataclasses.replace(recipe(photos, flip=True), mesh=Mesh(data=2))
    return str(cache(wanted, tmp_path_factory.mktemp("caches") / "cached", progress=False))


@pytest.fixture(scope="module")
def model():
    """The tiny model and its tensors; its parameters."""
    model, tensors = open_model(TINY)
    return model, tensors, read_params(tensors)


@pytest.fixture
def no_model(monkeypatch):
    """Means of pixels for latents, and of letters for words: nothing is compiled."""

    def posterior(self, images):
        means = images.reshape(len(images), 8, SIDE // 8, 8, SIDE // 8, 3).mean((2, 4)) / 255
        mean = np.concatenate([means, means[..., :1]], -1).astype(np.float16)
        return mean, np.ones_like(mean)

    def embeddings(self, captions):
        shape = (self.model.tokenizer.length, self.model.text_encoder.config.hidden_size)
        words = [np.full(shape, sum(map(ord, text)) % 1000) for text in captions]
        return {"embeddings": np.array(words, np.float16)} if len(self.params) == 2 else {}

    monkeypatch.setattr(Encoders, "posterior", posterior)
    monkeypatch.setattr(Encoders, "embeddings", embeddings)


def take(count, wanted, task, start=0):
    loader = Loader(wanted.data, task.example, BATCH, wanted.seed, start)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


@pytest.fixture(scope="module")
def programs():
    return {}


def losses(wanted, programs, count=10):
    """Of the first steps; a step is compiled once for pictures and once for a cache."""
    run = loop.Run(wanted)
    kind = bool(wanted.data.caches())
    if kind not in programs:
        made = steps.make(run.task, run.transform, None, wanted.seed, jnp.float32)
        programs[kind] = quick_jit(made)
    found = []
    with run.loader():
        for _ in range(count):
            run.state, metrics = programs[kind](run.state, run.frozen, run._next_batch())
            found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize("varied", [False, True], ids=["as they are", "mirrored and dropped"])
def test_ten_steps_from_a_cache_are_those_from_the_pictures(
    photos, cached, programs, tmp_path, varied
):
    data = {"flip": True, "caption_dropout": 0.3} if varied else {}
    task = TextToImage(model=TINY, learn=LAST)
    expected = losses(recipe(photos, tmp_path / "a", task, **data), programs)
    actual = losses(recipe(cached, tmp_path / "b", task, **data), programs)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert np.ptp(expected) > 1e-2  # the steps differ, so that another order would show


@pytest.mark.parametrize("start", [0, 1000])
def test_every_place_holds_what_the_model_makes_of_its_picture(photos, cached, model, start):
    parts, _, params = model
    task = TASK.build(parts)
    data = {"flip": True, "caption_dropout": 0.5}
    plain = take(4, recipe(photos, **data), task, start)
    ours = take(4, recipe(cached, **data), task, start)
    posterior = quick_jit(partial(base.posterior_of, parts))
    text = quick_jit(partial(base.text_of, parts))
    empty = base.tokens_of(parts.tokenizer, "")
    dropped, differs = 0, 0
    for pictures, stored in zip(plain, ours):
        assert stored.keys() == {"mean", "std", "embeddings", "place"}
        np.testing.assert_array_equal(stored["place"], pictures["place"])
        mean, std = posterior(params, {"image": pictures["image"]})
        assert error(stored["mean"], mean) < 1e-3
        assert error(stored["std"], std) < 1e-3
        assert error(stored["embeddings"], text(params, {"ids": pictures["ids"]})) < 1e-3
        dropped += (pictures["ids"] == empty).all(1).sum()
    unflipped = take(4, recipe(cached, caption_dropout=0.0), task, start)
    for one, other in zip(ours, unflipped):
        differs += (one["mean"] != other["mean"]).any((1, 2, 3)).sum()
    assert 0 < dropped < 16
    assert 0 < differs < 16


def test_a_cached_run_is_resumed_at_any_batch(cached, model):
    task = TASK.build(model[0])
    wanted = recipe(cached, flip=True, caption_dropout=0.3)
    whole = take(9, wanted, task)
    for start in (1, 6):
        for one, other in zip(take(3, wanted, task, start), whole[start:]):
            for name in other:
                np.testing.assert_array_equal(one[name], other[name])


def test_workers_read_a_cache_as_threads_do(cached, model):
    task = TASK.build(model[0])
    wanted = recipe(cached, flip=True, caption_dropout=0.3)
    spread = recipe(cached, flip=True, caption_dropout=0.3, workers=2, threads=1)
    for one, other in zip(take(3, spread, task), take(3, wanted, task)):
        for name in other:
            np.testing.assert_array_equal(one[name], other[name])


def test_a_cache_says_what_it_is(photos, cached):
    told = json.loads(Path(cached, "cache.json").read_text())
    assert (told["examples"], told["skipped"], told["shards"]) == (COUNT, 0, 1)
    assert (told["size"], told["flip"], told["model"]) == (SIDE, True, TINY)
    assert told["source"] == open_source(photos).fingerprint()
    assert told["latents"] == [SIDE // 4, SIDE // 4, 4]
    example = open_source(cached)[3]
    assert example["caption"] == "a grey picture, number 3"
    assert "mirrored_mean" in example
    assert "mirrored_mean" not in open_source(cached)[5]  # a note says left
    assert sorted(p.name for p in Path(cached).parent.iterdir()) == ["cached"]


@pytest.mark.usefixtures("no_model")
def test_shards_keep_the_order(photos, tmp_path, monkeypatch):
    one = open_source(str(cache(recipe(photos), tmp_path / "one", progress=False)))
    size = 2 * (2 * 8 * 8 * 4 + 77 * one.description.text[1])
    monkeypatch.setattr(caching, "SHARD_BYTES", 4 * size)
    more = open_source(str(cache(recipe(photos), tmp_path / "more", progress=False)))
    assert more.description.shards == 4
    for i in range(COUNT):
        assert more[i]["caption"] == one[i]["caption"] == f"{one[i]['caption'][:-2].strip()} {i}"
        np.testing.assert_array_equal(more[i]["mean"], one[i]["mean"])
    (tmp_path / "more" / "data-00001-of-00004.array_record").unlink()
    with pytest.raises(UserError, match="has 3 of its 4 files of records"):
        open_source(str(tmp_path / "more"))


@pytest.mark.usefixtures("no_model")
def test_bad_pictures_are_left_out_counted_and_named(tmp_path, monkeypatch, caplog):
    folder = write_folder(tmp_path / "data", COUNT)
    (folder / "002.png").write_text("no picture")
    (folder / "013.png").unlink()
    plain = Encoders.posterior

    def posterior(self, images):
        mean, std = plain(self, images)
        monkeypatch.setattr(Encoders, "posterior", plain)
        return np.where(np.arange(len(mean))[:, None, None, None] == 1, np.inf, mean), std

    monkeypatch.setattr(Encoders, "posterior", posterior)
    with caplog.at_level(logging.WARNING):
        found = open_source(str(cache(recipe(str(folder)), tmp_path / "out", progress=False)))
    assert [found[i]["caption"][-2:].strip() for i in range(3)] == ["0", "3", "4"]
    assert (len(found), found.description.skipped) == (11, 3)
    said = " ".join(record.message for record in caplog.records)
    for words in ("002.png: none of PNG", "013.png: no such file", "001.png: what the model makes"):
        assert words in said

    monkeypatch.setattr(Encoders, "posterior", posterior)
    with pytest.raises(UserError, match=r"3 of 14 examples are bad, .*; the first is .*00[12].png"):
        cache(recipe(str(folder), bad_share=0.002), tmp_path / "strict", progress=False)
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"all 14 examples are bad; the first is .*no such file"):
        cache(recipe(str(folder), bad_share=1.0), tmp_path / "none", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "out"]


@pytest.mark.usefixtures("no_model")
def test_an_error_midway_leaves_nothing(photos, tmp_path, monkeypatch):
    embeddings = Encoders.embeddings

    def stop(self, captions):
        if any(text.endswith("number 9") for text in captions):
            raise KeyboardInterrupt
        return embeddings(self, captions)

    monkeypatch.setattr(Encoders, "embeddings", stop)
    with pytest.raises(KeyboardInterrupt):
        cache(recipe(photos), tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_model")
def test_sigterm_is_as_ctrl_c(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(Encoders, "embeddings", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        cache(recipe(photos), tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("no_model")
def test_a_full_disk_leaves_nothing(photos, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, before[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot write to .*File too large$"):
            cache(recipe(photos), tmp_path / "out", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_model")
def test_what_killed_commands_left_is_removed_and_what_others_write_is_not(photos, tmp_path):
    left, used = (tmp_path / f".out.unfinished-{name}" for name in ("left", "used"))
    mine = tmp_path / ".out-of-the-way"
    for folder in (left, used, mine):
        folder.mkdir()
    held = locks.hold(used, "--out")
    cache(recipe(photos), tmp_path / "out", progress=False)
    os.close(held)
    assert sorted(tmp_path.iterdir()) == sorted([mine, used, tmp_path / "out"])


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from jaxgen.cache import Encoders, cache
from jaxgen.training.recipe import Images, TextToImage, Train

def posterior(self, images, calls=[]):
    calls.append(1)
    if len(calls) == 3:
        print("began", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return (np.zeros((len(images), 8, 8, 4), np.float16),) * 2

Encoders.posterior = posterior
Encoders.embeddings = lambda self, captions: {}
model, source, out = sys.argv[1:]
cache(Train(TextToImage(model=model), Images(source, size=32), batch_size=4), Path(out))
"""


@pytest.mark.usefixtures("no_model")
def test_a_kill_midway_leaves_no_folder_and_the_same_command_works(photos, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, TINY, photos, str(out)]
    path = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=path)
    assert (done.stdout, done.returncode) == ("began\n", -signal.SIGKILL), done.stderr
    assert not out.exists()
    out.mkdir()  # an empty one is taken
    assert cache(recipe(photos), out, progress=False) == out
    assert len(open_source(str(out))) == COUNT
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("no_model")
def test_where_the_text_encoder_learns_latents_alone_are_stored(photos, cached, model, tmp_path):
    parts, tensors, _ = model
    task = TextToImage(model=TINY, learn=("unet/", "text_encoder/"))
    wanted = recipe(photos, task=task)
    found = open_source(str(cache(wanted, tmp_path / "out", progress=False)))
    assert "embeddings" not in found[0]
    wanted = recipe(found.ref, task=task, caption_dropout=1.0)
    base.check_caches(task.build(parts), tensors, wanted.data)
    (batch,) = take(1, wanted, task.build(parts))
    assert batch.keys() == {"mean", "std", "ids", "place"}
    np.testing.assert_array_equal(batch["ids"][0], base.tokens_of(parts.tokenizer, ""))
    with pytest.raises(UserError, match=r"^text_encoder/.* learns, and .*/cached holds what"):
        base.check_caches(task.build(parts), tensors, recipe(cached).data)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        (TASK, {"crop": "random"}, r"data.crop = 'random': a cache holds the centre"),
        (TASK, {"buckets": True, "bucket_step": 16}, r"data.buckets = True: a cache holds"),
        (TASK, {"columns": ("file_name",)}, r"data.columns = \('file_name',\): a cache holds"),
        (TASK, {"source": "several"}, r"names several sources: cache each"),
        (TASK, {"source": "cached"}, r"/cached is a cache already"),
        (TextToImage(model=TINY, learn=("vae/",)), {}, r"^vae/\S+ learns, so that its latents"),
        (Autoencoder(model=TINY), {}, r"the task reads pictures; only text to image"),
        (Inpainting(model=TINY), {}, r"the task reads pictures; only text to image"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_what_cannot_be_cached_is_refused(photos, cached, tmp_path, task, data, message):
    sources = {"cached": cached, "several": (("a", 1.0), ("b", 2.0))}
    named = sources.get(data.get("source"), photos)
    wanted = recipe(task=task, **(data | {"source": named}))
    with pytest.raises(UserError, match=message):
        cache(wanted, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(photos, cached):
    before = sorted(Path(cached).iterdir())
    with pytest.raises(UserError, match="exists already; name a new or empty folder"):
        cache(recipe(photos), Path(cached), progress=False)
    assert sorted(Path(cached).iterdir()) == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"size": 64}, r"was cached with data.size = 32, and not 64: change it, or cache again"),
        ({"caption": "note"}, r"was cached with data.caption = '', and not 'note'"),
        ({"crop": "random"}, r"was cached with data.crop = 'center', and not 'random'"),
        ({"buckets": True, "bucket_step": 16}, r"was cached with data.buckets = False"),
        ({"columns": ("mask",)}, r"was cached with data.columns = \(\)"),
        ({"source": "mixed"}, r"cached is a cache, and is not mixed with sources of pictures"),
    ],
)
def test_settings_that_a_cache_cannot_serve_are_refused(photos, cached, model, data, message):
    sources = {"mixed": ((cached, 1.0), (photos, 1.0))}
    wanted = recipe(**(data | {"source": sources.get(data.get("source"), cached)}))
    with pytest.raises(UserError, match=message):
        base.check_caches(TASK.build(model[0]), model[1], wanted.data)
    with pytest.raises(UserError, match=message):
        Loader(wanted.data, lambda example, rng: example, BATCH, 0)


@pytest.mark.parametrize(
    ("name", "other"),
    [("vae", "0"), ("text_encoder", ""), ("latents", [4, 4, 4]), ("text", [])],
)
def test_caches_of_other_models_are_not_mixed(cached, tmp_path, name, other):
    shutil.copytree(cached, tmp_path / "other")
    path = tmp_path / "other" / "cache.json"
    wanted = recipe(((cached, 1.0), (str(tmp_path / "other"), 1.0)))
    assert len(wanted.data.caches()) == 2
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: other}))
    with pytest.raises(
        UserError, match=rf"/cached and .*/other differ in {name}, and are not mixed"
    ):
        wanted.data.caches()


@pytest.mark.usefixtures("no_model")
def test_flips_need_a_cache_with_flips(photos, model, tmp_path):
    plain = str(cache(recipe(photos), tmp_path / "plain", progress=False))
    with pytest.raises(UserError, match=r"was cached with data.flip = False, and not True"):
        take(1, recipe(plain, flip=True), TASK.build(model[0]))
    take(1, recipe(plain), TASK.build(model[0]))


@pytest.mark.parametrize(
    "task", [Inpainting(), Editing(), Autoencoder(), Contrastive(image_size=32)], ids=type
)
def test_tasks_that_read_pixels_refuse_a_cache(cached, model, task):
    with pytest.raises(UserError, match="cached is a cache, and the task reads pictures"):
        base.check_caches(task.build(model[0]), model[1], recipe(cached).data)


def changed(tensors, path):
    """The tensors with one number moved by its last bit."""
    part, name = path.split("/", 1)
    tensor = tensors[part][name]
    values = np.array(tensor.read(tuple(slice(0, side) for side in tensor.shape)))
    values.flat[-1] = np.nextafter(values.flat[-1], np.float32(np.inf))
    moved = tensor._replace(read=lambda index: values[index])
    return tensors | {part: tensors[part] | {name: moved}}


def test_a_cache_of_another_model_is_refused(cached, model):
    parts, tensors, _ = model
    task, data = TASK.build(parts), recipe(cached).data
    for path in ("unet/conv_in/kernel", "vae/decoder/conv_in/kernel"):
        base.check_caches(task, changed(tensors, path), data)
    for path in ("vae/encoder/conv_in/kernel", "vae/quant_conv/bias"):
        with pytest.raises(UserError, match=rf"was made by the vae of {TINY} \(\w+\), and that"):
            base.check_caches(task, changed(tensors, path), data)
    other = changed(tensors, f"text_encoder/{next(iter(tensors['text_encoder']))}")
    with pytest.raises(UserError, match=r"was made by the text_encoder of .*: cache again"):
        base.check_caches(task, other, data)


@pytest.mark.parametrize("learn", ["vae/", "text_encoder/", ".*kernel", "lora/"])
def test_a_run_that_learns_what_made_the_cache_is_refused(cached, model, learn):
    parts, tensors, _ = model
    task = TextToImage(model=TINY, learn=("unet/", learn)).build(parts)
    beside = {"a": {"text_encoder": {"layers.0": jnp.zeros(2)}}}  # as factors of a kernel would be
    task = task._replace(init=lambda key, given: {**given, "lora": beside})
    with pytest.raises(UserError, match=r"learns, and .*cached holds what it made before"):
        base.check_caches(task, tensors, recipe(cached).data)


@pytest.mark.usefixtures("no_model")
def test_a_damaged_cache_is_refused_in_one_line(photos, model, tmp_path):
    out = cache(recipe(photos), tmp_path / "out", progress=False)
    told = json.loads((out / "cache.json").read_text())
    damage = {
        "does not say vae": {k: v for k, v in told.items() if k != "vae"},
        "size = 'large' is not of type int": told | {"size": "large"},
        "holds 14 of its 15 examples": told | {"examples": 15},
    }
    for message, content in damage.items():
        (out / "cache.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            open_source(str(out))
    (out / "cache.json").write_text(json.dumps(told | {"latents": [4, 4, 4]}))
    with pytest.raises(UserError, match=r"'mean' is not of shape \[4, 4, 4\]"):
        take(1, recipe(str(out), bad_share=1.0), TASK.build(model[0]))
    (out / "cache.json").write_text(json.dumps(told))
    (out / "empty.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*empty.safetensors"):
        open_source(str(out))


CONFIG = """
from jaxgen.training.recipe import Images, TextToImage, Train
config = Train(TextToImage(model={model!r}), Images(source={source!r}), batch_size=8)
"""


@pytest.mark.usefixtures("no_model")
def test_the_command_writes_a_cache(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # set, and so left alone
    config, out = tmp_path / "config.py", tmp_path / "out"
    config.write_text(CONFIG.format(model=TINY, source=photos))
    cli.main(["cache", str(config), "--data.size", "32", "--out", str(out), "--data.flip"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"14 examples are in {out}, ")
    assert second == f"to train on them: jaxgen train {config}, with --data.source {out}"
    assert open_source(str(out)).description.flip

    for options, message in (
        (["--out"], "argument --out: expected one argument"),
        (["--out", str(out)], "exists already; name a new or empty folder"),
        (["--out", str(tmp_path / "new"), "--data.sise", "32"], "sise"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["cache", str(config), *options])
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()
