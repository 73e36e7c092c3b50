import errno
import io
import json
import os
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from jaxgen.data import examples, images, records
from jaxgen.data.sources import BadExample, open_source, write_records
from jaxgen.types import UserError
from tests.data.folders import pixels, write_folder, write_metadata

EMOJI = Path(__file__).parents[1] / "assets" / "emoji"


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def refused(path, *lines, **options):
    """The one-line error of a folder with these lines of metadata."""
    (path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(UserError) as caught:
        open_source(str(path), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_gives_pictures_captions_and_further_columns(tmp_path):
    source = open_source(write_folder(tmp_path / "f", 3))
    assert len(source) == 3
    for i in range(3):
        example = source[i]
        np.testing.assert_array_equal(example.pop("image"), pixels(i))
        text = f"picture {i}"
        assert example == {"file_name": f"{i:03d}.png", "text": text, "caption": text, "n": i}
        assert source.size(i) == (48, 48)
        assert source.name(i) == f"{tmp_path}/f/{i:03d}.png"


def test_the_emoji_are_a_training_folder():
    source = open_source(str(EMOJI))
    assert len(source) == len(list(EMOJI.glob("*.webp"))) > 250
    for i in range(len(source)):
        assert source.size(i) == (96, 96)
        assert source[i]["caption"].startswith("a 3D emoji of ")
        assert source[i]["image"].shape == (96, 96, 3)


def test_blank_lines_line_ends_and_a_byte_order_mark_change_nothing(tmp_path):
    ref = write_folder(tmp_path / "f", 3)
    path = tmp_path / "f" / "metadata.jsonl"
    plain = open_source(ref)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n \r\n".join(lines).rstrip())
    odd = open_source(ref)
    assert [odd[i]["caption"] for i in range(len(odd))] == ["picture 0", "picture 1", "picture 2"]
    assert len(plain) == len(odd) == 3


def test_names_of_any_script_and_in_folders_are_found_and_may_repeat(tmp_path):
    names = ["übung/дом 1.png", "übung/дом 1.png", "狐.png"]
    (tmp_path / "übung").mkdir()
    for name in names:
        Image.fromarray(pixels(0)).save(tmp_path / name)
    write_metadata(tmp_path, [{"file_name": n, "text": n} for n in names])
    source = open_source(str(tmp_path))
    assert [source[i]["caption"] for i in range(3)] == names
    np.testing.assert_array_equal(source[1]["image"], pixels(0))


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/passwd", "", 7, None])
def test_names_that_leave_the_folder_are_refused_with_their_line(tmp_path, name):
    good = b'{"file_name": "x.png", "text": "x"}'
    bad = json.dumps({"file_name": name, "text": "x"}).encode()
    assert "line 2" in refused(tmp_path, good, bad)


def test_links_out_of_the_folder_are_bad_and_links_within_are_not(tmp_path):
    outside, inside = tmp_path / "outside.png", tmp_path / "f"
    ref = write_folder(inside, 1)
    Image.fromarray(pixels(5)).save(outside)
    (inside / "out.png").symlink_to(outside)
    (inside / "in.png").symlink_to(inside / "000.png")
    write_metadata(inside, [{"file_name": f"{n}.png", "text": n} for n in ("out", "in")])
    source = open_source(ref)
    with pytest.raises(BadExample, match=r"out\.png: a link leads out of the folder"):
        source[0]
    with pytest.raises(BadExample, match="leads out"):
        source.size(0)
    np.testing.assert_array_equal(source[1]["image"], pixels(0))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"file_name": "x.png"', "line 2 is not valid JSON"),
        (b'{"file_name": "x.png", "text": "\xff"}', "line 2 is not valid JSON"),
        (b"[" * 100_000, "line 2 is not valid JSON: nested too deeply"),
        (b'["x.png"]', "line 2 is not a JSON object"),
        (b'{"text": "x"}', "line 2 has no column 'file_name'"),
        (b'{"file_name": "x.png", "prompt": "x"}', "'text' or 'caption'; it has file_name, prompt"),
        (b'{"file_name": "x.png", "text": null}', "'text' is 'None', which is no text"),
        (b'{"file_name": "x.png", "text": ' + b'"x"' * 500_000, "line 2 is longer than 1024 KiB"),
    ],
    ids=["cut", "not utf-8", "deep", "list", "no file", "no caption", "null caption", "huge"],
)
def test_damaged_metadata_is_named_by_its_line(tmp_path, line, message):
    assert message in refused(tmp_path, b'{"file_name": "x.png", "text": "x"}', line)


