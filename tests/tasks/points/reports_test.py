"""What a run shows: figures of its log, tables, curves, and when which evaluation is due."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tasks.common.mesh import make_mesh
from tasks.points import train
from tasks.points.controls import LucasKanade
from tasks.points.reports import (
    _csv,
    final_figures,
    lucas_kanade_for,
    make_callbacks,
    make_evaluators,
    plot_training,
    print_summary,
)
from tests.integration.points_runs import film, frozen, write_films
from tests.tasks.points.data.point_clips import write_npz

FIGURES = {
    "average_jaccard": 0.5,
    "delta_avg": 0.625,
    "occlusion_accuracy": 1.0,
    "delta_avg_of_occluded": 0.25,
    "delta_avg_after_occlusion": "nan",  # as the log has it
}


def write_log(workdir: Path) -> None:
    """A run evaluated under way and at its end."""
    workdir.mkdir(exist_ok=True)
    records = [{"kind": "train", "step": step, "loss": 9.0 - step, "delta_avg": 0.1} for step in range(4)]
    early = dict.fromkeys(FIGURES, 0.0)
    for step, name, values in (
        (2, "validation", early),
        (2, "held_out", early),
        (4, "held_out", FIGURES),
        (4, "static", FIGURES | {"delta_avg": 0.125}),
    ):
        records.append({"kind": "eval", "step": step} | {f"{name}/{k}": v for k, v in values.items()})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def shown(workdir: Path) -> str:
    text = io.StringIO()
    print_summary(workdir, Console(file=text, width=100))
    return text.getvalue()


def test_the_last_figures_of_a_run(tmp_path: Path) -> None:
    write_log(tmp_path)
    found = final_figures(tmp_path)
    assert list(found) == ["held_out", "static"]
    assert found["static"]["delta_avg"] == 0.125
    assert np.isnan(found["held_out"].pop("delta_avg_after_occlusion"))
    assert found["held_out"] == {n: v for n, v in FIGURES.items() if n != "delta_avg_after_occlusion"}


def test_the_table_says_in_per_cent_what_there_is(tmp_path: Path) -> None:
    """Trackers that were not run have no line, figures of nothing a dash; files are named if they exist."""
    write_log(tmp_path)
    (tmp_path / "training.png").write_bytes(b"")
    text = shown(tmp_path)
    cells = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in text.split("\n") if "│" in line
    ]
    assert cells == [
        ["model", "50.0", "62.5", "100.0", "25.0", "-"],
        ["points do not move", "50.0", "12.5", "100.0", "25.0", "-"],
    ]
    assert f"  {tmp_path / 'training.png'}\n  {tmp_path / 'metrics.jsonl'}\n" in text
    assert "per_clip" not in text


def test_a_run_without_evaluations_has_no_table(tmp_path: Path) -> None:
    assert final_figures(tmp_path) == {}
    assert shown(tmp_path) == ""


def test_curves(tmp_path: Path) -> None:
    """Nothing is written before there is a loss."""
    path = tmp_path / "training.png"
    assert not plot_training([], path)
    assert not path.exists()
    write_log(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert plot_training(records, path, "a run")
    assert np.asarray(Image.open(path)).std() > 5


def test_rows_of_clips() -> None:
    rows = [{"delta_avg": 1 / 3, "average_jaccard": float("nan")}, {"delta_avg": 1.0, "average_jaccard": 0.5}]
    assert _csv(rows) == "clip,delta_avg,average_jaccard\n0,0.333333,nan\n1,1,0.5\n"


@pytest.mark.parametrize(
    ("size", "radius"), [((32, 32), 3), ((64, 96), 4), ((256, 256), LucasKanade().radius)]
)
def test_lucas_kanade_has_a_window_that_fits_the_frame(size: tuple[int, int], radius: int) -> None:
    predictor = lucas_kanade_for(size)
    assert (predictor.radius, predictor.backward) == (radius, False)


def test_when_which_evaluation_is_due(tmp_path: Path) -> None:
    args = write_films(tmp_path / "clips")
    options = ("--config.train.eval_every=5", "--config.train.eval_at_start=true")
    cfg = frozen(args, *options)
    data, mesh = train.open_data(cfg), make_mesh(cfg.mesh)
    hooks = {hook.name: hook for hook in make_evaluators(cfg, data, mesh, tmp_path)}
    assert list(hooks) == ["validation", "held_out", "static", "lucas_kanade"]
    assert [step for step in range(21) if hooks["validation"].due(step, cfg.train)] == [0, 5, 10, 15, 20]
    assert hooks["validation"].run(None, 20) is None  # all clips are looked at then, once
    assert [step for step in range(1, 21) if hooks["static"].due(step, cfg.train)] == [20]
    assert [hook.name for hook in make_callbacks(cfg, data, mesh, tmp_path)] == ["curves", "pictures"]
    some = frozen(args, "--config.eval.lucas_kanade=false", "--config.eval.pictures=0")
    assert [h.name for h in make_evaluators(some, data, mesh, tmp_path)] == list(hooks)[:3]
    assert [h.name for h in make_callbacks(some, data, mesh, tmp_path)] == ["curves"]


def test_without_held_out_clips_there_are_only_curves(tmp_path: Path) -> None:
    write_npz(tmp_path / "clips" / "0.npz", film(0))
    cfg = frozen(f"data=npz,path={tmp_path / 'clips'}", "--config.data.held_out_fraction=0")
    data, mesh = train.open_data(cfg), make_mesh(cfg.mesh)
    assert make_evaluators(cfg, data, mesh, tmp_path) == ()
    assert [hook.name for hook in make_callbacks(cfg, data, mesh, tmp_path)] == ["curves"]
