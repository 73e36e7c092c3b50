"""What makes the files that ship: the embedded model put together, its tokenizer, the judge."""

import runpy
import shutil
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgen.data.emoji_scenes import artwork
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.evaluation import judge
from jaxgen.load import open_model
from jaxgen.refs import EMBEDDED
from jaxgen.types import UserError
from train import judge as judging
from train import mini_tokenizer, ship_mini

ROOT = Path(__file__).parents[1]


def content(folder):
    """What files hold, by their names."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def values(folder):
    """Every number of a model folder, by part and path."""
    _, parts = open_model(folder)
    return {
        f"{part}/{path}": tensor.read(tuple(slice(0, side) for side in tensor.shape))
        for part, tensors in parts.items()
        for path, tensor in tensors.items()
    }


def test_a_model_is_put_together_in_half_precision_with_what_ships_around_it(tmp_path):
    ship_mini.main(ship_mini.Options(EMBEDDED, out=tmp_path / "new" / "mini"))
    made, ours = values(tmp_path / "new" / "mini"), values(EMBEDDED)
    assert made.keys() == ours.keys()
    for key, value in ours.items():
        assert made[key].dtype == np.float16
        np.testing.assert_array_equal(made[key], value)
    assert content(tmp_path / "new" / "mini").keys() == content(EMBEDDED).keys()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["mini"]  # nothing else is left


def test_what_is_replaced_keeps_its_card_and_what_is_new_has_no_figures(tmp_path):
    options = ship_mini.Options(EMBEDDED, out=tmp_path / "mine")
    ship_mini.main(options)
    card = tmp_path / "mine" / "README.md"
    assert f"from {EMBEDDED}" in card.read_text()
    assert "%" not in card.read_text()
    card.write_text("my words")
    ship_mini.main(options)
    assert card.read_text() == "my words"


def test_a_folder_that_is_no_model_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already; name a new or empty folder"):
        ship_mini.main(ship_mini.Options(EMBEDDED, out=tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_weight_that_half_precision_cannot_hold_is_an_error():
    assert ship_mini.halve(np.float32([1.5, -2])).tolist() == [1.5, -2]
    with pytest.raises(UserError, match="too large for float16"):
        ship_mini.halve(np.float32([1e6]))


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("ship_mini", ["nowhere"], "ship_mini: no model folder or file nowhere"),
        ("judge", ["--out", "file"], "judge: cannot write file"),
    ],
)
def test_bad_input_is_one_line(script, arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train" / f"{script}.py"), run_name="__main__")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(says)
    assert said.count("\n") == 1


def test_a_judge_takes_the_place_of_the_one_that_is_there_and_its_card_stays(tmp_path):
    shutil.copytree(judge.FOLDER, tmp_path / "judge")
    there = content(tmp_path / "judge")
    params = jax.tree.map(lambda leaf: leaf + 1, judge.read())
    judging.check_place(tmp_path / "judge")
    judging.write(params, tmp_path / "judge")
    now = content(tmp_path / "judge")
    assert now.keys() == there.keys()
    assert now[Path("README.md")] == there[Path("README.md")]
    again = judge.read(tmp_path / "judge")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3), again, params)


@pytest.mark.slow
def test_a_judge_is_made_and_read(tmp_path):
    judging.main(judging.Options(tmp_path / "judge", steps=2, batch=4))
    made, ours = judge.read(tmp_path / "judge"), judge.read()
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, ours)


def test_merges_are_those_of_the_paper():
    """Sennrich et al. 2016, section 3.2, whose words these are; in CLIP's form of a word's end."""
    words = Counter({"low": 5, "lower": 2, "newest": 6, "widest": 3})
    merges = mini_tokenizer.learn(words, 3)
    assert merges == [("e", "s"), ("es", "t</w>"), ("l", "o")]
    assert mini_tokenizer.learn(Counter({"ab": 1}), 9) == [("a", "b</w>")]  # all there are
    assert mini_tokenizer.merged(("a", "n", "a", "n", "a"), ("a", "n")) == ("an", "an", "a")


def test_words_of_captions_are_one_token_and_hyphens_stand_alone():
    tokenizer = Tokenizer.read(EMBEDDED / "tokenizer")
    names = [subject.name for subject in artwork.load().subjects]
    words = {word.lower() for name in names for word in name.split()} | {"background", "style"}
    spelled = {word for word in words if len(tokenizer.encode(word)) > 1}
    assert spelled == {word for word in words if "-" in word} == {"t-shirt", "jack-o-lantern"}
    alone = [token for part in ("t", "-", "shirt") for token in tokenizer.encode(part)]
    assert tokenizer.encode("t-shirt") == alone
