"""The benchmark command on sizes that take seconds."""

import json
import types
from pathlib import Path
from typing import Any

import pytest

from kernels.forgetting_attention import benchmark
from launch import bench
from launch.results import read_rows, table
from tasks.common.errors import ConfigError


@pytest.mark.slow
def test_rows_are_written_with_their_circumstances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = benchmark.cpu_rows(length=1024, heads=2, head_dim=16, calls=1)
    monkeypatch.setattr(benchmark, "rows", lambda: small)
    bench.main(["kernels.forgetting_attention", "--commit=abc", f"--output={tmp_path / 'new' / 'x.json'}"])
    rows = read_rows(tmp_path / "new" / "x.json")
    assert [row["case"].split()[0] for row in rows] == ["fast", "mix"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ms"] / row["baseline_ms"], rel=0.2)
        assert 0 < row["visited"] <= 1
        assert {"device", "jax", "commit", "date", "command", "seed"} <= row.keys()
        assert row["commit"] == "abc"
        assert row["command"] == "python -m launch.bench kernels.forgetting_attention"
    assert all(row["visited"] < 0.9 for row in rows)
    assert "fast" in table(rows)
    assert "fast" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == rows


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A benchmark module that remembers what it was asked."""
    asked: dict[str, Any] = {}

    def rows(*, only: str = "", profile: Path | None = None) -> list[dict[str, Any]]:
        if only == "wrong":
            raise ValueError("only='wrong' is no case")
        asked.update(only=only, profile=profile)
        return [{"case": "a", "ms": 1.0}]

    module = types.SimpleNamespace(
        rows=rows, verdict=lambda rows: f"{len(rows)} judged", __name__="a.benchmark"
    )
    monkeypatch.setattr(bench, "benchmark", lambda package, mode: asked.update(mode=mode) or module)
    asked["module"] = module
    return asked


def test_options_reach_the_module_and_its_verdict_is_printed(
    fake: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.main(["tasks.lm", "--accuracy", "--only=125m", f"--profile={tmp_path}"])
    assert (fake["mode"], fake["only"], fake["profile"]) == ("accuracy", "125m", tmp_path)
    assert "1 judged" in capsys.readouterr().out


def test_a_module_may_save_its_rows_itself(fake: dict[str, Any], tmp_path: Path) -> None:
    fake["module"].save = lambda rows, facts, path: path.write_text(facts["command"]) and path
    bench.main(["tasks.lm", "--tune", f"--output={tmp_path / 'x'}"])
    assert (tmp_path / "x").read_text() == "python -m launch.bench tasks.lm --tune"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tasks.lm", "--set=a=1"], "--set is no option of a.benchmark"),
        (["tasks.lm", "--accuracy", "a.mp4"], "--accuracy FILE is no option of a.benchmark"),
        (["tasks.lm", "--checkpoint=a.npz"], "--checkpoint is no option of a.benchmark"),
        (["tasks.lm", "--only=wrong"], "is no case"),
    ],
)
def test_options_the_module_does_not_take_are_named(
    fake: dict[str, Any], argv: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.main(argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["kernels.nothing"], "is not a kernel package"),
        (["models.fox"], "is not a kernel package"),
        (["kernels.common"], r"has no benchmark\.py"),
        (["kernels.common", "--accuracy"], r"has no accuracy\.py"),
        (["kernels.forgetting_attention", "--calls=0"], "must be at least 1"),
        (["kernels.forgetting_attention", "--only=H64"], "there is one shape on a CPU"),
        (["kernels.forgetting_attention", "--accuracy", "--tune"], "not allowed with"),
    ],
)
def test_wrong_arguments_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.main(argv)


def test_a_figure_lies_beside_the_output(fake: dict[str, Any], tmp_path: Path) -> None:
    def rows(*, figure: Path | None = None) -> list[dict[str, Any]]:
        fake["figure"] = figure
        return [{"case": "a"}]

    fake["module"].rows = rows
    bench.main(["tasks.lm", "--agreement", f"--output={tmp_path / 'x.json'}"])
    assert fake["figure"] == tmp_path / "x.png"
    assert read_rows(tmp_path / "x.json")[0]["case"] == "a"