def test_the_column_of_captions_can_be_chosen(tmp_path):
    ref = write_folder(tmp_path / "f", 1, more=lambda i: {"caption": "short", "prompt": "chosen"})
    assert open_source(ref)[0]["caption"] == "picture 0"
    assert open_source(ref, caption="prompt")[0]["caption"] == "chosen"
    with pytest.raises(UserError, match="line 1 has no column 'alt'; it has file_name, text, n"):
        open_source(ref, caption="alt")


def test_further_pictures_are_read_only_where_they_are_asked_for(tmp_path):
    ref = write_folder(
        tmp_path / "f",
        1,
        more=lambda i: {"mask": "m.png", "hint_file_name": "h.png", "edited": "-"},
    )
    half = np.zeros((48, 48), np.uint8)
    half[:, 24:] = 255
    Image.fromarray(half).save(tmp_path / "f" / "m.png")
    Image.fromarray(pixels(9)).save(tmp_path / "f" / "h.png")
    assert not {"mask", "hint", "hint_file_name", "edited"} & set(open_source(ref)[0])
    example = open_source(ref, columns=("mask", "hint", "n"))[0]
    np.testing.assert_array_equal(example["mask"], half == 255)
    np.testing.assert_array_equal(example["hint"], pixels(9))
    assert example["n"] == 0
    with pytest.raises(UserError, match="line 1 has no column 'original'"):
        open_source(ref, columns=("original",))
    with pytest.raises(BadExample, match="/-: no such file"):
        open_source(ref, columns=("edited",))[0]


def test_labels_keep_their_numbers(tmp_path):
    ref = write_folder(tmp_path / "f", 1, more=lambda i: {"segmentation": "s.png"})
    labels = np.arange(48 * 48, dtype=np.uint8).reshape(48, 48) % 200
    Image.fromarray(labels).save(tmp_path / "f" / "s.png")
    actual = open_source(ref, columns=("segmentation",))[0]["segmentation"]
    np.testing.assert_array_equal(actual, labels)


def test_pictures_are_read_as_sampling_reads_them(tmp_path):
    tmp_path.joinpath("f").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = np.dstack([pixels(0, 20, 30), np.full((30, 20), 100, np.uint8)])
    saved = {
        "exif.jpg": (Image.fromarray(pixels(0, 20, 30)), {"exif": exif}),
        "alpha.png": (Image.fromarray(rgba), {}),
        "grey.png": (Image.fromarray(pixels(0)[..., 0]), {}),
        "palette.gif": (Image.fromarray(pixels(0)).convert("P"), {}),
    }
    for name, (image, options) in saved.items():
        image.save(tmp_path / "f" / name, **options)
    write_metadata(tmp_path / "f", [{"file_name": name, "text": ""} for name in saved])
    source = open_source(str(tmp_path / "f"))
    for i, name in enumerate(saved):
        expected = images.read_image(tmp_path / "f" / name)
        np.testing.assert_array_equal(source[i]["image"], expected)
        assert source.size(i) == expected.shape[1::-1]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_sizes_are_read_without_decoding(tmp_path, monkeypatch, suffix):
    (tmp_path / "f").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(0, 60, 40)).save(tmp_path / "f" / f"plain.{suffix}")
    Image.fromarray(pixels(0, 60, 40)).save(tmp_path / "f" / f"turned.{suffix}", exif=exif)
    names = [f"plain.{suffix}", f"turned.{suffix}"]
    write_metadata(tmp_path / "f", [{"file_name": name, "text": ""} for name in names])
    source = open_source(str(tmp_path / "f"))

    def load(self):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    assert [source.size(i) for i in range(2)] == [(60, 40), (40, 60)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM])
