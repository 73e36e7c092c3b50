"""Safetensors there and back; numpy's own slicing and safetensors' own reader are the truth."""

import hashlib
import json
import pickle
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from jaxgen.types import UserError
from jaxgen.weights import files

RNG = np.random.default_rng(0)
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_]


def save(folder, arrays, **kwargs):
    items = [(k, lambda v=v: v, v.nbytes) for k, v in arrays.items()]
    files.save_folder(folder, "model", items, **kwargs)


@pytest.fixture
def opened(tmp_path):
    """Random arrays and the same tensors, opened from a file."""
    shapes = {"matrix": (6, 4), "kernel": (5, 3, 1, 1), "conv": (4, 3, 2, 2), "bias": (7,)}
    arrays = {k: RNG.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    save(tmp_path, arrays)
    return arrays, files.open_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_values_and_dtypes_come_back_as_they_were_saved(dtype, tmp_path):
    values = (RNG.normal(size=(3, 5)) * 9).astype(dtype)
    odd = {"values": values, "turned": values.T, "scalar": values[0, 0].reshape(())}
    odd["empty"] = values[:0]
    save(tmp_path, odd)
    tensors = files.open_folder(tmp_path, "model")
    for key, expected in odd.items():
        actual = tensors[key].numpy()
        assert actual.shape == tensors[key].shape == expected.shape
        assert actual.dtype == tensors[key].dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)


