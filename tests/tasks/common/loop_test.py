"""The loop on a tiny regression: resume, accumulation, hooks, and every way a run ends early."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tasks.common.checkpoint import load_checkpoint, load_params
from tasks.common.data import Batches
from tasks.common.errors import CheckpointError, ConfigError, Diverged, Stopped
from tasks.common.job import Hook, Job
from tasks.common.loop import fit
from tasks.common.writer import read_records


def train_lines(workdir: Path) -> list[str]:
    """The bytes of the records of kind "train"."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["kind"] == "train"]


def same_arrays(left: Any, right: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), left, right))


class StopAt(Exception):
    """Stands for a crash at a chosen moment."""


@pytest.fixture(scope="module")
def undisturbed(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    workdir = tmp_path_factory.mktemp("undisturbed")
    state = fit(Job(**tiny.arguments(workdir, tiny.tiny_config())))
    return workdir, state


@pytest.mark.parametrize("crash", [2, 4, 7])
def test_resume_after_a_crash_is_bitwise_the_same(
    tiny: ModuleType, undisturbed: tuple[Path, Any], tmp_path: Path, crash: int
) -> None:
    def fail(params: Any, step: int) -> None:
        if step == crash:
            raise StopAt

    config = tiny.tiny_config()
    with pytest.raises(StopAt):
        fit(Job(**tiny.arguments(tmp_path, config, callbacks=[Hook("crash", fail, every=1)])))
    state = fit(Job(**tiny.arguments(tmp_path, config)))
    whole, wanted = undisturbed
    assert train_lines(tmp_path) == train_lines(whole)
    assert len(train_lines(whole)) == 12
    assert same_arrays(state, wanted)
    assert same_arrays(load_params(tmp_path), wanted.params)


def test_a_finished_run_says_so_and_is_left_alone(
    tiny: ModuleType, undisturbed: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, wanted = undisturbed
    before = (workdir / "metrics.jsonl").read_bytes()

    def opened() -> Any:
        raise AssertionError("a finished run needs no data")

    state = fit(Job(**tiny.arguments(workdir, tiny.tiny_config(), open_data=opened)))
    assert "finished" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert same_arrays(state, wanted)


def test_a_damaged_newest_checkpoint_costs_steps_but_changes_nothing(
    tiny: ModuleType, undisturbed: tuple[Path, Any], tmp_path: Path
) -> None:
    fit(Job(**tiny.arguments(tmp_path, tiny.tiny_config())))
    shutil.rmtree(tmp_path / "checkpoints" / "12" / "params")
    state = fit(Job(**tiny.arguments(tmp_path, tiny.tiny_config())))
    assert train_lines(tmp_path) == train_lines(undisturbed[0])
    assert same_arrays(state, undisturbed[1])
    assert load_checkpoint(tmp_path).step == 12


def test_resume_with_workers_and_more_steps(
    tiny: ModuleType, undisturbed: tuple[Path, Any], tmp_path: Path
) -> None:
    fit(Job(**tiny.arguments(tmp_path, tiny.tiny_config(**{"train.steps": 5}))))
    fit(Job(**tiny.arguments(tmp_path, tiny.tiny_config(num_workers=1))))
    assert train_lines(tmp_path) == train_lines(undisturbed[0])


def test_rng_and_schedule_follow_the_step(tiny: ModuleType, undisturbed: tuple[Path, Any]) -> None:
    records = [json.loads(line) for line in train_lines(undisturbed[0])]
    assert [r["step"] for r in records] == list(range(12))
    assert [r["rows"] for r in records] == [8 * (n + 1) for n in range(12)]
    assert [r["lr"] for r in records[:3]] == [0.0, 0.025, 0.05]
    assert records[0]["update_norm"] == 0.0
    # The first loss by hand: initial parameters, batch 0, the rng of step 0.
    params = tiny.init_params(jax.random.fold_in(jax.random.key(3), 0x696E6974))
    batches = tiny.arguments("unused", tiny.tiny_config())["open_data"]().batches
    loss, _ = tiny.loss_fn(params, batches[0], jax.random.fold_in(jax.random.key(3), 0))
    np.testing.assert_allclose(records[0]["loss"], float(loss), rtol=1e-6)


@pytest.mark.parametrize("accum", [2, 4])
def test_accumulation_equals_the_whole_batch(
    tiny: ModuleType, undisturbed: tuple[Path, Any], tmp_path: Path, accum: int
) -> None:
    """Micro-batches have unequal weights (masked rows), so an unweighted mean would differ."""

    def quiet_loss(params: Any, batch: Any, rng: Any) -> Any:
        return tiny.loss_fn(params, batch, jax.random.key(0))

    for name, n in (("whole", 1), ("parts", accum)):
        fit(
            Job(**tiny.arguments(tmp_path / name, tiny.tiny_config(**{"train.accum": n}), loss_fn=quiet_loss))
        )
    whole, parts = ([json.loads(line) for line in train_lines(tmp_path / n)] for n in ("whole", "parts"))
    for name in ("loss", "grad_norm", "update_norm", "param_norm", "abs_error"):
        np.testing.assert_allclose(
            [r[name] for r in parts], [r[name] for r in whole], rtol=2e-4, atol=1e-6, err_msg=name
        )


def test_moving_average_is_evaluated_saved_and_resumed(tiny: ModuleType, tmp_path: Path) -> None:
    """Against the recurrence by hand over the saved parameters; the run itself is the one without it."""
    seen: dict[int, Any] = {}

    def look(params: Any, step: int) -> None:
        seen[step] = jax.tree.map(np.asarray, params)
        if step == 4 and not (tmp_path / "resumed").exists():
            (tmp_path / "resumed").mkdir()
            raise StopAt

    changes = {"train.steps": 7, "train.ema": 0.6, "checkpoint.every": 1, "checkpoint.keep": 9}
    frozen = {"layers": {"0": {"kernel": True, "bias": False}}, "head": {"kernel": True}}

    def run(workdir: Path, **changes: Any) -> Any:
        config = tiny.tiny_config(**changes)
        hooks = [Hook("look", look, every=1)]
        return fit(Job(**tiny.arguments(workdir, config, callbacks=hooks, trainable_mask=frozen)))

    with pytest.raises(StopAt):
        run(tmp_path / "run", **changes)
    state = run(tmp_path / "run", **changes)
    found = dict(seen)
    assert same_arrays(state.params, run(tmp_path / "plain", **{**changes, "train.ema": 0.0}).params)
    average = jax.tree.map(np.asarray, tiny.init_params(jax.random.fold_in(jax.random.key(3), 0x696E6974)))
    for step in range(1, 8):
        raw = load_params(tmp_path / "run", step, averaged=False)
        decay = min(0.6, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, raw)
        average["layers"]["0"]["bias"] = raw["layers"]["0"]["bias"]
        for wanted, got in zip(jax.tree.leaves(average), jax.tree.leaves(found[step]), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)
    assert same_arrays(load_params(tmp_path / "run"), state.evaluated)
    assert not same_arrays(load_params(tmp_path / "run"), load_params(tmp_path / "run", averaged=False))
    with pytest.raises(ConfigError, match=r"train\.ema: 0\.6 -> 0\.0"):
        run(tmp_path / "run", **{**changes, "train.ema": 0.0, "train.steps": 9})
    with pytest.raises(ConfigError, match=r"train\.ema = 1\.0: must be 0"):
        run(tmp_path / "bad", **{**changes, "train.ema": 1.0})


def test_runs_of_one_program_compile_once(tiny: ModuleType, tmp_path: Path) -> None:
    """Learning rate and number of steps are in no program; seed and optimiser settings are."""
    traced = []

    def loss_fn(params: Any, batch: Any, rng: Any) -> Any:
        traced.append(rng)
        return tiny.loss_fn(params, batch, rng)

    def run(name: str, program: Any = "tiny", **changes: Any) -> int:
        traced.clear()
        config = tiny.tiny_config(**changes)
        fit(Job(**tiny.arguments(tmp_path / name, config, loss_fn=loss_fn, program=program)))
        return len(traced)

    assert run("first", **{"train.steps": 2}) > 0
    assert run("other-rate", **{"train.steps": 3, "optim.peak_lr": 0.01}) == 0
    assert run("other-decay", **{"train.steps": 2, "optim.weight_decay": 0.0}) > 0
    assert run("other-seed", **{"train.steps": 2, "seed": 4}) > 0
    assert run("other-accumulation", **{"train.steps": 2, "train.accum": 2}) > 0
    assert run("unnamed", program=None, **{"train.steps": 2}) > 0
    rates = {name: read_records(tmp_path / name)[1]["lr"] for name in ("first", "other-rate")}
    assert rates["other-rate"] == rates["first"] / 5


def test_hooks_run_when_due_and_at_the_end(tiny: ModuleType, tmp_path: Path) -> None:
    seen: dict[str, list[int]] = {"valid": [], "late": [], "samples": []}

    def hook(name: str) -> Any:
        def run(params: Any, step: int) -> dict[str, float]:
            seen[name].append(step)
            return {"head": float(jnp.sum(params["head"]["kernel"]))}

        return run

    config = tiny.tiny_config(**{"train.steps": 7, "train.eval_every": 3, "train.eval_at_start": True})
    fit(
        Job(
            **tiny.arguments(
                tmp_path,
                config,
                evaluators=[Hook("valid", hook("valid")), Hook("late", hook("late"), every=0)],
                callbacks=[Hook("samples", hook("samples"), every=2)],
            )
        )
    )
    assert seen == {"valid": [0, 3, 6, 7], "late": [0, 7], "samples": [0, 2, 4, 6, 7]}
    evals = [r for r in read_records(tmp_path) if r["kind"] == "eval"]
    assert [(r["step"], "valid/head" in r) for r in evals] == [
        (0, True),
        (0, False),
        (3, True),
        (6, True),
        (7, True),
        (7, False),
    ]
    assert not any("samples" in name for r in evals for name in r)


def test_fine_tuning_starts_at_the_given_parameters(
    tiny: ModuleType, undisturbed: tuple[Path, Any], tmp_path: Path
) -> None:
    given = load_params(undisturbed[0])
    config = tiny.tiny_config(**{"train.steps": 1})
    state = fit(Job(**tiny.arguments(tmp_path / "a", config, initial_params=lambda: given)))
    assert same_arrays(state.params, given)  # the first step of a warm-up has rate 0
    del given["head"]
    with pytest.raises(ConfigError, match="head/kernel is missing"):
        fit(Job(**tiny.arguments(tmp_path / "b", config, initial_params=lambda: given)))
    given["head"] = {"kernel": np.zeros((5,), np.float32)}
    with pytest.raises(ConfigError, match=r"head/kernel has shape \(5,\), the model has \(16,\)"):
        fit(Job(**tiny.arguments(tmp_path / "c", config, initial_params=lambda: given)))


def test_fine_tuning_leaves_the_given_arrays_alone(tiny: ModuleType, tmp_path: Path) -> None:
    given = tiny.init_params(jax.random.key(1))
    before = jax.tree.map(np.array, given)
    fit(Job(**tiny.arguments(tmp_path, tiny.tiny_config(**{"train.steps": 4}), initial_params=lambda: given)))
    assert same_arrays(given, before)


def test_frozen_parameters_stay_and_have_no_moments(tiny: ModuleType, tmp_path: Path) -> None:
    config = tiny.tiny_config(**{"train.steps": 6})
    mask = {"layers": {"0": {"kernel": False, "bias": True}}, "head": {"kernel": True}}
    given = tiny.init_params(jax.random.key(1))
    state = fit(Job(**tiny.arguments(tmp_path, config, trainable_mask=mask, initial_params=lambda: given)))
    assert np.array_equal(state.params["layers"]["0"]["kernel"], given["layers"]["0"]["kernel"])
    assert not np.array_equal(state.params["head"]["kernel"], given["head"]["kernel"])
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state.opt_state))
    assert shapes == [(), (16,), (16,), (16,), (16,)]  # count; two moments of two trained leaves
    assert same_arrays(load_params(tmp_path), state.params)
    fit(Job(**tiny.arguments(tmp_path, tiny.tiny_config(), trainable_mask=mask)))