def test_errors_of_a_machine_are_not_the_example_s(tmp_path, monkeypatch, number):
    source = open_source(write_folder(tmp_path / "f", 1))

    def broken(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(
        examples.Unreadable, match=r"cannot read .*000\.png: .*" + os.strerror(number)
    ):
        source[0]


def test_errors_of_a_file_are_the_example_s(tmp_path):
    source = open_source(write_folder(tmp_path / "f", 3))
    (tmp_path / "f" / "000.png").unlink()
    (tmp_path / "f" / "001.png").unlink()
    (tmp_path / "f" / "001.png").mkdir()
    (tmp_path / "f" / "002.png").write_bytes((tmp_path / "f" / "002.png").read_bytes()[:90])
    for i in range(3):
        with pytest.raises(BadExample):
            source[i]


def test_large_jpegs_are_decoded_smaller_but_never_below_the_hint(tmp_path):
    (tmp_path / "f").mkdir()
    big = pixels(0, 500, 400)
    Image.fromarray(big).save(tmp_path / "f" / "x.jpg", quality=95)
    write_metadata(tmp_path / "f", [{"file_name": "x.jpg", "text": ""}])
    source = open_source(str(tmp_path / "f"))
    shapes = {least: source.read(0, least)["image"].shape[:2] for least in (400, 201, 200, 60)}
    assert shapes == {400: (400, 500), 201: (400, 500), 200: (200, 250), 60: (100, 125)}
    assert source.size(0) == (500, 400)
    reduced = source.read(0, 100)["image"].astype(int)
    assert abs(reduced - images.resize(big, 125, 100)).mean() < 1


def test_a_picture_beyond_the_limit_is_seen_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 48 - 1)
    source = open_source(write_folder(tmp_path / "f", 1))
    with pytest.raises(BadExample, match=r"000.png: 48x48 is too large, the limit is 2303 pixels"):
        source[0]


def test_a_changed_or_lost_folder_gives_bad_examples_not_a_crash(tmp_path):
    source = open_source(write_folder(tmp_path / "f", 2))
    (tmp_path / "f" / "metadata.jsonl").write_text("short")
    with pytest.raises(BadExample, match="metadata"):
        source[1]
    (tmp_path / "f" / "metadata.jsonl").unlink()
    with pytest.raises(BadExample, match="metadata"):
        source.name(1)


def test_what_is_no_source_is_explained(tmp_path):
    write_folder(tmp_path / "photos", 1)
    for name in ("empty", "bare", "samples", "prepared"):
        (tmp_path / name).mkdir()
    Image.fromarray(pixels(0)).save(tmp_path / "bare" / "x.png")
    (tmp_path / "samples" / "samples.jsonl").touch()
    (tmp_path / "prepared" / "dataset_info.json").touch()
    (tmp_path / "prepared" / "x.array_record-00000-of-00001").touch()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "metadata.jsonl").write_text("\n\n")
    expected = {
        "": "set data.source",
        f"{tmp_path}/fotos": f"no folder or file {tmp_path}/fotos; did you mean {tmp_path}/photos?",
        f"{tmp_path}/*.array_record": "no folder or file",
        f"{tmp_path}/photos/000.png": "is a file",
        f"{tmp_path}/empty": "is empty",
        f"{tmp_path}/blank": "is empty; it should have one line",
        f"{tmp_path}/bare": "no metadata.jsonl beside its 1 pictures; write one",
        f"{tmp_path}/samples": "rename its samples.jsonl",
        f"{tmp_path}/prepared": f"write tfds:{tmp_path}/prepared:train",
        "tfds:mnist": "is not tfds:NAME",
        "x" * 5000: "cannot read xxx",
        "gs://bucket/photos": "gs://bucket/photos: data are read as files; mount it, and name",
    }
    for ref, message in expected.items():
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            open_source(ref)
        assert "\n" not in str(caught.value)


def test_names_are_fit_for_one_line_of_a_log():
    assert examples.printable("a\nb\x1b[31mü狐") == "a?b?[31mü狐"


def test_records_keep_every_kind_of_value():
    example = {
        "image": png(pixels(0)),
        "caption": "fox \ud800 狐",
        "n": 3,
        "share": 0.1,
        "is_x": True,
        "nothing": None,
        "phrases": ["a", "b"],
        "boxes": np.random.default_rng(0).random((2, 4), np.float32),
        "mask": np.eye(3, dtype=bool),
        "turned": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "none": np.zeros((0, 4)),
        "scalar": np.float64(2.5),
    }
    actual = records.decode(records.encode(example))
    assert actual.keys() == example.keys()
    for name, value in example.items():
        np.testing.assert_array_equal(actual[name], value)
        if isinstance(value, np.ndarray):
            assert actual[name].dtype == value.dtype
    with pytest.raises(UserError, match="cannot be written"):
        records.encode({"caption": object()})


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", bytes(64), b"\xff" * 64, pickle.dumps({})])
def test_bytes_that_are_no_record_are_refused(content):
    with pytest.raises(ValueError, match="no example in the form"):
        records.decode(content)


