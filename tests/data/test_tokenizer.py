import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from jaxgen.data import tokenizer as module
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.types import UserError

TINY = Path(__file__).parents[1] / "assets" / "tiny" / "tokenizer"
CLIP_TOKENIZER = Path(module.__file__).parents[1] / "assets" / "clip_tokenizer"
TEXTS = [
    "",
    " ",
    "a photo of a red fox in the snow",
    "HELLO World!!! it's John's, they're; we'll I'd I'm you've don't",
    "'S 'T 'LL ''s '' s",
    "1234 5.6e7 ½ Ⅷ ٣ 50%",
    "naïve café cafe\u0301 Å ﬁ İstanbul ẞ",
    "你好世界 こんにちは 한국어",
    "हिन्दी ไทย العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 :-)",
    "  tabs\tand\nlines\r\nand \u00a0\u3000 wide   spaces\x0b\x0c\x85\u2028",
    "zero\u200bwidth\ufeffmarks",
    "...---...!?#@ &amp; <b> [x] {y} \\(z\\)",
    "<|endoftext|> in <|startoftext|>text <|ENDOFTEXT|>",
    "a" * 300,
    "the moon over the water " * 100,
]


def random_texts(n):
    rng = random.Random(0)
    ranges = [(32, 127), (160, 1400), (0x2000, 0x2070), (0x300, 0x370), (0x1F300, 0x1F700)]
    strange = [chr(c) for bounds in ranges for c in range(*bounds)]
    return [
        "".join(rng.choice(rng.choice([strange, "the moon's 19 !?"])) for _ in range(30))
        for _ in range(n)
    ]


