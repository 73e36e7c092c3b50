"""Scenes say what they show; subjects are as frequent as the law says; files read back the same."""

import hashlib
import itertools
import pickle
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from jaxgen import cli
from jaxgen.data import transforms
from jaxgen.data.emoji_scenes import artwork, backgrounds, drawing, layout, longtail, said
from jaxgen.data.emoji_scenes.longtail import SPLITS
from jaxgen.data.emoji_scenes.scenes import PICTURES, EmojiScenes
from jaxgen.data.emoji_scenes.views import views
from jaxgen.data.export import export
from jaxgen.data.pipeline import Images, Loader
from jaxgen.data.sources import open_source
from jaxgen.types import UserError

COLUMNS = ("boxes", *PICTURES)
RELATIONS = {
    "left of": lambda a, b: a[2] <= b[0],
    "right of": lambda a, b: a[0] >= b[2],
    "above": lambda a, b: a[3] <= b[1],
    "below": lambda a, b: a[1] >= b[3],
}
WORDS = {"to the left of": "left of", "to the right of": "right of", "over": "above"}
WORDS |= {"under": "below"} | {name: name for name in RELATIONS}
THIRD = {"to their left": "left of", "to their right": "right of"}
THIRD |= {"above them": "above", "below them": "below"}


def scenes(split="train", columns=PICTURES, seed=0):
    return EmojiScenes(f"emoji_scenes:{split}", columns=columns, seed=seed)


def digest(examples):
    """One number of all that some examples hold."""
    made = hashlib.sha256()
    for example in examples:
        for name, value in sorted(example.items()):
            made.update(name.encode())
            made.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return made.hexdigest()


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], name)
        if isinstance(value, np.ndarray):
            assert value.dtype == second[name].dtype, name