def test_a_file_is_what_the_sum_beside_it_says(tmp_path, opened):
    path = tmp_path / "model.safetensors"
    files.write_sum(path)
    files.open_file(path)
    said = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / "model.safetensors.sha256").read_text() == f"{said}  model.safetensors\n"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"model.safetensors is damaged: it is not what model"):
        files.open_file(path)
    save(tmp_path, opened[0])  # what is saved anew has no sum of what was there
    files.open_file(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_file_written_by_torch_reads_alike(dtype, tmp_path):
    value = torch.randn(4, 6).to(dtype)
    safetensors.torch.save_file({"x": value}, tmp_path / "a.safetensors")
    tensor = files.open_file(tmp_path / "a.safetensors")["x"]
    block = tensor.read((slice(1, 3), slice(2, 5)))
    np.testing.assert_array_equal(block.astype(np.float32), value[1:3, 2:5].float().numpy())


def test_torch_reads_a_saved_file_alike(tmp_path):
    value = RNG.normal(size=(4, 6)).astype(ml_dtypes.bfloat16)
    save(tmp_path, {"x": value})
    theirs = safetensors.torch.load_file(tmp_path / "model.safetensors")["x"]
    assert theirs.dtype == torch.bfloat16
    np.testing.assert_array_equal(theirs.float().numpy(), value.astype(np.float32))


def blocks(shape):
    """A few blocks of an array, one slice per axis, whole and empty among them."""
    cuts = [sorted({0, n // 3, n // 2 + 1, n}) for n in shape]
    yield tuple(slice(None) for _ in shape)
    yield tuple(slice(0, 0) for _ in shape)
    for i in range(3):
        pairs = [list(pairwise(c)) for c in cuts]
        yield tuple(slice(*p[i % len(p)]) for p in pairs)


VIEWS = {
    "plain": ("matrix", lambda t: t, lambda a: a),
    "rows": ("matrix", lambda t: t.rows(2, 5), lambda a: a[2:5]),
    "rows of rows": ("bias", lambda t: t.rows(1, 6).rows(2, 4), lambda a: a[3:5]),
    "transposed": ("conv", lambda t: t.transposed(2, 3, 1, 0), lambda a: a.transpose(2, 3, 1, 0)),
    "turned and back": (
        "conv",
        lambda t: t.transposed(2, 3, 1, 0).transposed(3, 2, 0, 1),
        lambda a: a,
    ),
    "squeezed": ("kernel", lambda t: t.squeezed(), lambda a: a[:, :, 0, 0]),
    "all three": (
        "kernel",
        lambda t: t.squeezed().rows(1, 4).transposed(1, 0),
        lambda a: a[1:4, :, 0, 0].T,
    ),
}


@pytest.mark.parametrize("view", VIEWS)
def test_blocks_of_a_view_are_numpys_blocks(view, opened):
    arrays, tensors = opened
    key, ours, numpys = VIEWS[view]
    tensor, expected = ours(tensors[key]), numpys(arrays[key])
    assert tensor.shape == expected.shape
    np.testing.assert_array_equal(tensor.numpy(), expected)
    for block in blocks(tensor.shape):
        np.testing.assert_array_equal(tensor.read(block), expected[block])


def test_a_view_reads_no_more_than_the_block_asked_for():
    asked = []

    def read(index):
        asked.append(index)
        return np.zeros([s.stop - s.start for s in index], np.float32)

    fused = files.Tensor((300, 50), np.dtype(np.float32), read)
    fused.rows(100, 200).transposed(1, 0).read((slice(4, 6), slice(10, 20)))
    assert asked == [(slice(110, 120), slice(4, 6))]


def test_shards_hold_at_most_their_size_and_read_back_as_one(tmp_path):
    arrays = {f"block.{i}": RNG.normal(size=(8, i + 1)).astype(np.float32) for i in range(6)}
    save(tmp_path, arrays, shard_bytes=300)
    shards = sorted(tmp_path.glob("*.safetensors"))
    loaded = [safetensors.numpy.load_file(p) for p in shards]
    assert len(shards) > 2
    assert all(sum(v.nbytes for v in s.values()) <= 300 for s in loaded)
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in arrays.values())

    tensors = files.open_folder(tmp_path, "model")
    assert tensors.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(tensors[key].numpy(), value)


def test_the_last_save_is_what_is_read_sharded_or_not(tmp_path):
    first = {"a": np.zeros(8, np.float32), "b": np.zeros(8, np.float32)}
    for n, shard_bytes in enumerate([1000, 32, 1000], 1):
        save(tmp_path, {k: v + n for k, v in first.items()}, shard_bytes=shard_bytes)
        assert files.open_folder(tmp_path, "model")["b"].numpy()[0] == n


def test_a_model_may_be_saved_over_the_file_it_is_read_from(tmp_path):
    value = RNG.normal(size=(64, 64)).astype(np.float32)
    save(tmp_path, {"a": value, "b": -value})
    tensors = files.open_folder(tmp_path, "model")
    half = value.nbytes
    files.save_folder(tmp_path, "model", [(k, t.numpy, half) for k, t in tensors.items()])
    np.testing.assert_array_equal(files.open_folder(tmp_path, "model")["b"].numpy(), -value)


def test_a_variant_is_read_when_asked_for_or_when_it_is_all_there_is(tmp_path):
    half = {"x": np.zeros(3, np.float16)}
    safetensors.numpy.save_file(half, tmp_path / "model.fp16.safetensors")
    assert files.open_folder(tmp_path, "model")["x"].dtype == np.float16
    save(tmp_path, {"x": np.zeros(3, np.float32)})
    assert files.open_folder(tmp_path, "model")["x"].dtype == np.float32
    assert files.open_folder(tmp_path, "model", "fp16")["x"].dtype == np.float16
    with pytest.raises(UserError, match=r"has no model\.bf16\.safetensors"):
        files.open_folder(tmp_path, "model", "bf16")


def one_line(error, *words):
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def good_bytes():
    return safetensors.numpy.save({"x": np.arange(100, dtype=np.float32)})


def with_header(header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


BAD = {
    "a list for a tensor": (with_header({"x": ["F32", [16], [0, 64]]}), "not safetensors"),
    "empty": (b"", "is empty"),
    "truncated data": (good_bytes()[:-50], "truncated"),
    "truncated header": (good_bytes()[:20], "truncated"),
    "renamed pickle": (pickle.dumps({"x": [1.0] * 99}), "not safetensors"),
    "web page": (b"<!DOCTYPE html><html>" * 9, "not safetensors"),
    "a header of 2^63 bytes": (b"\xff" * 7 + b"\x7f" + b"{}", "not safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_an_error_of_one_line_that_names_it(case, tmp_path):
    content, words = BAD[case]
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(UserError) as error:
        files.open_file(tmp_path / "bad.safetensors")
    one_line(error, "bad.safetensors", words)


def test_a_file_replaced_after_opening_is_read_as_it_was(tmp_path):
    safetensors.numpy.save_file({"x": np.ones(9, np.float32)}, tmp_path / "model.safetensors")
    tensor = files.open_file(tmp_path / "model.safetensors")["x"]
    safetensors.numpy.save_file({"x": np.zeros(99)}, tmp_path / "other")
    (tmp_path / "other").replace(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(tensor.numpy(), np.ones(9, np.float32))


def test_a_file_changed_after_opening_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"x": np.ones(9, np.float32)}, path)
    tensor = files.open_file(path)["x"]
    with path.open("r+b") as file:
        file.truncate(40)
    with pytest.raises(UserError) as error:
        tensor.numpy()
    one_line(error, "model.safetensors changed")


def test_a_tensor_that_is_in_two_shards_is_an_error(tmp_path):
    for i, value in enumerate((np.ones(2), np.zeros(2))):
        safetensors.numpy.save_file({"x": value}, tmp_path / f"m-{i}.safetensors")
    index = {"weight_map": {"x": "m-0.safetensors", "y": "m-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError):
        files.open_folder(tmp_path, "model")
    safetensors.numpy.save_file({"x": np.ones(2), "y": np.ones(2)}, tmp_path / "m-1.safetensors")
    with pytest.raises(UserError) as error:
        files.open_folder(tmp_path, "model")
    one_line(error, "x is not in m-1.safetensors")


def test_an_absent_file_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError) as error:
        files.open_file(tmp_path / "none.safetensors")
    one_line(error, "no such file", "none.safetensors")


@pytest.mark.parametrize("suffix", files.PICKLES)
def test_a_pickle_is_refused_unread(suffix, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / f"model{suffix}").write_bytes(pickle.dumps(Bomb()))
    for read in (
        lambda: files.open_file(tmp_path / f"model{suffix}"),
        lambda: files.open_folder(tmp_path, "model"),
    ):
        with pytest.raises(UserError) as error:
            read()
        one_line(error, f"model{suffix}", "pickle", "convert it to safetensors")
    assert not (tmp_path / "ran").exists()


def test_an_unsupported_dtype_is_an_error_that_names_the_tensor(tmp_path):
    value = torch.zeros(3, dtype=torch.float8_e4m3fn)
    safetensors.torch.save_file({"odd": value}, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as error:
        files.open_file(tmp_path / "a.safetensors")
    one_line(error, "odd", "F8_E4M3")


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/out.safetensors", "a/b.safetensors", "a.bin", 3, "a\n"]
)
def test_an_index_may_name_only_safetensors_beside_it(name, tmp_path):
    index = {"weight_map": {"x": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as error:
        files.open_folder(tmp_path, "model")
    one_line(error, "index.json", repr(name), "no safetensors file beside it")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"x": "gone.safetensors"}}', "no such file"),
        ('{"weight_map": {"x": "real.safetensors", "y": "real.safetensors"}}', "promises 1"),
    ],
)
def test_a_broken_index_is_an_error_of_one_line(index, words, tmp_path):
    safetensors.numpy.save_file({"x": np.zeros(1)}, tmp_path / "real.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError) as error:
        files.open_folder(tmp_path, "model")
    one_line(error, words)


def test_a_report_names_every_difference_at_once_and_is_silent_without_one():
    expected = {"a": (1,), "b": (2, 2), "c": (3,), "d": (4,)}
    files.report(expected, dict(expected), "unet")
    with pytest.raises(UserError) as error:
        files.report(expected, {"b": (2, 3), "c": (3,), "e": (5,), "f": ()}, "unet")
    one_line(
        error,
        "unet does not fit its config",
        "2 missing: a, d",
        "2 unexpected: e, f",
        "1 misshapen: b is [2, 3] and should be [2, 2]",
    )