@pytest.fixture(params=["vocab.json", "tokenizer.json", "pad !", "added tokens"])
def folder(request, tmp_path):
    """A tokenizer folder in each of the forms that are about."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(TINY, folder)
    if request.param == "tokenizer.json":
        shutil.rmtree(folder)
        CLIPTokenizer.from_pretrained(TINY).save_pretrained(folder)
        assert (folder / "tokenizer.json").exists()
        assert not (folder / "vocab.json").exists()
    if request.param == "pad !":  # as Stable Diffusion 2, whose config contradicts its map
        edit(folder / "special_tokens_map.json", pad_token="!")
    if request.param == "added tokens":  # as older versions saved Textual Inversion
        (folder / "added_tokens.json").write_text('{"<cat-toy>": 600, "<cat-toy>_1": 601}')
    return folder


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_ids_equal_those_of_transformers(folder):
    ours, theirs = Tokenizer.read(folder), CLIPTokenizer.from_pretrained(folder)
    for text in [*TEXTS, *random_texts(200), "a <cat-toy> and <cat-toy>_1!"]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text


def test_ids_of_the_vocabulary_that_ships_equal_those_of_transformers():
    ours, theirs = Tokenizer.read(CLIP_TOKENIZER), CLIPTokenizer.from_pretrained(CLIP_TOKENIZER)
    assert ours.size == len(theirs) == 49408
    for text in [*TEXTS, *random_texts(200)]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text


def test_special_tokens_and_lengths_equal_those_of_transformers(folder):
    ours, theirs = Tokenizer.read(folder), CLIPTokenizer.from_pretrained(folder)
    assert ours.bos == theirs.bos_token_id
    assert ours.eos == theirs.eos_token_id
    assert ours.pad == theirs.pad_token_id
    assert ours.length == theirs.model_max_length == 77
    assert ours.size == len(theirs)


def test_a_config_that_lists_its_added_tokens_wins_over_the_map(tmp_path):
    shutil.copytree(TINY, tmp_path / "t")
    edit(tmp_path / "t" / "special_tokens_map.json", pad_token="!")
    token = {"content": "<cat-toy>", "lstrip": False, "normalized": True, "rstrip": False}
    added = {"600": token | {"single_word": False, "special": False}}
    edit(tmp_path / "t" / "tokenizer_config.json", added_tokens_decoder=added)
    ours, theirs = Tokenizer.read(tmp_path / "t"), CLIPTokenizer.from_pretrained(tmp_path / "t")
    assert ours.pad == theirs.pad_token_id == 599
    text = "one <cat-toy>!"
    assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert 600 in ours.encode(text)


def test_tokenizer_json_alone_names_its_special_tokens(tmp_path):
    theirs = CLIPTokenizer.from_pretrained(TINY)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="names no pad_token"):
        Tokenizer.read(tmp_path)

    padding = {"strategy": {"Fixed": 10}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 599, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    edit(tmp_path / "tokenizer.json", padding=padding, truncation=cut)
    ours = Tokenizer.read(tmp_path)
    assert (ours.bos, ours.eos, ours.pad, ours.length) == (598, 599, 599, 77)
    for text in ("a", "the moon over the water"):  # neither filled up to 10 nor cut to 3
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_saved_files_are_byte_identical(folder, tmp_path):
    Tokenizer.read(folder).save(tmp_path / "new" / "tokenizer")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    after = {path.name: path.read_bytes() for path in (tmp_path / "new" / "tokenizer").iterdir()}
    assert before == after


def test_folders_that_cannot_be_written_to_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*: Not a directory"):
        Tokenizer.read(TINY).save(tmp_path / "file" / "tokenizer")


def test_control_characters_are_removed_and_line_breaks_are_spaces():
    ours = Tokenizer.read(TINY)
    assert ours.encode("f\x00o\x1bx\x7f\x9f") == ours.encode("fox")
    assert ours.encode("red\tfox\nin\r\nsnow") == ours.encode("red fox in snow")
    assert ours.encode("fo\udcffx\ud800") == ours.encode("fox")
    assert ours.encode("a\u200db") != ours.encode("ab"), "joiners spell emoji and stay"


@pytest.mark.parametrize("length", [10**30, 2, -1, True, "77", 77.0, None])
def test_absurd_lengths_become_77(tmp_path, length):
    shutil.copytree(TINY, tmp_path / "t")
    edit(tmp_path / "t" / "tokenizer_config.json", model_max_length=length)
    assert Tokenizer.read(tmp_path / "t").length == 77


DAMAGE = {
    "no merges": ("merges.txt", None, "neither tokenizer.json nor merges.txt"),
    "no vocabulary": ("vocab.json", None, "neither tokenizer.json nor vocab.json"),
    "cut vocabulary": ("vocab.json", '{"a": 0, "b', "vocab.json is not valid JSON"),
    "a list": ("vocab.json", "[1, 2]", "vocab.json does not hold a JSON object"),
    "empty": ("tokenizer.json", "{}", "tokenizer.json is damaged"),
    "deep": ("vocab.json", "[" * 100_000, "vocab.json is not valid JSON"),
    "text ids": ("vocab.json", '{"a": "0"}', "vocab.json has ids that are not whole numbers"),
    "one id twice": ("vocab.json", '{"a": 0, "b": 0}', "one id to several tokens"),
    "merge of three": ("merges.txt", "#version: 0.2\nt h e\n", "merges.txt: line 2"),
    "foreign merge": ("merges.txt", "#version: 0.2\nqq zz\n", "merges.txt is damaged"),
    "foreign special": ("special_tokens_map.json", '{"bos_token": "<s>"}', "'<s>' is not in the"),
    "half a surrogate": (
        "special_tokens_map.json",
        '{"eos_token": "\\ud800"}',
        "names no eos_token",
    ),
    "foreign tokenizer": ("tokenizer.json", '{"model": 3}', "tokenizer.json is damaged"),
    "added text id": ("added_tokens.json", '{"<x>": "7"}', "without a text or an id"),
    "added far id": ("added_tokens.json", '{"<x>": 700}', "its turn is 600"),
    "not UTF-8": ("merges.txt", b"\xff\xfe", "merges.txt is damaged"),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_refused_in_one_line(tmp_path, name, content, message):
    shutil.copytree(TINY, tmp_path / "t")
    path = tmp_path / "t" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.read(tmp_path / "t")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_special_tokens_and_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="names no bos_token"):
        Tokenizer.read(tmp_path / "nowhere")
    shutil.copy(TINY / "vocab.json", tmp_path)
    shutil.copy(TINY / "merges.txt", tmp_path)
    with pytest.raises(UserError, match="names no bos_token"):
        Tokenizer.read(tmp_path)


def test_huge_files_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match=r"vocab\.json is larger than"):
        Tokenizer.read(TINY)
