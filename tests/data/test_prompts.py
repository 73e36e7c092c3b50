import gc
import math
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from jaxgen.data import prompts
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.types import UserError

TINY = Path(__file__).parents[1] / "assets" / "tiny" / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.read(TINY)


PARSED = {
    "": [],
    "a fox": [("a fox", 1.0)],
    "a (red:1.3) fox": [("a ", 1.0), ("red", 1.3), (" fox", 1.0)],
    "(a:1.5)": [("a", 1.5)],
    "(a (b:2) c:1.5)": [("a ", 1.5), ("b", 3.0), (" c", 1.5)],
    "((a:2):.5)b": [("ab", 1.0)],
    "(a:0)(b:-1)(c:+2.)": [("a", 0.0), ("b", -1.0), ("c", 2.0)],
    "( a : 1.3 )": [(" a ", 1.3)],
    "(a:b:1.2)": [("a:b", 1.2)],
    "(see (this):1.2)": [("see (this)", 1.2)],
    "(:1.2)": [],
    "(a) [b] ((c))": [("(a) [b] ((c))", 1.0)],
    r"\(a:1.3\)": [("(a:1.3)", 1.0)],
    r"(a\):1.3)": [("a)", 1.3)],
    r"(a\(:1.3)": [("a(", 1.3)],
    r"¯\_(x)_/¯ \\": [(r"¯\_(x)_/¯ \\", 1.0)],
    "(a:1.3": [("(a:1.3", 1.0)],
    "a:1.3)": [("a:1.3)", 1.0)],
    "(a:)": [("(a:)", 1.0)],
    "(a:nan)(b:inf)(c:1e9)(d:0x1)(e:1.2.3)": [("(a:nan)(b:inf)(c:1e9)(d:0x1)(e:1.2.3)", 1.0)],
    "(a:٣)": [("(a:٣)", 1.0)],
    ") ( ) (": [(") ( ) (", 1.0)],
}


@pytest.mark.parametrize(("prompt", "expected"), PARSED.items(), ids=repr)
def test_weights_are_read_and_other_parentheses_are_text(prompt, expected):
    assert prompts.parse(prompt) == expected


@pytest.mark.parametrize(
    "prompt", ["(a:101)", "(a:-1000)", "((a:11):11)", f"(a:{'9' * 999})", f"((a:{'9' * 999}):0)"]
)
def test_absurd_weights_are_refused_with_the_way_out(prompt):
    with pytest.raises(UserError, match=r"is beyond 100; .* \\\( and \\\)") as caught:
        prompts.parse(prompt)
    assert len(str(caught.value)) < 200


HOSTILE = {
    "opened": "(" * 100_000,
    "closed": ")" * 100_000,
    "nested": "(" * 50_000 + "a" + ":1)" * 50_000,
    "texts nested": "(a" * 30_000 + ":1)" * 30_000,
    "colons": ":" * 100_000,
    "spaces": "(a:" + " " * 100_000,
    "colons and spaces": ": " * 50_000,
    "digits": "(a:" + "1" * 100_000,
    "digits and a point": "(a:" + "1" * 50_000 + "." + "1" * 50_000,
    "backslashes": "\\" * 100_000,
}


@pytest.mark.parametrize("prompt", HOSTILE.values(), ids=HOSTILE)
def test_hostile_prompts_take_linear_time(prompt, request):
    request.addfinalizer(gc.enable)
    gc.disable()  # or a worker that holds a million objects of other tests walks them all, often
    start = time.process_time()
    texts = prompts.parse(prompt)
    assert time.process_time() - start < 3  # seconds; quadratic time takes minutes
    assert all(math.isfinite(weight) for _, weight in texts)


@pytest.mark.parametrize("words", [0, 1, 20, 74, 75])
def test_ordinary_prompts_equal_those_of_transformers(tokenizer, words):
    prompt = " ".join(["moon"] * words) + "  "
    theirs = CLIPTokenizer.from_pretrained(TINY)
    expected = theirs([prompt], padding="max_length", return_tensors="np").input_ids

    ids, weights = prompts.chunks(tokenizer, prompt)
    assert ids.dtype == np.int32
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(weights, np.ones((1, 77)))


def test_long_prompts_fall_into_chunks_that_hold_every_token_in_order(tokenizer):
    prompt = "a red fox in the snow, " * 40
    tokens = tokenizer.encode(prompt)
    ids, _ = prompts.chunks(tokenizer, prompt)
    n = math.ceil(len(tokens) / 75)
    assert n > 2
    assert ids.shape == (n, 77)
    assert ids[:, 1:76].ravel()[: len(tokens)].tolist() == tokens
    assert (ids[:, 0] == tokenizer.bos).all()
    assert (ids[:-1, 76] == tokenizer.eos).all()
    assert (ids[-1, 1 + len(tokens) % 75 :] == tokenizer.eos).all()


def test_weights_lie_on_the_tokens_of_their_text_alone(tokenizer):
    ids, weights = prompts.chunks(tokenizer, "the (red:1.5) moon")
    plain, _ = prompts.chunks(tokenizer, "the red moon")
    np.testing.assert_array_equal(ids, plain)
    first = 1 + len(tokenizer.encode("the"))
    expected = np.ones((1, 77), np.float32)
    expected[0, first : first + len(tokenizer.encode("red"))] = 1.5
    np.testing.assert_array_equal(weights, expected)


def test_padding_is_the_pad_token_and_not_the_end(tmp_path):
    for path in TINY.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "special_tokens_map.json"
    path.write_text(path.read_text().replace('"pad_token": "<|endoftext|>"', '"pad_token": "!"'))
    tokenizer = Tokenizer.read(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad != tokenizer.eos
    expected = theirs(["a red fox"], padding="max_length", return_tensors="np").input_ids
    np.testing.assert_array_equal(prompts.chunks(tokenizer, "a red fox")[0], expected)


def test_more_than_sixteen_chunks_are_refused(tokenizer):
    assert len(tokenizer.encode("!" * 1200)) == 1200
    ids, _ = prompts.chunks(tokenizer, "!" * 1200)
    assert ids.shape == (16, 77)
    with pytest.raises(UserError, match="has 1201 tokens, and the limit is 1200"):
        prompts.chunks(tokenizer, "!" * 1201)


def test_padded_chunks_are_the_empty_prompt(tokenizer):
    ids, weights = prompts.chunks(tokenizer, "a (red:1.5) fox")
    empty, _ = prompts.chunks(tokenizer, "")
    more_ids, more_weights = prompts.pad_chunks(tokenizer, ids, weights, 3)
    np.testing.assert_array_equal(more_ids, np.concatenate([ids, empty, empty]))
    np.testing.assert_array_equal(more_weights, np.concatenate([weights, np.ones((2, 77))]))
    assert more_ids.dtype == np.int32
    assert more_weights.dtype == np.float32
    same, _ = prompts.pad_chunks(tokenizer, more_ids, more_weights, 1)
    np.testing.assert_array_equal(same, more_ids)