def nan_at(tiny: ModuleType, step: int) -> Any:
    """Batches whose batch `step` holds a NaN."""
    whole = tiny.arguments("unused", tiny.tiny_config())["open_data"]().batches

    class Poisoned(type(whole)):  # type: ignore[misc]
        def rows(self, k: int, start: int, stop: int) -> dict[str, np.ndarray]:
            batch = super().rows(k, start, stop)
            if k == step:
                batch["x"] = np.full_like(batch["x"], np.nan)
            return batch

    return Poisoned(whole.source, whole.batch_size, whole.seed)


@pytest.mark.parametrize("step", [3, 6])
def test_nan_stops_the_run_with_its_batch_saved(tiny: ModuleType, tmp_path: Path, step: int) -> None:
    """Step 3 is the last before a checkpoint is due: the bad state must not be saved."""
    with pytest.raises(
        Diverged, match=rf"step {step}: loss, grad_norm.* not finite.*diverged_step{step}.npz"
    ):
        fit(Job(**tiny.arguments(tmp_path, tiny.tiny_config(), batches=nan_at(tiny, step))))
    with np.load(tmp_path / f"diverged_step{step}.npz") as saved:
        assert np.isnan(saved["x"]).all()
        assert saved["x"].shape == (8, 8)
        assert int(saved["_step"]) == step
        assert "not finite" in json.loads(str(saved["_message"]))["reason"]
    if step < 4:
        with pytest.raises(CheckpointError, match="no checkpoint"):
            load_params(tmp_path)
    else:
        found = load_checkpoint(tmp_path)
        assert found.step == 4
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.state))
    assert len(train_lines(tmp_path)) == step