def test_another_process_draws_the_same_scenes():
    code = (
        "from tests.data.test_emoji_scenes import *\n"
        "s = scenes('test'); print(digest([s[i] for i in (7, 3)] + [views('owl', 5, 2)._asdict()]))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    source = pickle.loads(pickle.dumps(scenes("test")))
    here = digest([source[i] for i in (7, 3)] + [views("owl", 5, 2)._asdict()])
    assert there.stdout.strip() == here


def test_a_scene_is_what_its_columns_say():
    source = scenes("test_even")
    for i in range(100):
        example, scene = source[i], source.scene(i)
        assert example["image"].shape == (64, 64, 3)
        assert example["image"].dtype == example["segmentation"].dtype == np.uint8
        assert example["boxes"].dtype == np.float32
        np.testing.assert_array_equal(example["mask"], example["segmentation"] > 0)
        assert {*np.unique(example["segmentation"])} == {0, *(example["subject"] + 1)}
        assert tuple(example["subject"]) == scene.subjects
        assert said.read(example["things"]) == said.Said(scene.subjects)
        for number, box, phrase, size, side in zip(
            scene.subjects, example["boxes"] * 64, example["phrases"], scene.sizes, scene.sides
        ):
            y, x = np.nonzero(example["segmentation"] == number + 1)
            assert [*box] == [x.min(), y.min(), x.max() + 1, y.max() + 1]  # tight
            assert phrase in example["caption"]
            assert 20 <= side <= 44
            assert abs(max(box[2] - box[0], box[3] - box[1]) - side) <= 1
            assert size == layout.size_word(side)


def find(part, nouns):
    """The number of the noun that a part of a caption is, without article and size."""
    bare = re.sub(r"^(an? )?(small |large )?", "", part.strip())
    return nouns.index(bare)


def test_captions_are_true_of_the_boxes():
    source = scenes("test_even", columns=())
    related = 0
    for i in range(500):
        example = source[i]
        caption, nouns = example["caption"], example["phrases"]
        for noun, size in zip(nouns, example["sizes"]):
            for word in ("small", "large"):
                assert f"{word} {noun}" not in caption or size == word
        for style in artwork.STYLES:
            assert style not in caption or style == example["style"]
        if found := re.search(r"an? (plain )?(\w+)( \w+)? background", caption):
            assert found[2] == example["colour"]
            said = (found[1] or found[3] or "").strip()
            assert said in ("", example["pattern"])

        shown = re.sub(r"^an? (flat|3D|line art) picture of ", "", caption)
        shown = re.split(r",? on an? \w+( \w+)? background|, (flat|3D|line art) style", shown)[0]
        alternatives = "|".join(sorted(WORDS, key=len, reverse=True))
        if len(nouns) == 1 or not (parts := re.split(f" ({alternatives}) ", shown, maxsplit=1))[1:]:
            continue
        related += 1
        second, _, third = parts[2].partition(", and ")
        assert find(parts[0], nouns) == 0
        a, b, *c = example["boxes"]
        assert find(second, nouns) == 1
        assert RELATIONS[WORDS[parts[1]]](a, b), caption
        if third:
            noun, words = re.fullmatch(f"(.*) ({'|'.join(THIRD)})", third).groups()
            assert find(noun, nouns) == 2
            assert all(RELATIONS[THIRD[words]](c[0], other) for other in (a, b)), caption
    assert related > 150


def test_captions_mention_most_but_not_all():
    source = scenes(columns=())
    captions = [source.scene(i).caption for i in range(600)]
    for named in ("background", "style|picture of"):
        share = np.mean([bool(re.search(named, caption)) for caption in captions])
        assert 0.8 < share < 0.9


def test_counts_are_those_of_the_scenes_and_of_the_law():
    for split in ("validation_even", "held"):
        source = scenes(split, columns=())
        shown = [n for i in range(len(source)) for n in source.scene(i).subjects]
        np.testing.assert_array_equal(np.bincount(shown, minlength=180), longtail.counts(split))
    source = scenes(columns=())
    table = longtail._table("train", 0)
    for i in (0, 1, 50_000, 99_999):
        assert source.scene(i).subjects == tuple(n for n in table[i] if n >= 0)
        assert len({*source.scene(i).subjects}) == len(source.scene(i).subjects)

    art = artwork.load()
    for seed in (0, 1):
        counts = longtail.counts("train", seed)
        np.testing.assert_array_equal(counts[:150], longtail.law(np.arange(150)))
        assert (counts[art.group("head")] >= 1000).all()
        assert (counts[art.group("tail")] >= 5).all()
        assert (counts[art.group("tail")] <= 20).all()
    groups = [len(art.group(name)) for name in artwork.GROUPS]
    assert groups == [60, 60, 30, 30]


def test_held_subjects_are_in_no_scene_but_their_own():
    held = artwork.load().group("held")
    for split, (_, count, groups, even) in SPLITS.items():
        counts = longtail.counts(split)
        assert count <= counts.sum() <= 3 * count
        assert (counts[held] > 0).all() if groups == ("held",) else not counts[held].any()
        shown = np.delete(counts, held) if groups != ("held",) else counts[held]
        assert not even or shown.max() - shown.min() <= 1


def test_no_split_and_no_seed_repeats_another():
    sources = [scenes(split, ()) for split in SPLITS] + [scenes("train", (), seed=1)]
    pictures = [source[i]["image"].tobytes() for source in sources for i in range(30)]
    assert len({*pictures}) == len(pictures)
    assert len({repr(source.fingerprint()) for source in sources}) == len(sources)


def test_colours_are_told_apart():
    shades = {
        name: backgrounds.lab(
            np.array(both)[:, None] + [[-backgrounds.JITTER], [backgrounds.JITTER]]
        )
        for name, both in backgrounds.COLOURS.items()
    }
    flat = {name: lab.reshape(-1, 3) for name, lab in shades.items()}
    for first, second in itertools.combinations(flat, 2):
        assert np.linalg.norm(flat[first][:, None] - flat[second], axis=-1).min() > 20
    white, black, red = backgrounds.lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]]))
    np.testing.assert_allclose(white, [100, 0, 0], atol=0.1)
    np.testing.assert_allclose(black, 0, atol=1e-6)
    np.testing.assert_allclose(red, [53.2, 80.1, 67.2], atol=0.2)


@pytest.mark.parametrize("pattern", backgrounds.PATTERNS)
def test_a_background_is_nearest_to_its_colour(pattern):
    rng = np.random.default_rng(0)
    known = {n: backgrounds.lab(np.array(both)).mean(0) for n, both in backgrounds.COLOURS.items()}
    for colour in backgrounds.COLOURS:
        pixels = backgrounds.paint(colour, pattern, rng)
        assert pixels.shape == (64, 64, 3)
        assert (len(np.unique(pixels.reshape(-1, 3), axis=0)) == 1) == (pattern == "plain")
        mean = backgrounds.lab(pixels.reshape(-1, 3).mean(0))
        assert min(known, key=lambda name: np.linalg.norm(known[name] - mean)) == colour


