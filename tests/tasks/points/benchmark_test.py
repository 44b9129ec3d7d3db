"""The speed benchmark with models that run in milliseconds, and its program for a GPU that is not there."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kernels.common.bench import DeviceTiming, Rates
from kernels.common.dispatch import compiling_for
from models import tapnext
from models.common.params import unflatten_names
from models.tapnext import TAPNextConfig, flops_per_clip
from tasks.common import flops, step
from tasks.common.bench import verdict
from tasks.common.errors import ConfigError
from tasks.points import benchmark, benchmark_cases
from tasks.points.benchmark_cases import CASES, STAND_INS, Case, prepare
from tests.models.tapnext.small_tapnext import QUICK_COMPILE, random_params

TINY = {"recipe": "small", "image": 16}
# One layer; images of 2 x 2 patches.
CLIPS = (
    Case("streaming", "mu", 5, **TINY),
    Case("tracker", "mu", 5, **TINY),
    Case("offline", "mu", 5, 4, **TINY),
    Case("recorded", "mu", 5, 4, **TINY),
)
TRAINING = Case("training", "mu", 5, 4, batch=2, **TINY)
TENSORS = r"\(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\) -> tensor<[\dx]*x(\w+)>"


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (benchmark, benchmark_cases, step):
        monkeypatch.setattr(module, "compiler_options", lambda: QUICK_COMPILE)
    params = random_params(prepare(TRAINING, "").cfg.model)
    monkeypatch.setattr(tapnext, "init_params", lambda config, key: params)


def check(rows: list[dict], frames: list[int]) -> None:
    for row, count in zip(rows, frames, strict=True):
        assert row["frames/s"] == pytest.approx(count / row["ms"] * 1e3, rel=5e-3)
        assert row["floor frames/s"] == pytest.approx(count / row["floor ms"] * 1e3, rel=0.1)
        assert row["floor ms"] > 0
        assert row.keys() == rows[0].keys()
        assert {row[key] for key in ("official", "required", "target", "unit", "met", "MFU")} == {"-"}
    assert verdict(rows) == "required: 0 of 0 hold; target: 0 of 0"


def test_streams_are_timed_on_the_device_and_from_host_to_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = benchmark.rows(calls=1, only="streaming", profile=tmp_path, cases=CLIPS)
    check(rows, [1])
    (row,) = rows
    assert row["case"] == "streaming, mu, 1 x 1 x 16 x 16, 5 points"
    assert row["implementation"] == "attention xla, float32"
    assert row["parameters M"] == round(tapnext.count_params(prepare(CLIPS[0], "").cfg.model) / 1e6, 1)
    assert row["wall ms"] > 0
    assert row["clips/s"] == "-"
    assert row["memory GiB"] >= 0
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert "5 calls in" in capsys.readouterr().out


@pytest.mark.slow
def test_trackers_clips_and_training_steps_are_timed() -> None:
    rows = benchmark.rows(calls=1, settings="runtime.remat=dots", cases=(*CLIPS[1:], TRAINING))
    check(rows, [1, 4, 4, 8])
    assert [row["wall ms"] == "-" for row in rows] == [False, True, False, True]
    assert [row["memory GiB"] == "-" for row in rows] == [True, False, True, False]
    assert [row["clips/s"] == "-" for row in rows] == [True, False, False, False]
    assert rows[3]["case"] == "training, mu, 2 x 4 x 16 x 16, 5 points"
    assert rows[3]["implementation"] == "attention xla, float32, remat dots"
    assert rows[3]["clips/s"] == pytest.approx(2 / rows[3]["ms"] * 1e3, rel=5e-3)


def test_a_training_step_too_large_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "build", lambda lowered: benchmark_built)
    monkeypatch.setattr(benchmark, "program_memory", lambda compiled: 2**40)
    benchmark_built = dataclasses.make_dataclass("Built", ["compiled", "seconds"])(None, 0.0)
    with pytest.raises(ConfigError, match="has not the memory"):
        benchmark.rows(calls=1, cases=(TRAINING,))
    assert "needs 1024.0 GiB, skipped" in capsys.readouterr().out


def judged(case: Case, settings: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a GPU's row of the case is."""
    setup = prepare(case, settings)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return benchmark._Bench(case, setup, 1, Rates(7e14, 4e12), None)._goal() is not None