def test_records_are_read_back_in_turn_from_a_file_a_folder_or_a_pattern(tmp_path):
    rows = [{"image": png(pixels(i)), "text": f"picture {i}", "n": i} for i in range(5)]
    rows[4]["image"] = pixels(4)  # pixels serve as well as a file
    assert write_records(tmp_path / "r", iter(rows), shards=2) == 5
    files = sorted((tmp_path / "r").iterdir())
    assert [f.name for f in files] == [f"data-0000{i}-of-00002.array_record" for i in range(2)]
    whole = open_source(f"{tmp_path}/r")
    assert [whole[i]["n"] for i in range(5)] == [0, 2, 4, 1, 3]
    assert [open_source(str(files[1]))[i]["n"] for i in range(2)] == [1, 3]
    pattern = open_source(f"{tmp_path}/r/*-0000[0]-*")
    assert [pattern[i]["n"] for i in range(len(pattern))] == [0, 2, 4]
    copy = pickle.loads(pickle.dumps(whole))  # as worker processes get it
    for i in range(5):
        example = copy[i]
        np.testing.assert_array_equal(example["image"], pixels(example["n"]))
        assert example["caption"] == f"picture {example['n']}"
        assert copy.size(i) == (48, 48)
    with pytest.raises(UserError, match="holds records already"):
        write_records(tmp_path / "r", rows)


def test_writing_that_fails_leaves_nothing_behind(tmp_path):
    rows = [{"image": png(pixels(0)), "text": "x"}, {"image": object()}]
    with pytest.raises(UserError, match="cannot be written"):
        write_records(tmp_path / "r", rows)
    assert list((tmp_path / "r").iterdir()) == []


def test_a_disk_that_is_full_is_told_of_in_one_line(tmp_path):
    rows = [{"image": pixels(i, 64, 64), "text": str(i)} for i in range(200)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot write to .*/r: .*File too large$") as caught:
            write_records(tmp_path / "r", rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "r").iterdir()) == []


def test_a_bug_of_who_gives_the_rows_is_not_a_full_disk(tmp_path):
    def rows():
        yield {"image": pixels(0), "text": "x"}
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write_records(tmp_path / "r", rows())


def test_further_pictures_of_records_are_decoded_where_asked_for(tmp_path):
    row = {"image": png(pixels(0)), "text": "x", "mask": np.eye(48, dtype=np.uint8)}
    row |= {"hint": png(pixels(1)), "canny": png(pixels(2)), "boxes": np.zeros((1, 4))}
    write_records(tmp_path / "r", [row])
    assert not {"mask", "hint"} & set(open_source(f"{tmp_path}/r")[0])
    example = open_source(f"{tmp_path}/r", columns=("mask", "hint", "canny", "boxes"))[0]
    np.testing.assert_array_equal(example["mask"], np.eye(48, dtype=bool))
    np.testing.assert_array_equal(example["hint"], pixels(1))
    np.testing.assert_array_equal(example["canny"], pixels(2))
    with pytest.raises(UserError, match="has no column 'depth'; it has"):
        open_source(f"{tmp_path}/r", columns=("depth",))


def test_a_damaged_record_is_bad_alone_and_a_damaged_file_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), np.uint8)
    write_records(tmp_path / "r", [{"image": image, "text": "x"} for image in noise])
    (file,) = (tmp_path / "r").iterdir()
    content = bytearray(file.read_bytes())
    content[90_000:90_010] = bytes(10)  # in the middle of one of ten examples of 12 kB
    file.write_bytes(content)
    source, bad = open_source(str(file)), []
    for i in range(10):
        try:
            source[i]
        except BadExample as error:
            bad.append(error.name)
    assert len(bad) == 1
    assert bad[0].startswith(f"{file}[")
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot read"):
        open_source(str(file))