def test_sprites_are_composited_as_pillow_does():
    art = artwork.load()
    sprite = art.sprite(0, "3D", 40)
    under = backgrounds.paint("blue", "dotted", np.random.default_rng(0))
    over = Image.fromarray(under).convert("RGBA")
    straight = Image.frombytes("RGBa", sprite.shape[1::-1], sprite.tobytes()).convert("RGBA")
    over.alpha_composite(straight)
    drawing.composite(under[: sprite.shape[0], : sprite.shape[1]], sprite)
    difference = np.abs(np.asarray(over.convert("RGB"), np.int16) - under)
    assert difference.max() <= 2


def test_every_sprite_is_seen_at_its_smallest():
    art = artwork.load()
    for style, number in itertools.product(artwork.STYLES, range(180)):
        visible = art.sprite(number, style, 20)[..., 3] >= drawing.VISIBLE
        x0, y0, x1, y1 = drawing.box(visible, 0, 0)
        assert max(x1 - x0, y1 - y0) >= 19, (style, art.subjects[number].name)
        assert visible.sum() >= 50, (style, art.subjects[number].name)


def test_line_art_lies_on_its_subject_and_edges_around_it():
    source = scenes("test")
    for i in range(60):
        example = source[i]
        padded = np.pad(example["mask"], 2)
        near = np.zeros((64, 64), bool)
        for dy, dx in itertools.product(range(5), repeat=2):
            near |= padded[dy : dy + 64, dx : dx + 64]
        inked = example["lines"][..., 0] > 64
        assert inked.any()
        assert near[inked].mean() > 0.9  # a few poses differ between the styles
        if example["pattern"] in ("plain", "gradient"):
            assert near[example["edges"][..., 0] > 0].all()


def test_a_step_has_one_thin_edge():
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, 8:] = 200
    found = drawing.edges(picture)
    assert {*np.unique(found)} == {0, 255}
    assert (found.sum(1) == 255).all()


def test_mirroring_leaves_words_and_boxes_true():
    source = scenes("test_even")
    for i in range(60):
        example = source[i]
        sided = {"left of", "right of"} & {*example["relations"]}
        assert transforms.may_flip(example) == (not sided)
        mirrored = transforms.flip(example, np.random.default_rng(2), COLUMNS)
        if not sided:
            np.testing.assert_array_equal(mirrored["image"], example["image"][:, ::-1])
        for number, box in zip(mirrored["subject"], mirrored["boxes"] * 64):
            y, x = np.nonzero(mirrored["segmentation"] == number + 1)
            assert [*box] == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_a_batch_comes_from_the_source_by_name():
    data = Images(source="emoji_scenes:validation", size=64, columns=COLUMNS, flip=True)

    def finish(example, rng):
        return {"image": example["image"], "lines": example["lines"]}

    loader = Loader(data, finish, 4, seed=0)
    batch = next(loader)
    loader.close()
    assert batch["image"].shape == batch["lines"].shape == (4, 64, 64, 3)


def test_views_show_one_subject_in_many_ways():
    number = artwork.load().number("zebra")  # a held one
    shown = views("zebra", 0, 12)
    assert shown.images.shape == (12, 64, 64, 3)
    assert shown.masks.shape == (12, 64, 64)
    assert all("a zebra, " in caption for caption in shown.captions)
    assert len({caption.split(", ")[1] for caption in shown.captions}) == 4
    assert len({image.tobytes() for image in shown.images}) == 12
    assert (shown.masks.sum((1, 2)) > 60).all()
    fewer = views(number, 0, 3)
    np.testing.assert_array_equal(fewer.images, shown.images[:3])  # k, not the count, decides
    assert not np.array_equal(views(number, 1, 3).images, fewer.images)
    for wrong in ("zebu", 180, -1):
        with pytest.raises(UserError, match="no subject"):
            views(wrong, 0, 1)
    for key in (-1, 1 << 63):
        with pytest.raises(UserError, match=f"seed {key} is not from 0"):
            views("zebra", key, 1)
    for count in (0, -1):
        with pytest.raises(UserError, match=f"count {count} is not"):
            views("zebra", 0, count)


def test_what_is_written_is_read_back(tmp_path):
    source = scenes("test")
    folder = open_source(str(export(source, tmp_path / "out", 12, progress=False)), "", COLUMNS)
    assert len(folder) == 12
    for i in range(12):
        theirs, ours = folder[i], source[i]
        assert theirs.pop("text") == ours["caption"]
        assert theirs.pop("file_name") == f"{i:05}.png"
        for name, kind in (("boxes", np.float32), ("subject", np.int32)):
            theirs[name] = np.array(theirs[name], kind)
        assert_same({k: theirs[k] for k in ours}, ours)
        assert theirs.keys() == ours.keys()