@pytest.mark.parametrize(
    ("case", "settings", "expected"),
    [
        (CASES[0], "", True),
        (CASES[0], "runtime.residual_dtype=bfloat16", True),
        (CASES[0], "runtime.compute_dtype=float32", False),
        (dataclasses.replace(CASES[0], size="S"), "", False),
        (CASES[3], "", False),
    ],
)
def test_only_the_released_model_in_bfloat16_is_judged(
    case: Case, settings: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judged(case, settings, monkeypatch) == expected


def test_the_floor_is_the_longer_of_arithmetic_and_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "peak_flops", lambda: 1e15)
    case = dataclasses.replace(CLIPS[2], batch=3)
    bench = benchmark._Bench(case, prepare(case, ""), 1, Rates(7e14, 4e12), None)
    timing = DeviceTiming(0.004, 0.004, 0.01, 1, 1)
    one = benchmark._Measured(timing, clips=3, flops=7e11, compile_s=1.0, moved=2 * 10**9, wall=0.005)
    row, more = bench.row(one), bench.row(one._replace(moved=8 * 10**9))
    assert (row["floor ms"], more["floor ms"]) == (1, 2)
    assert (row["floor frames/s"], row["frames/s"], row["clips/s"]) == (12_000, 3000, 750)
    assert (row["MFU"], row["ms"], row["wall ms"], row["spread"]) == (0.175, 4, 5, "1.0 %")


def test_goals_and_the_floors_they_were_set_by() -> None:
    """The floors of the design: 0.8 ms, 1.35 ms and 1,250 frames/s, at 700 TFLOP/s."""
    goals = {case.label(): case.goal for case in CASES if case.goal}
    assert [(g.required, g.target, g.unit) for g in goals.values() if g] == [
        (2.0, 1.4, "ms"),
        (3.2, 2.2, "ms"),
        (650, 900, "frames/s"),
    ]
    released = prepare(CASES[0], "").cfg.model
    assert released == TAPNextConfig()
    floors = [flops_per_clip(released, 1, points) / 700e12 for points in (256, 1024, 256)]
    assert [floors[0] * 1e3, floors[1] * 1e3, 1 / floors[2]] == pytest.approx([0.8, 1.35, 1250], rel=0.02)


def test_the_cases_are_the_trainers_configurations() -> None:
    training = {case.size: prepare(case, "") for case in CASES if case.kind == "training"}
    for case, setup in zip(("S", "B"), (training["S"].cfg, training["B"].cfg), strict=True):
        assert (setup.data.frames, setup.data.tracks, setup.runtime.remat) == (48, 256, "full"), case
        assert setup.runtime.compute_dtype == "bfloat16"
    assert (training["S"].cfg.model.width, training["B"].cfg.model.width) == (384, 768)
    assert prepare(CASES[-3], "train.batch_size=2,runtime.remat=dots").cfg.train.batch_size == 2
    assert {case.kind for case in STAND_INS} == {case.kind for case in CASES}


def lowered_step(points: int = 256, joined: bool = False) -> str:
    """TAPNext-B with two layers, one frame in bfloat16, for Hopper."""
    cfg = prepare(Case("streaming", "B", points), "").cfg
    model = dataclasses.replace(cfg.model, depth=2)
    specs = tapnext.param_specs(model)

    def params() -> object:
        drawn = unflatten_names({name: jnp.zeros(spec.shape) for name, spec in specs.items()})
        return (tapnext.prepare_params if joined else tapnext.cast_params)(drawn, "bfloat16")

    queries = jax.ShapeDtypeStruct((1, points, 3), jnp.float32)
    state = jax.eval_shape(lambda q: tapnext.init_state(model, q, dtype=jnp.bfloat16), queries)
    frame = jax.ShapeDtypeStruct((1, 1, 256, 256, 3), jnp.uint8)
    jitted = benchmark.stream_step(model, cfg.runtime, {})
    with compiling_for("gpu", "9.0", "NVIDIA H100"):
        lowered = jitted.trace(state, jax.eval_shape(params), frame).lower(lowering_platforms=("cuda",))
    return lowered.as_text()


def test_the_streaming_step_lowers_for_cuda_with_its_products_in_bfloat16() -> None:
    program = lowered_step()
    products = Counter(re.findall(rf"dot_general.*: {TENSORS}", program))
    assert products == {
        # Of a layer: x, y and out of the recurrence, three of its MLP; q, k, v, out, the sum of values, two
        # of the MLP. And the patches.
        ("bf16", "bf16", "bf16"): 2 * 13 + 1,
        # The two gates, and the scores.
        ("bf16", "bf16", "f32"): 2 * 3,
        # The heads.
        ("f32", "f32", "f32"): 6,
    }
    # One frame is a closed form: no loop over time.
    assert "while" not in program
    assert "mosaic" not in program
    # All of the memory is donated: frames seen, three arrays of queries, of both layers h and three taps.
    assert program.count("tf.aliasing_output") == 1 + 3 + 2 * (1 + 3)


def test_joined_maps_are_one_product_each() -> None:
    """Of the step for CUDA: what trackers run on a GPU."""
    products = Counter(re.findall(rf"dot_general.*: {TENSORS}", lowered_step(joined=True)))
    assert products == {
        # Of a layer: x with y and out of the recurrence, down of its MLP, out and the sum of values of the
        # attention, two of the MLP. And the patches. Gate and value of the MLP, q with k and v, and the gates
        # of the recurrence are kernels'.
        ("bf16", "bf16", "bf16"): 2 * 7 + 1,
        # The scores.
        ("bf16", "bf16", "f32"): 2 * 1,
        ("f32", "f32", "f32"): 6,
    }
