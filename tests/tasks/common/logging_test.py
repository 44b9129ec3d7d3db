"""metrics.jsonl, TensorBoard, the progress line, means and MFU."""

import io
import json
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tasks.common import flops, writer
from tasks.common.errors import ConfigError
from tasks.common.metrics import Means, add_sums, divide_sums
from tasks.common.progress import Progress, StopWatch, clock, memory_in_use, short
from tasks.common.writer import LogConfig, Writer, read_records, truncate_records


def test_records_keep_every_bit_of_a_float32(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=50).astype(np.float32) * np.float32(1e-20)
    with Writer(tmp_path, LogConfig()) as log:
        for step, value in enumerate(values):
            log.write("train", step, {"loss": value, "count": 3, "note": "x"})
    records = read_records(tmp_path)
    assert [np.float32(r["loss"]) for r in records] == list(values)
    assert records[0] | {"loss": 0} == {"kind": "train", "step": 0, "loss": 0, "count": 3, "note": "x"}
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with Writer(tmp_path, LogConfig()) as log:
        log.write("train", 0, {"a": np.float32("nan"), "b": float("-inf"), "c": None})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))["a"] == "nan"
    assert read_records(tmp_path)[0]["b"] == "-inf"


def test_truncation_keeps_earlier_steps_and_drops_a_cut_line(tmp_path: Path) -> None:
    assert truncate_records(tmp_path, 3) == []
    with Writer(tmp_path, LogConfig()) as log:
        for step in range(6):
            log.write("train", step, {"loss": step / 3})
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, '{"kind": "train", "step": 1, "lo']))
    assert [r["step"] for r in read_records(tmp_path)] == list(range(6))
    kept = truncate_records(tmp_path, 4)
    assert [r["step"] for r in kept] == [0, 1, 2, 3]
    assert path.read_text().splitlines() == lines[:4]
    with Writer(tmp_path, LogConfig(), first_step=4) as log:
        log.write("train", 4, {"loss": 4 / 3})
    assert path.read_text().splitlines() == lines[:5]


def test_wandb_is_optional_and_named_when_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"log.wandb=true needs the wandb package"):
        Writer(tmp_path, LogConfig(wandb=True))


def test_wandb_gets_what_tensorboard_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []
    run = SimpleNamespace(
        log=lambda values, step: sent.append((step, values)), finish=lambda: sent.append("end")
    )
    fake = SimpleNamespace(init=lambda **options: sent.append(options["project"]) or run)
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    with Writer(tmp_path, LogConfig(wandb=True)) as log:
        log.write("train", 1, {"loss": 0.5, "note": "x"})
        log.write("train", 2, {"loss": 0.5}, boards=False)
    assert sent == ["foxtrot", (1, {"train/loss": 0.5}), "end"]


def test_progress_prints_plain_lines_without_a_terminal() -> None:
    out = io.StringIO()
    with Progress(100, "tokens", console=Console(file=out, width=200)) as progress:
        progress.update(40, 1.23456, 123_456.0, 2.0, 0.345)
        progress.update(41, 1.2, 999.0, 61.0, None)
        progress.say("saved [x]")
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step 40/100  loss 1.2346  123k tokens/s  MFU 34.5%  left 2:00  ")
    assert "MFU" not in lines[1]
    assert "left 59:59" in lines[1]
    assert lines[2] == "saved [x]"


def test_progress_is_one_live_line_on_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True)
    with Progress(10, "clips", console=console) as progress:
        progress.update(5, 1.0, 10.0, 1.0, None)
        progress.update(10, 0.5, 10.0, 1.0, None)
    assert "step 10/10" in out.getvalue()
    assert "━" * 24 in out.getvalue()


def test_progress_can_be_switched_off() -> None:
    out = io.StringIO()
    with Progress(10, "clips", enabled=False, console=Console(file=out)) as progress:
        progress.update(5, 1.0, 10.0, 1.0, None)
        progress.say("x")
    assert out.getvalue() == ""


def test_numbers_for_people() -> None:
    assert [short(x) for x in (0.5, 999.0, 1234.0, 2.5e6, 3e9)] == ["0.5", "999", "1.23k", "2.5M", "3G"]
    assert [clock(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
    assert memory_in_use() > 10 * 2**20


def test_the_watch_leaves_pauses_out() -> None:
    watch = StopWatch()
    with watch.paused():
        time.sleep(0.2)
    time.sleep(0.02)
    assert 0.02 <= watch.lap() < 0.15
    assert watch.lap() < 0.1


def test_means() -> None:
    total = add_sums({"a": (1.0, 2.0), "b": (jnp.float32(3), 0.0)}, {"a": (2.0, 4.0), "b": (0.0, 0.0)})
    means = divide_sums(total)
    assert float(means["a"]) == 0.5
    assert np.isnan(means["b"])
    with pytest.raises(ValueError, match=r"\['a'\] and \['b'\]"):
        add_sums({"a": (0, 0)}, {"b": (0, 0)})
    running = Means()
    running.add({"a": (1.0, 2.0)})
    running.add({"a": (jnp.float32(2), np.float32(4)), "late": (1, 0)})
    assert running.compute()["a"] == 0.5
    assert np.isnan(running.compute()["late"])


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 2080", None),
    ],
)
def test_peak_rates(kind: str, peak: float | None) -> None:
    assert flops.peak_flops(SimpleNamespace(device_kind=kind)) == peak


def test_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flops.utilisation(1e3, 1e9, 1) is None  # on a CPU
    monkeypatch.setattr(flops, "peak_flops", lambda: 1e12)
    assert flops.utilisation(1e3, 1e9, 4) == 0.25
    assert flops.utilisation(1e3, None, 4) is None


def test_log_config_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"log.every = 0"):
        LogConfig(every=0)
    assert writer.FILE_NAME == "metrics.jsonl"
