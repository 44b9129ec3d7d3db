"""Finished runs side by side: figures and rows out of their logs."""

import json
from pathlib import Path

import pytest

from configs import trecvit
from tasks.common.config import to_json, with_defaults
from tasks.common.errors import ConfigError
from tasks.common.resolved import save_resolved
from tasks.video import compare
from tasks.video.config import SCHEMA


def write_run(workdir: Path, arg: str = "", *, finished: bool = True, **figures: float) -> Path:
    """A workdir as training leaves it, weights aside."""
    config = to_json(with_defaults(trecvit.get_config(arg), SCHEMA))
    workdir.mkdir()
    save_resolved(workdir, config, command=["/x/tasks/video/train.py", "--config=configs/trecvit.py"])
    steps = config["train"]["steps"]
    records = [
        {"kind": "train", "step": 0, "loss": 2.3, "top1": 0.1},
        {"kind": "speed", "step": 19, "clips_per_second": 90.0, "seconds_per_step": 0.4},
        {"kind": "speed", "step": 39, "clips_per_second": 110.0, "seconds_per_step": 0.3},
        {"kind": "eval", "step": 100, "validation/top1": 0.4},
        {"kind": "eval", "step": steps, **{f"held_out/{name}": value for name, value in figures.items()}},
    ]
    records += [{"kind": "finished", "step": steps}] if finished else []
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return workdir


CLASSES = {"top1": 0.955, "top5": 1.0, "mean_class": 0.955, "count/clips": 400.0, "count/views": 12.0}


def test_rows_say_what_the_runs_ended_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        write_run(tmp_path / "full", **CLASSES),
        write_run(tmp_path / "mae", "objective=mae,seed=2", loss=0.91234),
    ]
    results = tmp_path / "rows" / "r.json"
    compare.main([*map(str, runs), f"--output={tmp_path}/out", f"--results={results}", "--commit=abc"])
    full, mae = json.loads(results.read_text())
    assert (full["run"], full["seed"], full["steps"], full["batch"]) == ("full", 0, 1000, 32)
    assert (full["top-1 %"], full["top-5 %"], full["held out"], full["views"]) == (95.5, 100.0, 400, 12)
    assert full["clips/s"] == 100
    assert full["minutes of steps"] == pytest.approx(1000 * 32 / 100 / 60, abs=0.05)
    assert (full["command"], full["commit"]) == (
        "python -m tasks.video.train --config=configs/trecvit.py",
        "abc",
    )
    assert (mae["loss"], mae["top-1 %"], mae["seed"]) == (0.9123, "-", 2)
    printed = capsys.readouterr().out
    assert "95.5" in printed
    assert (tmp_path / "out" / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", **CLASSES)
    with pytest.raises(ConfigError, match="not the workdir of a finished run"):
        compare.main([str(write_run(tmp_path / "half", finished=False, **CLASSES))])
    with pytest.raises(ConfigError, match="2 different names are needed"):
        compare.main([str(run), str(run)])
    with pytest.raises(ConfigError, match="1 different names are needed"):
        compare.main([str(run), "--names=a,b"])
