"""Views to clips, accuracies, per-class table, confusion matrix and its picture, by hand-made examples."""

import csv
import math

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from tasks.video import metrics
from tasks.video.metrics import Judged, ViewScores


def test_views_of_a_clip_are_averaged_as_probabilities_or_logits():
    """One sure view against two doubtful ones: the averages disagree."""
    logits = np.array([[6.0, 0.0], [0.0, 2.5], [0.0, 2.5]])
    results = {}
    for average in ("probabilities", "logits"):
        scores = ViewScores(2, average)
        scores.add(logits[:1], [1], [7])
        scores.add(logits[1:], [1, 1], [7, 7])
        results[average] = scores.judged()
    sure, doubt = 1 / (1 + math.exp(-6)), 1 / (1 + math.exp(-2.5))
    np.testing.assert_allclose(
        results["probabilities"].scores, [[(sure + 2 * (1 - doubt)) / 3, (1 - sure + 2 * doubt) / 3]]
    )
    np.testing.assert_allclose(results["logits"].scores, [[2.0, 5 / 3]])
    assert metrics.summarize(results["probabilities"])["top1"] == 1
    assert metrics.summarize(results["logits"])["top1"] == 0
    assert results["logits"].views.tolist() == [3]


def test_views_in_any_order_and_rows_that_do_not_count():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(24, 4)), np.repeat([3, 0], 12)
    clips = np.repeat([5, 2], 12)
    straight, shuffled = ViewScores(4), ViewScores(4)
    straight.add(logits, labels, clips)
    order = rng.permutation(24)
    for part in np.split(order, 3):
        padded = np.concatenate([logits[part], np.full((1, 4), np.nan)])
        shuffled.add(padded, [*labels[part], -1], [*clips[part], -1], [True] * 8 + [False])
    for a, b in zip(straight.judged(), shuffled.judged(), strict=True):
        np.testing.assert_allclose(a, b)
    assert straight.judged().clips.tolist() == [2, 5]
    assert straight.judged().labels.tolist() == [0, 3]
    assert metrics.summarize(straight.judged())["views"] == 12


def test_bfloat16_logits():
    scores = ViewScores(2)
    scores.add(np.array([[1, 3]], ml_dtypes.bfloat16), [1], [0])
    assert scores.judged().scores.dtype == np.float64
    assert metrics.summarize(scores.judged())["top1"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 3)), [0, 1], [0, 1]), r"logits must have shape \[N, 4\]; got \(2, 3\)"),
        ((np.zeros((2, 4)), [0], [0, 1]), r"labels must have shape \(2,\), one per view; got \(1,\)"),
        ((np.zeros((2, 4)), [0, 1], [0]), r"clips must have shape"),
        ((np.zeros((2, 4)), [0, 4], [0, 1]), "label 4 of clip 1 is not one of 4 classes"),
        ((np.zeros((2, 4)), [0, 1], [9, 9]), "clip 9 has label 1 in one view and 0 in another"),
    ],
)
def test_views_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        ViewScores(4).add(*arguments)


def test_bad_settings(unchecked_types):
    with pytest.raises(ValueError, match="num_classes = 0"):
        ViewScores(0)
    with pytest.raises(ValueError, match="average = 'median': must be 'probabilities' or 'logits'"):
        ViewScores(3, "median")


def judged(scores, labels):
    count = len(labels)
    return Judged(np.arange(count), np.array(labels), np.array(scores, float), np.ones(count, int))


# Seven classes, six clips: true class and its rank 0, 1, 4, 5, 0, never (NaN).
BY_HAND = judged(
    [
        [9, 8, 7, 6, 5, 4, 3],
        [9, 8, 7, 6, 5, 4, 3],
        [9, 8, 7, 6, 5, 4, 3],
        [9, 8, 7, 6, 5, 4, 3],
        [0, 0, 0, 0, 0, 0, 1],
        [math.nan] * 7,
    ],
    [0, 1, 4, 5, 6, 0],
)


def test_ranks_and_summary_by_hand():
    assert metrics.ranks(BY_HAND.scores, BY_HAND.labels).tolist() == [0, 1, 4, 5, 0, 7]
    got = metrics.summarize(BY_HAND)
    assert got == {
        "top1": 2 / 6,
        "top5": 4 / 6,
        "mean_class": pytest.approx((0.5 + 0 + 0 + 0 + 1) / 5),  # classes 2 and 3 do not occur
        "clips": 6,
        "views": 1,
        "not_finite": 1,
    }


def test_equal_scores_rank_by_class():
    assert metrics.ranks(np.zeros((3, 3)), np.arange(3)).tolist() == [0, 1, 2]


def test_fewer_than_five_classes():
    got = metrics.summarize(judged([[0.1, 0.9], [math.nan, 0.0]], [0, 0]))
    assert got["top5"] == 0.5  # a clip without a score is not right even among all classes


def test_no_clips():
    got = metrics.summarize(ViewScores(3).judged())
    assert math.isnan(got["top1"])
    assert got["clips"] == 0
    assert metrics.confusion_matrix(ViewScores(3).judged()).sum() == 0


def test_confusion_matrix_by_hand():
    want = np.zeros((7, 7), int)
    want[[0, 1, 4, 5], 0] = 1
    want[6, 6] = 1
    np.testing.assert_array_equal(metrics.confusion_matrix(BY_HAND), want)


def test_per_class_csv(tmp_path):
    path = tmp_path / "new" / "per_class.csv"
    names = ["push, left", "pull", "ünused", "none", "e", "f", "g"]
    metrics.write_per_class(path, metrics.per_class_table(BY_HAND), names)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["class", "name", "clips", "top1", "top5", "confused_with", "confused"]
    assert rows[1] == ["0", "push, left", "2", "0.5000", "0.5000", "", ""]
    assert rows[2] == ["1", "pull", "1", "0.0000", "1.0000", "push, left", "1"]
    assert rows[3] == ["2", "ünused", "0", "", "", "", ""]
    assert rows[6] == ["5", "f", "1", "0.0000", "0.0000", "push, left", "1"]
    assert len(rows) == 8
    assert [p.name for p in path.parent.iterdir()] == ["per_class.csv"]


def confusion(classes, seed=0):
    rng = np.random.default_rng(seed)
    matrix = rng.poisson(0.3, (classes, classes))
    np.fill_diagonal(matrix, rng.integers(5, 30, classes))
    matrix[classes // 2] = 0  # a class without clips
    return matrix


@pytest.mark.parametrize("classes", [2, 10, pytest.param(48, marks=pytest.mark.slow), 400])
def test_the_picture_shows_the_diagonal(tmp_path, classes):
    path = tmp_path / "confusion.png"
    names = [f"Pretending to put [something] $number {i}$ behind" for i in range(classes)]
    metrics.plot_confusion(path, confusion(classes), names)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[0] >= 580
    dark = (pixels[:, :, 2] - pixels[:, :, 0] > 40) & (pixels[:, :, 0] < 120)
    assert dark.sum() > 0.3 * classes  # blue cells at all
    if classes == 400:
        assert pixels.shape[0] > 1200  # about 3 pixels a cell
    assert [p.name for p in tmp_path.iterdir()] == ["confusion.png"]


def test_one_name_per_class(tmp_path):
    with pytest.raises(ValueError, match="2 names for 3 classes: give one per class"):
        metrics.plot_confusion(tmp_path / "x.png", np.eye(3, dtype=int), ["a", "b"])
    with pytest.raises(ValueError, match="1 names for 7 classes"):
        metrics.write_per_class(tmp_path / "x.csv", metrics.per_class_table(BY_HAND), ["a"])