def test_spike_stops_the_run_only_when_asked(tiny: ModuleType, tmp_path: Path) -> None:
    def jumpy(params: Any, batch: Any, rng: Any) -> Any:
        loss, aux = tiny.loss_fn(params, batch, rng)
        return loss * jnp.where(batch["jump"][0], 1e4, 1.0), aux

    class Jump(type(tiny.arguments("unused", tiny.tiny_config())["open_data"]().batches)):  # type: ignore[misc]
        def rows(self, k: int, start: int, stop: int) -> dict[str, np.ndarray]:
            return {**super().rows(k, start, stop), "jump": np.full((stop - start,), k == 9)}

    batches = Jump(tiny.Points(), 8, 3)
    fit(Job(**tiny.arguments(tmp_path / "off", tiny.tiny_config(), batches=batches, loss_fn=jumpy)))
    config = tiny.tiny_config(**{"train.spike_window": 6})
    config.unlock()
    config.train.spike_factor = 50.0
    with pytest.raises(Diverged, match=r"step 9: grad_norm .* over 50 x its running median"):
        fit(Job(**tiny.arguments(tmp_path / "on", config, batches=batches, loss_fn=jumpy)))
    assert load_checkpoint(tmp_path / "on").step == 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(
    tiny: ModuleType, undisturbed: tuple[Path, Any], tmp_path: Path, number: signal.Signals
) -> None:
    def send(params: Any, step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    config = tiny.tiny_config()
    with pytest.raises(Stopped, match=rf"{number.name} after step 6: saved") as stopped:
        fit(Job(**tiny.arguments(tmp_path, config, callbacks=[Hook("kill", send, every=1)])))
    assert stopped.value.exit_code == 75
    assert signal.getsignal(number) is handler
    assert load_checkpoint(tmp_path).step == 7
    fit(Job(**tiny.arguments(tmp_path, config)))
    assert train_lines(tmp_path) == train_lines(undisturbed[0])


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow over 2 KiB here: writes fail inside the kernel, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_clear_error(
    tiny: ModuleType, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = tiny.tiny_config()
    fit(Job(**tiny.arguments(tmp_path, tiny.tiny_config(**{"train.steps": 4}))))
    good = load_params(tmp_path)
    request.getfixturevalue("small_files")
    quiet = tiny.tiny_config(**{"checkpoint.every": 1})
    with pytest.raises(CheckpointError, match=f"workdir {tmp_path}: the disk is full") as error:
        fit(Job(**tiny.arguments(tmp_path, quiet)))
    assert error.value.exit_code == 4
    assert same_arrays(load_params(tmp_path), good)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    )
    fit(Job(**tiny.arguments(tmp_path, config)))
    assert [json.loads(line)["step"] for line in train_lines(tmp_path)] == list(range(12))


def test_another_config_is_refused_key_by_key(
    tiny: ModuleType, undisturbed: tuple[Path, Any], tmp_path: Path
) -> None:
    workdir = undisturbed[0]
    config = tiny.tiny_config(**{"optim.peak_lr": 1.0, "optim.b2": 0.5, "log.every": 3})
    with pytest.raises(ConfigError) as error:
        fit(Job(**tiny.arguments(workdir, config)))
    message = str(error.value)
    assert f"the checkpoint in {workdir} belongs to another config" in message
    assert "optim.peak_lr: 0.05 -> 1.0" in message
    assert "optim.b2: 0.95 -> 0.5" in message
    assert "log.every" not in message
    with pytest.raises(ConfigError, match="seed: 3 -> 4"):
        fit(Job(**tiny.arguments(workdir, tiny.tiny_config(), seed=4)))


def test_another_model_is_refused_array_by_array(tiny: ModuleType, undisturbed: tuple[Path, Any]) -> None:
    def wider(key: Any) -> Any:
        return {**tiny.init_params(key), "head": {"kernel": jnp.zeros((17,))}}

    with pytest.raises(ConfigError, match=r"params/head/kernel: \(16,\) float32 -> \(17,\) float32"):
        fit(Job(**tiny.arguments(undisturbed[0], tiny.tiny_config(), init_params=wider)))


def test_sizes_that_do_not_fit_are_named(tiny: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size = 8 is not divisible by train.accum = 3"):
        tiny.arguments(tmp_path, tiny.tiny_config(**{"train.accum": 3}))
    given = tiny.arguments(tmp_path, tiny.tiny_config(), batches=Batches(tiny.Points(), 4))
    with pytest.raises(ConfigError, match="batch_size = 8, but the data has 4 rows"):
        fit(Job(**given))
    with pytest.raises(TypeError, match="unexpected keyword argument 'work_dir'"):
        fit(Job(**given, work_dir=tmp_path))


def test_a_bad_aux_is_named(tiny: ModuleType, tmp_path: Path) -> None:
    def loss(params: Any, batch: Any, rng: Any) -> Any:
        value, _ = tiny.loss_fn(params, batch, rng)
        return value, {"accuracy": value}

    with pytest.raises(TypeError, match=r"aux\['accuracy'\] .* must be a \(sum, weight\) pair"):
        fit(Job(**tiny.arguments(tmp_path, tiny.tiny_config(), loss_fn=loss)))


def test_profile_traces_the_steps_asked_for(tiny: ModuleType, tmp_path: Path) -> None:
    config = tiny.tiny_config(**{"train.steps": 5, "train.profile_start": 2, "train.profile_steps": 2})
    fit(Job(**tiny.arguments(tmp_path, config)))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
