"""The benchmark command on a size that takes seconds."""

import json
from pathlib import Path

import pytest

from kernels.forgetting_attention import benchmark
from launch import bench
from launch.results import read_rows, table
from tasks.common.errors import ConfigError


def test_rows_are_written_with_their_circumstances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = benchmark.rows(length=1024, heads=2, head_dim=16, calls=1)
    monkeypatch.setattr(benchmark, "rows", lambda calls: small)
    bench.main(["kernels.forgetting_attention", f"--output={tmp_path / 'x.json'}"])
    rows = read_rows(tmp_path / "x.json")
    assert [row["case"].split()[0] for row in rows] == ["fast", "mix"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ms"] / row["baseline_ms"], rel=0.2)
        assert 0 < row["visited"] <= 1
        assert {"device", "jax", "commit", "date", "command", "seed"} <= row.keys()
    assert all(row["visited"] < 0.9 for row in rows)
    assert "fast" in table(rows)
    assert "fast" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text()) == rows


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["kernels.nothing"], "is not a kernel package"),
        (["models.fox"], "is not a kernel package"),
        (["kernels.common"], "has no benchmark.py"),
        (["kernels.forgetting_attention", "--calls=0"], "must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.main(argv)
