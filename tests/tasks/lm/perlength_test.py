"""The paper's per-position figures, against numbers worked out by hand."""

import csv
import io

import numpy as np
import pytest

from tasks.common.figures import smooth
from tasks.lm.perlength import (
    PositionLosses,
    from_csv,
    perplexity_by_length,
    perplexity_csv,
    report_lengths,
    to_csv,
)


def test_mean_over_documents_by_hand():
    losses = PositionLosses(4)
    losses.add(np.array([[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 9.0]], np.float32))
    losses.add(np.array([[5.0, 6.0, 99.0, 99.0]], np.float32), np.array([[True, True, False, False]]))
    np.testing.assert_array_equal(losses.mean(), [3.0, 4.0, 4.0, 6.5])
    np.testing.assert_array_equal(losses.counts, [3, 3, 2, 2])
    assert losses.documents == 3


def test_masked_values_may_be_anything_and_unreached_positions_are_nan():
    losses = PositionLosses(3)
    losses.add(np.array([[1.0, np.nan, np.inf]], np.float32), np.array([[True, False, False]]))
    np.testing.assert_array_equal(losses.mean(), [1.0, np.nan, np.nan])


def test_sums_are_float64():
    """In float32 a sum of 2^24 would not move when 1 is added."""
    losses = PositionLosses(1)
    losses.add(np.array([[2.0**24]], np.float32))
    for _ in range(3):
        losses.add(np.array([[1.0]], np.float32))
    assert losses.mean()[0] == (2**24 + 3) / 4


def test_smoothing_clips_its_window_at_the_edges():
    values = np.array([1.0, 2.0, 6.0, 10.0, 20.0])
    np.testing.assert_allclose(smooth(values, 3), [1.5, 3.0, 6.0, 12.0, 15.0])
    np.testing.assert_allclose(smooth(values, 5), [3.0, 4.75, 7.8, 9.5, 12.0])
    np.testing.assert_allclose(smooth(values, 1), values)
    np.testing.assert_allclose(smooth(values, 999), np.full(5, 7.8))
    np.testing.assert_allclose(smooth(np.arange(300.0), 101)[50:250], np.arange(50.0, 250.0))
    np.testing.assert_allclose(smooth(np.arange(300.0), 101)[[0, 10, 299]], [25.0, 30.0, 274.0])


def test_smoothing_leaves_out_unknown_values():
    np.testing.assert_array_equal(
        smooth(np.array([2.0, np.nan, 4.0, np.nan, np.nan, np.nan]), 3), [2.0, 3.0, 4.0, 4.0, np.nan, np.nan]
    )


@pytest.mark.parametrize("window", [0, -1, 2, 100])
def test_a_window_without_a_centre_is_refused(window):
    with pytest.raises(ValueError, match="odd number"):
        smooth(np.zeros(5), window)


def test_perplexity_by_length_by_hand():
    mean = np.log(np.array([2.0, 8.0, 4.0, 4.0]))
    found = perplexity_by_length(mean, [4, 2, 1])
    assert found == pytest.approx({4: 4.0, 2: 4.0, 1: 2.0})
    assert np.isnan(perplexity_by_length(np.array([1.0, np.nan]), [2])[2])
    for bad in (0, 5):
        with pytest.raises(ValueError, match="outside the 4 positions"):
            perplexity_by_length(mean, [bad])


def test_lengths_are_the_papers_and_scale_down():
    assert report_lengths(65536) == [65536, 32768, 16384, 8192, 4096, 2048, 1024, 512]
    assert report_lengths(1024) == [1024, 512, 256, 128, 64, 32, 16]
    assert report_lengths(100) == [100, 50, 25]
    assert report_lengths(8) == [8]
    assert report_lengths(1000, shortest=200) == [1000, 500, 250]


def test_csv_holds_exactly_the_figures():
    losses = PositionLosses(3)
    losses.add(np.array([[0.1, 0.2, 0.3]]), np.array([[True, True, False]]))
    rows = list(csv.DictReader(io.StringIO(to_csv(losses, window=3))))
    assert [r["position"] for r in rows] == ["0", "1", "2"]
    assert [r["documents"] for r in rows] == ["1", "1", "0"]
    assert [float(r["loss"]) for r in rows[:2]] == [0.1, 0.2]
    assert rows[2]["loss"] == ""
    np.testing.assert_allclose([float(r["smoothed_loss"]) for r in rows], [0.15, 0.15, 0.2])
    rows = list(csv.DictReader(io.StringIO(perplexity_csv({4: 8.0}))))
    assert rows == [{"length": "4", "perplexity": "8.0", "loss": repr(float(np.log(8.0)))}]


def test_a_table_is_read_as_it_was_written():
    losses = PositionLosses(3)
    losses.add(np.array([[0.1, 1 / 3, 0.3]]), np.array([[True, True, False]]))
    mean, counts = from_csv(to_csv(losses))
    np.testing.assert_array_equal(mean, losses.mean())
    np.testing.assert_array_equal(counts, [1, 1, 0])
    for text in ("", "position,loss\n0,1.0\n"):
        with pytest.raises(ValueError, match="not a table of losses by position"):
            from_csv(text)


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        PositionLosses(0)
    with pytest.raises(ValueError, match="3 positions, expected 4"):
        PositionLosses(4).add(np.zeros((1, 3)))