def damage(path, kind):
    if kind == "cut short":
        path.write_bytes(artwork.ARCHIVE.read_bytes()[:100_000])
    elif kind == "a bit":
        content = bytearray(artwork.ARCHIVE.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif kind == "a member":
        with zipfile.ZipFile(artwork.ARCHIVE) as whole, zipfile.ZipFile(path, "w") as part:
            part.writestr("subjects.json", whole.read("subjects.json"))
    elif kind == "another grid":
        with zipfile.ZipFile(artwork.ARCHIVE) as whole, zipfile.ZipFile(path, "w") as part:
            text = whole.read("subjects.json").decode()
            part.writestr("subjects.json", text.replace('"columns": 15', '"columns": 20'))
            for name in artwork.SHEETS.values():
                part.writestr(name, whole.read(name))


@pytest.mark.parametrize("kind", ["missing", "cut short", "a bit", "a member", "another grid"])
def test_a_damaged_archive_is_named(tmp_path, monkeypatch, capsys, kind):
    path = tmp_path / "artwork.zip"
    damage(path, kind)
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        artwork.Artwork(path)
    assert "\n" not in str(caught.value)

    monkeypatch.setattr(artwork, "load", lambda: artwork.Artwork(path))
    longtail._table.cache_clear()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "emoji_scenes", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert str(path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("ref", "columns", "says"),
    [
        ("emoji_scenes:tset", (), "its splits are train, validation, test,"),
        ("emoji_scenes:", ("hint",), "no column 'hint'; it has image, caption,"),
    ],
)
def test_a_bad_name_is_explained(ref, columns, says):
    with pytest.raises(UserError, match=says):
        open_source(ref, "", columns)


def data(*arguments, code=0):
    if not code:
        return cli.main(["data", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", *arguments])
    assert stopped.value.code == code


def test_the_command_writes_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data("emoji_scenes", "--out", "out", "--split", "held", "--count", "3", "--seed", "4")
    assert "3 scenes are in out" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    folder, source = open_source("out", "", PICTURES), scenes("held", seed=4)
    for i in range(3):
        np.testing.assert_array_equal(folder[i]["image"], source[i]["image"])


def test_the_command_writes_views_of_a_subject(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data("emoji_scenes", "--out", "out", "--subject", "owl", "--count", "3", "--seed", "4")
    assert "3 views are in out" in capsys.readouterr().out
    folder, shown = open_source("out", "", ("mask",)), views("owl", 4, 3)
    for i in range(3):
        np.testing.assert_array_equal(folder[i]["image"], shown.images[i])
        np.testing.assert_array_equal(folder[i]["mask"] > 0, shown.masks[i])
        assert folder[i]["caption"] == shown.captions[i]


BAD = {
    "an unknown name": (["emojis"], "no data 'emojis'; there is emoji_scenes"),
    "an unknown split": (["--split", "all"], "its splits are train,"),
    "no scene": (["--count", "0"], "count 0 is not from 1 to 100000"),
    "too many": (["--split", "test", "--count", "10001"], "count 10001 is not from 1 to 10000"),
    "no number": (["--count", "ten"], "no whole number"),
    "a negative seed": (["--seed", "-1"], "seed -1"),
    "a negative seed of views": (["--subject", "owl", "--seed", "-1"], "seed -1"),
    "a seed of views that is too large": (["--subject", "owl", "--seed", str(1 << 63)], "seed 92"),
    "a split of views": (["--subject", "owl", "--split", "train"], "--subject has none"),
    "an unknown subject": (["--subject", "owls"], "no subject 'owls'"),
    "no view": (["--subject", "owl", "--count", "0"], "count 0 is not from 1 to 1000"),
    "a folder in use": (["--out", "used"], "used exists already"),
    "a file": (["--out", "used/file"], "used/file exists already"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    options, says = BAD[case]
    name = [] if options == ["emojis"] else ["emoji_scenes"]
    out = [] if "--out" in options else ["--out", "out"]
    data(*name, *options, *out, code=2)
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["used"]


def test_a_run_that_fails_leaves_nothing_behind(tmp_path):
    class Broken(EmojiScenes):
        def read(self, i, least=None):
            if i == 2:
                raise OSError(28, "No space left on device")
            return super().read(i, least)

    with pytest.raises(UserError, match="No space left on device"):
        export(Broken(), tmp_path / "out", 4, progress=False)
    assert not [*tmp_path.iterdir()]
