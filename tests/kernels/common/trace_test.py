"""Traces are summed up by kernel, device by device."""

from pathlib import Path
from types import SimpleNamespace as Fake
from typing import Any

import jax
import pytest

from kernels.common.trace import describe, read_trace


def event(name: str, begin_us: float, length_us: float, **stats: str) -> Any:
    return Fake(name=name, start_ns=begin_us * 1e3, duration_ns=length_us * 1e3, stats=list(stats.items()))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trace of a GPU with two streams, its host and a second GPU."""
    stream = [
        event("fusion_1", 0, 10, tf_op="jit(step)/add"),
        event("fusion_2.remat.3", 10, 20, tf_op="jit(step)/mul"),
        event("attention", 40, 60, hlo_op="custom-call.7"),
    ]
    first = Fake(
        name="/device:GPU:0",
        lines=[
            Fake(name="Stream #1(Compute)", events=stream),
            Fake(name="Stream #2(MemcpyD2D)", events=[event("copy", 50, 10)]),
            Fake(name="Steps", events=[event("step", 0, 1000)]),
        ],
    )
    second = Fake(name="/device:GPU:1", lines=[Fake(name="Stream #1", events=[event("other", 0, 999)])])
    host = Fake(name="/host:CPU", lines=[Fake(name="tf_XLA", events=[event("dot", 0, 1, hlo_op="dot")])])
    data = Fake(planes=[host, second, first])
    monkeypatch.setattr(jax.profiler, "ProfileData", Fake(from_file=lambda path: data))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.xplane.pb").touch()
    return tmp_path


def test_kernels_are_grouped_and_overlaps_counted_once(folder: Path) -> None:
    trace = read_trace(folder)
    assert [(group.name, group.calls) for group in trace.groups] == [
        ("attention", 1),
        ("fusion", 2),
        ("copy", 1),
    ]
    assert [round(group.seconds * 1e6) for group in trace.groups] == [60, 30, 10]
    assert [group.example for group in trace.groups] == ["custom-call.7", "jit(step)/mul", ""]
    assert sum(group.share for group in trace.groups) == pytest.approx(1)
    assert trace.busy_s == pytest.approx(90e-6)
    assert trace.window_s == pytest.approx(100e-6)


def test_the_description_is_per_step_and_says_what_it_leaves_out(folder: Path) -> None:
    lines = describe(read_trace(folder), steps=2, top=1).splitlines()
    assert lines[0].split() == ["busy", "0.05", "ms", "a", "step,", "10.0%", "of", "the", "window", "idle"]
    assert lines[1].split() == ["60.0%", "0.030", "ms", "0.5", "x", "attention", "custom-call.7"]
    assert lines[2].strip() == "40.0% in 2 other groups"


def test_a_folder_without_a_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no profiler trace"):
        read_trace(tmp_path)
