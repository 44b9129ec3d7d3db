"""The tuner keeps the fastest schedule that is right, and its files are read strictly."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kernels.forgetting_attention import pallas_mosaic_gpu, schedules, tuner, xla_chunked
from kernels.forgetting_attention.device_table import Shape
from kernels.forgetting_attention.schedules import DEFAULTS, Schedule, TunedFileError
from kernels.forgetting_attention.tuner import Found

FACTS = {"jax": "0", "commit": "abc", "date": "2026-01-01", "command": "tune", "device": "x", "seed": 0}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where measured schedules are looked for."""
    monkeypatch.setattr(schedules, "TUNED", tmp_path)
    schedules.tuned.cache_clear()
    yield tmp_path
    schedules.tuned.cache_clear()


def fake(kernel: str, head_dim: int, tried: Sequence[Schedule], calls: int) -> dict[Schedule, Found]:
    """More stages are faster; with (192, x) blocks nothing compiles."""
    found = {}
    for schedule in tried:
        if 192 in schedule.tile:
            found[schedule] = Found({}, "does not compile")
        else:
            found[schedule] = Found({"global": 10.0 / schedule.stages, "mix": float(schedule.tile[1])})
    return found


def test_the_fastest_product_wins_and_is_used(folder: Path) -> None:
    rows = tuner.rows(only="forward:64", measure=fake)
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    scores = [row["global ms"] * row["mix ms"] for row in rows]
    assert scores == sorted(scores)
    assert rows[0]["schedule"]["stages"] == 4
    assert rows[0]["schedule"]["tile"] == (128, 64)
    assert rows[0]["refused"] > 0
    assert rows[0]["why"] == "does not compile"
    assert schedules.chosen("cpu", 64)["forward"] == DEFAULTS[64]["forward"]
    path = tuner.save(rows, FACTS)
    assert path == folder / "cpu.json"
    best = Schedule(**rows[0]["schedule"])
    assert schedules.chosen("cpu", 64) == {**DEFAULTS[64], "forward": best}
    assert schedules.chosen("cpu", 128) == DEFAULTS[128]
    assert schedules.chosen("NVIDIA H100", 64) == DEFAULTS[64]
    assert schedules.default_tiles("cpu", 64).forward == (128, 64)
    assert schedules.schedule("forward", 64, (128, 64)) == best


def test_another_kernel_is_added_to_the_file(folder: Path) -> None:
    tuner.save(tuner.rows(only="forward:64", measure=fake), FACTS)
    tuner.save(
        tuner.rows(only="backward_q:128", measure=fake), FACTS | {"commit": "def"}, folder / "new.json"
    )
    document = json.loads((folder / "new.json").read_text())
    assert document["entries"]["64"]["forward"]["commit"] == "abc"
    assert document["entries"]["128"]["backward_q"]["commit"] == document["commit"] == "def"
    assert document["entries"]["64"]["forward"]["runners_up"]


@pytest.mark.parametrize(
    ("only", "count"), [("", 9), ("forward", 3), (":64", 3), ("forward:64,backward_kv:256", 2)]
)
def test_kernels_are_chosen_by_name_and_head_dim(only: str, count: int) -> None:
    assert len(list(tuner._wanted(only))) == count


@pytest.mark.parametrize("only", ["forwards", "forward:65", "64"])
def test_unknown_kernels_are_named(only: str) -> None:
    with pytest.raises(ValueError, match="expected KERNEL:HEAD_DIM"):
        tuner.rows(only=only, measure=fake)


def test_no_candidate_that_runs_is_an_error() -> None:
    def none(kernel: str, head_dim: int, tried: Sequence[Schedule], calls: int) -> dict[Schedule, Found]:
        return {schedule: Found({}, "no") for schedule in tried}

    with pytest.raises(ValueError, match="no candidate runs: no"):
        tuner.rows(only="forward:64", measure=none)


@pytest.mark.parametrize("head_dim", DEFAULTS)
@pytest.mark.parametrize("kernel", tuner.KERNELS)
def test_candidates_fit_and_hold_the_default(kernel: str, head_dim: int) -> None:
    found = tuner.candidates(kernel, head_dim)
    assert found[0] == DEFAULTS[head_dim][kernel]
    assert len(set(found)) == len(found) < 50
    assert all(tuner.budget(kernel, head_dim, schedule) is None for schedule in found[1:])


def test_the_budget_says_what_is_too_large() -> None:
    assert "shared memory" in str(tuner.budget("forward", 256, Schedule((128, 128), 4)))
    assert "registers" in str(tuner.budget("backward_kv", 64, Schedule((256, 128), 1, buffers=1)))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "Expecting"),
        ("[]", "expected an object with entries"),
        ({"entries": {"65": {}}}, "the head dims are 64, 128, 256"),
        ({"entries": {"64": {"sideways": {}}}}, "'sideways' is no kernel"),
        ({"entries": {"64": {"forward": {"schedule": {"stages": 2}}}}}, "lacks tile"),
        ({"entries": {"64": {"forward": {"schedule": {"tile": [1, 2], "stages": 2, "x": 1}}}}}, "other keys"),
        ({"entries": {"64": {"forward": {"schedule": {"tile": [1, 2], "stages": "2"}}}}}, "stages = '2'"),
        ({"entries": {"64": {"forward": {"schedule": {"tile": [1, 2], "stages": True}}}}}, "stages = True"),
        ({"entries": {"64": {"forward": {"schedule": {"tile": [1, 2, 3], "stages": 2}}}}}, "tile = "),
        ({"entries": {"64": {"forward": {"schedule": {"tile": 128, "stages": 2}}}}}, "tile = 128"),
    ],
)
def test_damaged_files_are_refused(folder: Path, document: object, message: str) -> None:
    text = document if isinstance(document, str) else json.dumps(document)
    (folder / "nvidia-h200.json").write_text(text)
    with pytest.raises(TunedFileError, match=message):
        schedules.chosen("NVIDIA H200", 64)


def test_the_files_that_are_packaged_can_be_read() -> None:
    for path in schedules.TUNED.glob("*.json"):
        schedules.read_tuned(path)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", tuner.KERNELS)
def test_candidates_are_built_checked_and_timed_one_by_one(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, wrong = Schedule((64, 64), 7), Schedule((128, 64), 9)

    def used(static) -> Schedule:
        return schedules.chosen("cpu", 64)[kernel]

    def forward(operands, static):
        if used(static) == broken:
            raise NotImplementedError("too many stages")
        out, lse, _ = xla_chunked.forward(operands, static)
        return (out * 2 if used(static) == wrong else out), lse

    def backward(saved, static):
        if used(static) == broken:
            raise NotImplementedError("too many stages")
        grads, _ = xla_chunked.backward(saved, static)
        return jax.tree.map(lambda x: x * 2, grads) if used(static) == wrong else grads

    monkeypatch.setattr(pallas_mosaic_gpu, "forward", forward, raising=False)
    monkeypatch.setattr(pallas_mosaic_gpu, "backward", backward, raising=False)
    good = Schedule((64, 128), 2)
    found = tuner.measure_on_device(kernel, 64, [good, broken, wrong], 1, Shape(1, 256, 2, 64))
    assert found[good].ms.keys() == {"global", "mix"}
    assert found[good].score > 0
    assert found[broken].refused == "NotImplementedError: too many stages"
    assert found[wrong].refused == "wrong result"
    assert jnp.isfinite(found[good].score)
