"""What is right in a picture: the counting by hand-made verdicts, the judge on real scenes."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxgen import cli
from jaxgen.data.emoji_scenes import artwork, said
from jaxgen.data.emoji_scenes.longtail import SPLITS
from jaxgen.data.emoji_scenes.scenes import EmojiScenes
from jaxgen.evaluation import judge, report, scenes
from jaxgen.evaluation.clip import embed_images, for_kid, open_clip
from jaxgen.evaluation.distances import kid
from jaxgen.refs import EMBEDDED_CLIP
from jaxgen.types import UserError
from train import judge as training

NO_CELLS = np.zeros((judge.CELLS, judge.CELLS), bool)
LEFT, RIGHT, LOW = (0.1, 0.2, 0.4, 0.5), (0.5, 0.3, 0.9, 0.6), (0.15, 0.6, 0.4, 0.9)


def right(caption, shown, style="flat", colour="blue"):
    """What is right of a caption in a picture that shows subjects, by name, in boxes."""
    number = artwork.load().number
    found = [judge.Found(number(name), style, box, NO_CELLS) for name, box in shown.items()]
    found = scenes.verdicts(said.read(caption), judge.Seen(found, colour))
    return [name for name, is_right in found if is_right], [n for n, yes in found if not yes]


def test_what_is_shown_where_it_is_said_is_right():
    shown = {"red apple": LEFT, "owl": RIGHT}
    caption = "a red apple left of an owl, flat style, on a blue background"
    assert right(caption, shown) == (
        [
            *["subject, head"] * 2,
            *["all subjects", "asked subjects alone", "style", "background"],
            *["left or right", "left or right, of two shown"],
        ],
        [],
    )
    wrong = ["style", "background", "left or right", "left or right, of two shown"]
    assert right("an owl left of a red apple, 3D style, on a red background", shown)[1] == wrong
    shown = {"red apple": LEFT, "owl": LOW}  # whose middles differ along x, too
    assert not right("a red apple above an owl", shown)[1]
    assert right("a red apple below an owl", shown)[1][0] == "above or below"


def test_a_subject_that_is_not_shown_lies_nowhere():
    assert right("a red apple left of an owl", {"red apple": LEFT, "fox": RIGHT}) == (
        ["subject, head"],
        ["subject, head", "all subjects", "asked subjects alone", "left or right"],
    )
    assert "asked subjects alone" in right("a red apple left of an owl", {"owl": LEFT})[0]
    assert "asked subjects alone" in right("a red apple", {})[1]  # where there is nothing
    assert right("a view of Paris", {"fox": LEFT}) == ([], [])


def test_cells_whose_boxes_agree_are_one_subject():
    box = np.array([[0.1, 0.2, 0.5, 0.6], [0.52, 0.2, 0.9, 0.5]])
    shown = NO_CELLS.copy()
    reach = np.zeros((*shown.shape, 4))
    y, x = (np.indices(shown.shape) + 0.5) / judge.CELLS
    for low_x, low_y, high_x, high_y in box:
        own = (x > low_x) & (x < high_x) & (y > low_y) & (y < high_y)
        own &= (x * 40).astype(int) % 3 > 0  # which is in parts
        shown |= own
        reach[own] = np.stack([x - low_x, y - low_y, high_x - x, high_y - y], -1)[own]
    shown[0, :5] = True  # too few, and of no size
    found = judge.instances(shown, reach)
    assert len(found) == 2
    np.testing.assert_allclose(sorted(each[0] for each in found), box, atol=1e-6)
    assert sum(cells.sum() for _, cells in found) == shown.sum() - 5


def test_the_judge_knows_real_scenes():
    images, captions = report.read_all(EmojiScenes("emoji_scenes:test_even"), 100)
    for name, (right, asked) in scenes.right(judge.read(), images, captions).items():
        assert right >= 0.85 * asked, name
    moved = [*captions[1:], captions[0]]
    chance = scenes.right(judge.read(), images, moved)
    for name, most in {"all subjects": 0.05, "background": 0.3, "style": 0.5}.items():
        right, asked = chance[name]
        assert right <= most * asked, name


def test_the_judge_learns_no_scene_that_is_judged_and_none_twice():
    scenes_of_it = [training.scene_of(number) for number in range(40_000)]
    assert len(set(scenes_of_it)) == len(scenes_of_it)
    for split, seed, i in scenes_of_it:
        assert split in ("validation_even", "held")
        assert seed >= 1000  # all that is judged, and all that models learn, has seed 0
        assert i < SPLITS[split].scenes


def test_a_damaged_or_missing_judge_is_named(tmp_path):
    with pytest.raises(UserError, match="judge"):
        judge.read(tmp_path / "judge")
    shutil.copytree(judge.FOLDER, tmp_path / "judge")
    path = tmp_path / "judge" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        judge.read(tmp_path / "judge")


def test_pictures_of_another_size_are_not_judged():
    with pytest.raises(UserError, match="not \\[48, 32, 3\\]"):
        judge.look({}, [np.zeros((48, 32, 3), np.uint8)])


def evaluate(*arguments):
    cli.main(["evaluate", *arguments])


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    both = ("emoji_scenes:test", "emoji_scenes:held")
    more = ("--against", "emoji_scenes:validation", "--json", str(tmp_path / "found.json"))
    evaluate(*both, "--count", "8", *more)
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["against"] == "emoji_scenes:validation"
    assert found["versions"]["jax"] == jax.__version__
    test, held = (found["sources"][ref] for ref in both)
    assert "| | asked | emoji_scenes:test | emoji_scenes:held |" in printed
    (one, asked), (other, _) = (each["right"]["all subjects"] for each in (test, held))
    assert asked == 8
    assert f"| all subjects | 8 | {one / 8:.1%} | {other / 8:.1%} |" in printed
    assert f"| CLIP score |  | {test['clip_score']:.2f} | {held['clip_score']:.2f} |" in printed
    assert test["fid"] is None
    value, error = test["kid_in_clip"]
    assert (
        f"| KID x 1000 in CLIP features |  | {1000 * value:.2f} ± {1000 * error:.2f} |" in printed
    )


def counted(**right):
    return report.Report(10, 10, {name.replace("_", " "): n for name, n in right.items()})


def test_a_count_stands_in_a_cell_where_it_is_another():
    columns = {"ours": counted(style=(3, 4)), "real": counted(style=(1, 5), background=(2, 2))}
    assert report.table(columns).splitlines() == [
        "| | asked | ours | real |",
        "|---|---|---|---|",
        "| pictures |  | 10 | 10 |",
        "| style | 4 | 75.0% | 20.0% of 5 |",
        "| background | 0 |  | 100.0% of 2 |",
    ]


def test_kid_in_clip_features_is_near_zero_for_scenes_of_one_kind_and_not_of_two():
    clip = open_clip(EMBEDDED_CLIP)
    test = EmojiScenes("emoji_scenes:test")
    scenes = [test.read(i) for i in range(192)]
    seen = for_kid(embed_images(clip, [scene["image"] for scene in scenes]))
    np.testing.assert_allclose((seen * seen).sum(1) / seen.shape[1], 1, rtol=1e-5)
    distance, error = kid(seen[::2], seen[1::2])
    assert abs(distance) < 3 * error
    line_art = np.array([scene["style"] == "line art" for scene in scenes])
    distance, error = kid(seen[line_art], seen[~line_art])
    assert distance > 5 * error


def test_a_folder_of_samples_is_read_by_its_list(tmp_path):
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(tmp_path / "00000.png")
    how = {"model": "mini", "steps": 20, "guidance": 4.0}
    lines = [{"file_name": "00000.png", "text": "a fox"} | how | {"seed": i} for i in (1, 1, 2, 3)]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert report.made_with(str(tmp_path), 3) == {
        "model": ["mini"], "steps": [20], "guidance": [4.0], "seed": [1, 2],
    }  # fmt: skip
    assert report.made_with("emoji_scenes:test", 3) == {}
    images, captions = report.read_all(report.open_pictures(str(tmp_path)), 1)
    assert captions == ["a fox"]
    found = report.evaluate(report.Judges.read(), images, captions)
    assert found == report.Report(pictures=1, judged=0)  # too large
    assert "1 are not of 64x64" in report.table({"samples": found})


def test_no_more_pictures_are_read_than_fit_in_memory(monkeypatch):
    monkeypatch.setattr(report, "MOST", 3 * 64 * 64 * 3)
    source = EmojiScenes("emoji_scenes:test")
    assert len(report.read_all(source, 3)[0]) == 3
    with pytest.raises(UserError, match="emoji_scenes:test: 3 pictures fill the memory"):
        report.read_all(source, None)


def test_a_picture_that_is_gone_is_named(tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "b"}) + "\n")
    with pytest.raises(UserError, match=r"a\.png"):
        report.read_all(report.open_pictures(str(tmp_path)), None)


BAD = {
    "no folder": (["nowhere"], "nowhere"),
    "too many": (["emoji_scenes:held", "--count", "3001"], "count 3001 is not from 1 to 3000"),
    "nothing": ([], "there is nothing to evaluate"),
    "no name": ([""], "there is nothing to evaluate"),
    "one picture": (
        ["emoji_scenes:test", "--count", "1", "--against", "emoji_scenes:validation"],
        "emoji_scenes:test: a single picture has no FID or KID",
    ),
    "itself": (
        ["emoji_scenes", "--count", "60000", "--against", "emoji_scenes:train"],
        "emoji_scenes would be compared with itself: name other pictures (--against), or at most",
    ),
    "its own folder": (["here", "--against", "./here/"], "here would be compared with itself"),
    "no split": (["emoji_scenes:none"], "its splits are train"),
    "no place": (
        ["emoji_scenes:test", "--json", "none/x.json"],
        "none/x.json is no place for a file",
    ),
    "no clip": (["emoji_scenes:test", "--count", "1", "--clip", "nowhere"], "is no CLIP folder"),
    "no inception": (
        ["emoji_scenes:test", "--count", "2", "--inception", "none.safetensors"],
        "none.safetensors",
    ),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    line = json.dumps({"file_name": "a.png", "text": "b"}) + "\n"
    Path("here/samples.jsonl").write_text(2 * line)
    with pytest.raises(SystemExit) as stop:
        evaluate(*arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
