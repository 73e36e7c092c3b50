"""What benchmarks print, and refuse."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from benchmarks import memorised, quality
from jaxgen.data.emoji_scenes.scenes import EmojiScenes
from jaxgen.evaluation import report
from jaxgen.types import UserError


def test_distances_stand_in_a_row_each():
    ours, theirs = np.arange(0, 101.0), np.arange(10, 111.0)
    lines = memorised.table(ours, theirs).splitlines()
    assert "| samples | 0.0 | 5.0 | 50.0 | 95.0 |" in lines
    assert "| test scenes | 10.0 | 15.0 | 60.0 | 105.0 |" in lines
    assert lines[-1].endswith(f": {10 / 101:.1%}")  # 0 to 9 of 0 to 100


def test_the_nearest_training_scene_is_found():
    train = EmojiScenes("emoji_scenes")
    pictures = np.stack([train.read(i)["image"] for i in (7, 3)])
    pictures[1] = np.where(pictures[1] < 128, pictures[1] + 2, pictures[1] - 2)
    distances, which = memorised.nearest(pictures, train, 12)
    assert which.tolist() == [7, 3]
    np.testing.assert_allclose(distances, [0, 2])


def folder_of(tmp_path, texts):
    """Samples of prompts."""
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "0.png")
    lines = [json.dumps({"file_name": "0.png", "text": text}) for text in texts]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return memorised.Bench(str(tmp_path), count=len(texts))


def test_samples_are_compared_with_the_scenes_of_their_prompts_alone(tmp_path):
    test = EmojiScenes("emoji_scenes:test")
    captions = [test.scene(i).caption for i in range(3)]
    made, real = memorised.both(folder_of(tmp_path, captions))
    assert len(made) == len(real) == 3
    np.testing.assert_array_equal(real[2], test.read(2)["image"])
    with pytest.raises(UserError, match="prompt 1 is 'a fox', and test scene 1 is of"):
        memorised.both(folder_of(tmp_path, [captions[0], "a fox"]))


def test_prompts_and_what_they_are_compared_with_do_not_overlap():
    with pytest.raises(UserError, match="count 5001 is over 5000"):
        quality.main(quality.Bench(count=5001))


@pytest.mark.slow
def test_the_models_table_is_printed(tmp_path, capsys):
    bench = quality.Bench(count=4, steps=2, batch=4, splits=("test",), out=tmp_path)
    quality.main(bench)
    said = capsys.readouterr().out
    assert "test: 4 prompts, 2 steps, guidance 4.0" in said
    assert "| | asked | samples | real scenes | chance |" in said
    with pytest.raises(UserError, match="exists already; name a new or empty folder"):
        quality.main(bench)
    with pytest.raises(SystemExit) as stop:
        quality.main(quality.Bench(model="nowhere", count=4, splits=("test",)))
    assert stop.value.code == 2


def test_what_cannot_be_compared_or_written_is_said_first(tmp_path):
    bench = folder_of(tmp_path, ["a"] * 8)
    for fields in ({"scenes": 0}, {"scenes": 100_001}, {"pairs": tmp_path / "none" / "a.png"}):
        with pytest.raises(UserError, match=next(iter(fields))):
            memorised.main(replace(bench, **fields))


def test_chance_is_of_each_others_captions(monkeypatch):
    asked = {}

    def evaluate(judges, images, captions):
        asked["captions"] = captions
        right = {"left or right": (1, 9), "left or right, of two shown": (1, 1)}
        return report.Report(3, 3, right)

    monkeypatch.setattr(report, "evaluate", evaluate)
    found = quality.chance(None, [], ["a", "b", "c"])
    assert asked["captions"] == ["b", "c", "a"]
    assert found.right == {"left or right": (1, 9)}
