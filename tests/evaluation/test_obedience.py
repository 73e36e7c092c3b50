"""Measures of obedience on pictures whose figures are known."""

import numpy as np
import pytest

from jaxgen.data.emoji_scenes.scenes import EmojiScenes
from jaxgen.evaluation import judge, obedience
from jaxgen.evaluation.judge import Found, Seen


def line(column, rows=slice(0, 16), side=16):
    drawn = np.zeros((side, side), bool)
    drawn[rows, column] = True
    return drawn


def test_edges_a_pixel_away_agree_and_two_away_do_not():
    assert obedience.edge_f1(line(5), line(5)) == 1
    assert obedience.edge_f1(line(5), line(6)) == 1
    assert obedience.edge_f1(line(5), line(7)) == 0
    assert obedience.edge_f1(line(5), line(7), tolerance=2) == 1


def test_what_is_drawn_too_much_costs_precision_and_what_lacks_recall():
    twice, half = line(2) | line(10), line(10, slice(0, 8))
    assert obedience.edge_f1(twice, line(2)) == pytest.approx(2 * 0.5 * 1 / 1.5)
    # Nine of sixteen pixels are near the half: its own eight, and one that touches its end.
    assert obedience.edge_f1(half, line(10)) == pytest.approx(2 * (9 / 16) / (1 + 9 / 16))
    nothing = np.zeros((16, 16), bool)
    assert obedience.edge_f1(nothing, nothing) == 1
    assert obedience.edge_f1(nothing, line(3)) == obedience.edge_f1(line(3), nothing) == 0


def test_intersection_over_union_is_of_all_pictures_and_the_classes_wanted():
    wanted = [np.array([[0, 0], [1, 1]]), np.array([[0, 0], [0, 2]])]
    assert obedience.mean_iou(wanted, wanted) == 1
    found = [np.array([[0, 1], [1, 1]]), np.array([[0, 0], [0, 7]])]
    # Of 0: 4 of 5. Of 1: 2 of 3. Of 2: none. 7 is asked nowhere.
    assert obedience.mean_iou(found, wanted) == pytest.approx((4 / 5 + 2 / 3 + 0) / 3)


def test_cells_have_the_label_of_most_of_their_pixels():
    fine = np.array([[0, 0, 3, 3], [0, 5, 3, 0], [0, 2, 9, 4], [0, 2, 4, 9]])
    assert obedience.cells(fine).tolist() == [[0, 3], [2, 9]]


def test_what_the_judge_sees_as_labels():
    mask = np.zeros((32, 32), bool)
    mask[:4, :5] = True
    seen = Seen([Found(6, "flat", (0.0, 0.0, 0.1, 0.1), mask)], "blue")
    assert (obedience.labels(seen) == 7).sum() == 20
    assert (obedience.labels(seen) == 0).sum() == 32 * 32 - 20


def test_the_judge_sees_where_subjects_are_in_real_scenes():
    source = EmojiScenes("emoji_scenes:test_even", columns=("segmentation",))
    scenes = [source.read(i) for i in range(64)]
    wanted = [obedience.cells(scene["segmentation"].astype(np.int32)) for scene in scenes]
    seen = judge.look(judge.read(), [scene["image"] for scene in scenes])
    found = [obedience.labels(one) for one in seen]
    assert obedience.mean_iou(found, wanted) > 0.6
    assert obedience.mean_iou(found, [*wanted[1:], wanted[0]]) < 0.1  # by chance
    # Whatever they are called: subjects apart from the background.
    assert obedience.mean_iou([f > 0 for f in found], [w > 0 for w in wanted]) > 0.8
