"""Config files as typed values: nothing is silently ignored."""

import json
from dataclasses import dataclass

import pytest

from jaxgen import config
from jaxgen.types import UserError


@dataclass(frozen=True)
class Thing:
    """Every kind of annotation that a config has."""

    width: int = 4
    rate: float = 0.5
    name: str | None = None
    levels: int | tuple[int, ...] = 1
    kinds: tuple[str, ...] = ()
    flag: bool = False

    def __post_init__(self):
        config.check_positive(self, "width", "levels")


FIXED = {"act": config.AnyOf(("silu", "swish")), "free": ..., "shift": None, "sizes": (1, 2)}


def parse(**data):
    return config.parse(Thing, data, FIXED, "thing.json")


def test_absent_fields_have_the_defaults_and_notes_are_skipped():
    assert parse(_class_name="Thing", _note=[1]) == Thing()


def test_lists_become_tuples_and_whole_numbers_serve_as_floats():
    thing = parse(rate=1, levels=[1, 2], kinds=["a"], sizes=[1, 2], act="swish", free={}, flag=True)
    assert thing == Thing(rate=1, levels=(1, 2), kinds=("a",), flag=True)
    assert isinstance(hash(thing), int)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"widht": 1}, "unknown field 'widht' (perhaps width?)"),
        ({"flavour": 1}, "unknown field 'flavour'"),
        ({"act": "relu"}, "act = 'relu' is not supported (only 'silu' or 'swish' is)"),
        ({"shift": 0}, "shift = 0 is not supported (only None is)"),
        ({"width": "4"}, "width = '4' is not of type int"),
        ({"width": True}, "width = True is not of type int"),
        ({"width": None}, "width = None is not of type int"),
        ({"rate": "high"}, "rate = 'high' is not of type float"),
        ({"name": 3}, "name = 3 is not of type str | None"),
        ({"levels": [1, 2.5]}, "levels = (1, 2.5) is not of type int | tuple[int, ...]"),
        ({"kinds": "abc"}, "kinds = 'abc' is not of type tuple[str, ...]"),
        ({"flag": 1}, "flag = 1 is not of type bool"),
        ({"width": 0}, "width = 0 is not above zero"),
        ({"levels": [1, -2]}, "levels = (1, -2) is not above zero"),
        ({"widht": 1, "act": "relu", "rate": "x"}, "'widht' (perhaps width?); act = 'relu'"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_wanted(data, words):
    with pytest.raises(UserError) as error:
        parse(**data)
    assert str(error.value).startswith("thing.json: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_dumped_parses_to_the_same_value(tmp_path):
    thing = Thing(width=7, rate=0.1, name="a", levels=(1, 2), kinds=("b", "c"), flag=True)
    config.write_json(tmp_path / "thing.json", config.dump(thing, "Thing"))
    data = config.read_json(tmp_path / "thing.json")
    assert data["_class_name"] == "Thing"
    assert parse(**data) == thing


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "holds a list, not a JSON object"),
        (b"[" * 200_000, "nested too deeply"),
        (b" " * (config.MAX_BYTES + 1), "larger than 16 MiB"),
        (None, "cannot read"),
    ],
    ids=["cut", "binary", "list", "deep", "large", "absent"],
)
def test_an_unreadable_file_is_an_error_of_one_line_that_names_it(content, words, tmp_path):
    path = tmp_path / "thing.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        config.read_json(path)
    assert str(path) in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_json_of_this_kind_is_read_as_it_stands(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a": "ü"}))
    assert config.read_json(tmp_path / "a.json") == {"a": "ü"}