def test_a_damaged_first_record_is_bad_alone(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    rows = [{"image": image, "text": "x"} for image in noise]
    write_records(tmp_path / "r", rows)
    (file,) = (tmp_path / "r").iterdir()
    content = bytearray(file.read_bytes())
    at = content.index(noise[0].tobytes()[:100])
    content[at : at + 10] = bytes(10)
    file.write_bytes(content)
    source = open_source(str(file))
    with pytest.raises(BadExample):
        source[0]
    np.testing.assert_array_equal(source[1]["image"], noise[1])


@pytest.mark.parametrize("image", [np.zeros(7, np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_arrays_that_are_no_pictures_are_bad(tmp_path, image):
    write_records(tmp_path / "r", [{"image": image, "text": "x"}])
    source = open_source(f"{tmp_path}/r")
    for read in (source.read, source.size):
        with pytest.raises(BadExample, match=r"'image' is uint8 \[.*\], not a picture"):
            read(0)


def test_records_without_pictures_are_refused_by_their_columns(tmp_path):
    write_records(tmp_path / "r", [{"text": "x", "label": 3}])
    with pytest.raises(UserError, match="no column 'image' of pictures; it has text, label"):
        open_source(f"{tmp_path}/r")


# Runs apart from the tests: whether TensorFlow is imported shows only in a fresh process.
TFDS = """
import json, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class Pets(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(None, None, 3)),
            "mask": tfds.features.Image(shape=(None, None, 1)),
            "label": tfds.features.ClassLabel(names=["red_fox", "owl"]),
            "note": tfds.features.Text(),
            "phrases": tfds.features.Sequence(tfds.features.Text()),
        }))
    def _split_generators(self, manager):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        for i in range(5):
            image = np.full((8, 10, 3), i, np.uint8)
            mask = Image.fromarray(np.eye(8, 10, dtype=np.uint8) * 255)
            texts = {"label": i % 2 if i < 4 else -1, "note": f"n{i}", "phrases": ["on the left"]}
            yield i, {"image": Image.fromarray(image), "mask": mask} | texts

builder = Pets(file_format="array_record", data_dir=sys.argv[1])
builder.download_and_prepare()
from jaxgen.data.sources import BadExample, open_source
source = open_source(f"tfds:{builder.data_path}:train", columns=("mask",))
found = {}
for i in range(5):
    try:
        found[source[i]["image"][0, 0, 0]] = source[i]
    except BadExample as error:
        assert error.reason == "'label' is -1, which is no class"
assert len(found) == 4 and found[0]["phrases"] == ["on the left"]
assert [found[i]["caption"] for i in range(4)] == ["red fox", "owl"] * 2
assert [found[i]["note"] for i in range(4)] == ["n0", "n1", "n2", "n3"]
np.testing.assert_array_equal(found[0]["mask"], np.eye(8, 10, dtype=bool))
assert found[0]["image"].shape == (8, 10, 3) and source.size(0) == (10, 8)
noted = open_source(f"tfds:{builder.data_path}:train[:50%]", caption="note")
assert noted.fingerprint() != source.fingerprint() == json.loads(json.dumps(source.fingerprint()))
assert len(noted) == 2 and "mask" not in noted[0] and noted[0]["caption"][0] == "n"
assert "tensorflow" not in sys.modules
for ref in (f"tfds:{builder.data_path}:test", "tfds:no_such_data:train", "tfds:mnist:train"):
    try:
        open_source(ref)
        raise SystemExit(ref)
    except ValueError as error:
        print(error)
"""


def test_tensorflow_datasets_are_read_without_tensorflow(tmp_path):
    command = [sys.executable, "-c", TFDS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = done.stdout.strip().split("\n")[-3:]
    assert "Unknown split 'test'" in errors[0]
    assert "no_such_data not found; prepare it once: tfds build no_such_data" in errors[1]
    assert "prepare it once: tfds build mnist" in errors[2]


def test_a_line_costs_a_worker_sixteen_bytes(tmp_path):
    few = open_source(write_folder(tmp_path / "a", 20))
    many = open_source(write_folder(tmp_path / "b", 40))
    assert len(pickle.dumps(many)) - len(pickle.dumps(few)) == 20 * 16


def test_a_fingerprint_tells_contents_apart_and_not_places(tmp_path):
    first, moved = (open_source(write_folder(tmp_path / name, 3)) for name in "ab")
    other = open_source(write_folder(tmp_path / "c", 3, more=lambda i: {"text": "else"}))
    assert first.fingerprint() == moved.fingerprint() != other.fingerprint()
    assert json.loads(json.dumps(first.fingerprint())) == first.fingerprint()
    Image.fromarray(pixels(7)).save(tmp_path / "b" / "000.png")
    assert open_source(moved.ref).fingerprint() != first.fingerprint()


def test_a_fingerprint_of_records_tells_contents_apart_and_not_places(tmp_path):
    def fingerprint(name, turn=0):
        rows = [{"image": pixels(i + turn), "text": "x"} for i in range(40)]
        write_records(tmp_path / name, rows)
        return open_source(f"{tmp_path}/{name}").fingerprint()

    first = fingerprint("a")
    assert fingerprint("b") == first != fingerprint("c", 1)
    assert json.loads(json.dumps(first)) == first
