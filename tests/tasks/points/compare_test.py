"""Evaluations side by side: what their rows say, and what is refused."""

import json
import sys

import numpy as np
import pytest

from launch.results import read_rows
from tasks.common.errors import ConfigError
from tasks.points import compare
from tasks.points import eval as evaluation
from tests.tasks.points.annotated_videos import annotated, write_davis


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The static control, asked for in both ways, on two clips."""
    path = tmp_path_factory.mktemp("evaluations")
    davis = write_davis(path / "x.pkl", [annotated(seed, frames=8) for seed in range(2)])
    found = [path / f"davis-{mode}-static" for mode in ("first", "strided")]
    for folder, mode in zip(found, ("first", "strided"), strict=True):
        words = [
            "--dataset=davis", f"--data_path={davis}", f"--query_mode={mode}", "--predictor=static",
            f"--output={folder}", "--worst=0",
        ]  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["tasks/points/eval.py", *words])  # what is recorded
            evaluation.main(words)
    return found


def test_rows_say_what_the_evaluations_found(folders, tmp_path, capsys):
    results = tmp_path / "rows.json"
    compare.main([*map(str, folders), f"--results={results}", "--commit=abc"])
    rows = read_rows(results)
    assert [row["queries"] for row in rows] == ["first", "strided"]
    assert {row["set"] for row in rows} == {"davis"}
    assert {row["tracker"] for row in rows} == {"points do not move"}
    for row, folder in zip(rows, folders, strict=True):
        means = json.loads((folder / "summary.json").read_text())["means"]
        assert row["AJ"] == round(100 * means["average_jaccard"], 1)
        assert row["delta_avg"] == round(100 * means["average_pts_within_thresh"], 1)
        assert np.isclose(row["OA"], 100 * means["occlusion_accuracy"], atol=0.05)
        assert row["AJ_RD"] == "-" or row["AJ_RD"] == round(100 * means["aj_rd_pooled"], 1)
        assert row["commit"] == "abc"
        assert row["device"].endswith("cpu")
        # No folders of this machine.
        assert row["command"].startswith("python -m tasks.points.eval --dataset=davis --data_path=x.pkl ")
    assert "means over videos, per cent" in capsys.readouterr().out


def test_what_is_no_finished_evaluation(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"nothing holds no finished evaluation"):
        compare.main([str(folders[0]), str(tmp_path / "nothing")])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "summary.json").write_text('{"means": {}}')
    with pytest.raises(ConfigError, match="not the summary of an evaluation"):
        compare.main([str(tmp_path / "other")])
    (tmp_path / "other" / "summary.json").write_text('{"means": ')
    with pytest.raises(ConfigError, match="damaged"):
        compare.main([str(tmp_path / "other")])
