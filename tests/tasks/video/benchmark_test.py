"""The speed benchmark with a model that runs in milliseconds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from models import trecvit
from models.trecvit import flops_per_clip
from tasks.common import step
from tasks.common.errors import ConfigError
from tasks.video import benchmark
from tasks.video.benchmark import GOALS, RELEASED, Goal, Size
from tests.models.trecvit.small_trecvit import QUICK_COMPILE, random_params, small

pytestmark = pytest.mark.slow
TINY = Size("tiny", small(), batch=2, frames=4)


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled() -> Iterator[None]:
    params = random_params(TINY.model)
    with pytest.MonkeyPatch.context() as patch:
        for module in (benchmark, step):
            patch.setattr(module, "compiler_options", lambda: QUICK_COMPILE)
        patch.setattr(trecvit, "init_params", lambda config, key: params)
        yield


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return benchmark.rows(calls=1, settings="runtime.remat=dots", size=TINY)


def test_whole_clips_streams_and_training_steps_are_timed(rows: list[dict]) -> None:
    cases = ["forward, tiny, 2 x 4 x 8 x 12", "streaming, tiny, 1 x 1 x 8 x 12"]
    assert [row["case"] for row in rows] == [*cases, "training, remat dots, tiny, 2 x 4 x 8 x 12"]
    assert [row["parameters"] for row in rows] == ["bfloat16, prepared", "bfloat16, prepared", "float32"]
    for row, frames in zip(rows, (8, 1, 8), strict=True):
        assert row["frames/s"] == pytest.approx(frames / row["ms"] * 1e3, rel=5e-3)
        assert row["floor frames/s"] == pytest.approx(frames / row["floor ms"] * 1e3, rel=0.1)
        assert row["memory GiB"] >= 0
        assert row.keys() == rows[0].keys()
    assert [row["wall ms"] == "-" for row in rows] == [True, False, True]
    assert [row["clips/s"] == "-" for row in rows] == [False, True, False]


def test_only_the_released_model_on_a_gpu_is_judged(rows: list[dict]) -> None:
    assert {row[key] for row in rows for key in ("official", "required", "target", "unit", "met")} == {"-"}
    assert benchmark.verdict(rows) == "required: 0 of 0 hold; target: 0 of 0"
    judged = [rows[0] | {"met": "target"}, rows[1] | {"met": "no"}, rows[2]]
    assert benchmark.verdict(judged).startswith("required: 1 of 2 hold; target: 1 of 2\n  not met: streaming")


def test_more_frames_and_fewer_milliseconds_are_better() -> None:
    assert [GOALS["forward"].met(x) for x in (4999, 5000, 8000)] == ["no", "required", "target"]
    assert [GOALS["streaming"].met(x) for x in (1.6, 1.5, 0.8)] == ["no", "required", "target"]
    assert Goal("ms", "-", 2.0, 1.0).met(1.5) == "required"


def test_a_case_is_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = benchmark.rows(calls=1, only="streaming", settings="", profile=tmp_path, size=TINY)
    assert row["implementation"] == "attention xla, bfloat16"
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert "5 calls in" in capsys.readouterr().out


def test_the_released_model() -> None:
    assert RELEASED.video == (8, 32, 224, 224, 3)
    assert flops_per_clip(RELEASED.model, 32) == pytest.approx(1.72e12, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "backward"}, "part of no case; there are forward; streaming; training, remat none"),
        ({"settings": "runtime.remat"}, "expected KEY=VALUE"),
        ({"settings": "runtime.scan_layer=true"}, "did you mean 'runtime.scan_layers'"),
        ({"settings": "runtime.remat=most"}, "remat"),
        ({"size": RELEASED}, "on a GPU"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark.rows(**{"size": TINY, "settings": "", **options})
