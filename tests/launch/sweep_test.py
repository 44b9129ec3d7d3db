"""A sweep goes on where it was, chooses by what its runs recorded, and stops in time, everything saved."""

import importlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from launch import sweep
from tasks.common.config import load_config, make_parser, parse_command_line
from tasks.common.errors import CheckpointError, ConfigError, Diverged, Stopped
from tasks.common.writer import read_records
from tasks.lm import train
from tasks.lm.config import SCHEMA, freeze_all
from tests.integration.lm_runs import TINY, write_texts

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """
from configs.common import parse_args

def get_sweep(arg=None):
    args = parse_args(arg, text="", steps=4)
    tiny = {tiny!r}
    config = f"configs/fox.py:size=tiny,ctx=32,batch=2,tokens=256,data=text,path={{args.text}},vocab=259"
    trials = [
        {{"name": f"trial-{{rate}}", "task": "lm", "config": config, "set": {{**tiny, "optim.peak_lr": rate,
          "train.steps": 2, "eval.validation_batches": 1, "eval.batch_size": 2}}}}
        for rate in ("1e-3", "1e-7")
    ]
    last = {{"name": "last", "task": "lm", "config": config, "set": {{**tiny, "train.steps": args.steps}},
             "choose": {{"optim.peak_lr": [t["name"] for t in trials]}}, "by": "validation/loss"}}
    return [*trials, last]
"""


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FOXTROT_CACHE", str(tmp_path / "cache"))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture
def file(tmp_path: Path) -> str:
    options = dict(option.removeprefix("--config.").split("=") for option in TINY)
    (tmp_path / "sweep.py").write_text(SWEEP.format(tiny=options))
    return f"{tmp_path / 'sweep.py'}:text={write_texts(tmp_path / 'texts', 8)}"


def train_lines(folder: Path) -> dict[str, list[dict]]:
    return {p.parent.name: read_records(p.parent) for p in sorted(folder.glob("*/metrics.jsonl"))}


@pytest.mark.slow
def test_a_sweep_trains_everything_once(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trials, then the run with the better one's rate; a second call does nothing, a third a bit more."""
    runs = tmp_path / "runs"
    jax.jit(lambda x: x + 1)(1.0)  # the programs are kept even if this process has compiled before
    sweep.main([file, f"--runs={runs}"])
    found = train_lines(runs)
    assert list(found) == ["last", "trial-1e-3", "trial-1e-7"]
    config = json.loads((runs / "last" / "config.json").read_text())["config"]
    assert config["optim"]["peak_lr"] == 1e-3  # 1e-7 learns nothing
    assert "peak_lr 0.001" in " ".join(capsys.readouterr().out.split())
    sweep.main([file, f"--runs={runs}"])
    assert train_lines(runs) == found
    sweep.main([f"{file},steps=6", f"--runs={runs}", "--only=last"])
    assert [r["step"] for r in train_lines(runs)["last"] if r["kind"] == "train"] == list(range(6))
    assert (runs / ".programs").is_dir()


@pytest.mark.slow  # a run is trained
def test_a_changed_definition_of_a_finished_run_is_refused(file: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    sweep.main([file, f"--runs={runs}", "--only=trial-1e-3"])
    path = Path(file.partition(":")[0])
    path.write_text(path.read_text().replace('"optim.peak_lr": rate', '"optim.peak_lr": 2.0'))
    with pytest.raises(ConfigError, match=r"optim.peak_lr: 0.001 -> 2.0"):
        sweep.main([file, f"--runs={runs}", "--only=trial-1e-3"])


@pytest.mark.slow
def test_a_stopped_run_is_saved_and_the_next_call_goes_on(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an undisturbed run would have ended, to the last bit."""
    file = f"{file},steps=300"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    sweep.main([file, f"--runs={whole}"])
    for trial in whole.glob("trial-*"):
        shutil.copytree(trial, parts / trial.name)
    original = train.main

    def stop_when_it_trains() -> None:
        deadline = time.monotonic() + 120
        while len(read_records(parts / "last")) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def watched(argv: list[str]) -> None:
        if f"--workdir={parts / 'last'}" in argv:
            threading.Thread(target=stop_when_it_trains, daemon=True).start()
        original(argv)

    with monkeypatch.context() as patch:
        patch.setattr(train, "main", watched)
        with pytest.raises(Stopped, match=r"last: stopped by SIGTERM after step .* run the same command"):
            sweep.main([file, f"--runs={parts}", "--minutes=9"])
    stopped_at = len([r for r in read_records(parts / "last") if r["kind"] == "train"])
    assert 3 <= stopped_at < 300
    sweep.main([file, f"--runs={parts}"])
    for name, records in train_lines(whole).items():
        steps = [r for r in records if r["kind"] == "train"]
        assert [r for r in read_records(parts / name) if r["kind"] == "train"] == steps


def fake_task(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """`tasks.lm.train.main` replaced: `run(workdir)`."""

    def main(argv: list[str]) -> None:
        run(Path(next(a for a in argv if a.startswith("--workdir=")).partition("=")[2]))

    monkeypatch.setattr(
        sweep.importlib, "import_module", lambda name: SimpleNamespace(main=main, SCHEMA=SCHEMA)
    )


def finish(workdir: Path, argv: list[str] | None = None, steps: int = 2, **metrics: float) -> None:
    config = parse_command_line(make_parser(""), argv, schema=SCHEMA).config.to_dict() if argv else {}
    config = config or {
        "train": {"steps": steps},
        "optim": {"peak_lr": float(workdir.name.split("-", 1)[-1])},
    }
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps({"config": config}))
    records = [{"kind": "eval", "step": steps, **metrics}, {"kind": "finished", "step": steps}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_a_diverged_trial_is_never_best_and_not_tried_again(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def run(workdir: Path) -> None:
        tried.append(workdir.name)
        if workdir.name == "trial-1e-3":
            workdir.mkdir(parents=True)
            np.savez(workdir / "diverged_step1.npz")
            raise Diverged("step 1: loss not finite")
        raise CheckpointError("the disk is full")

    fake_task(monkeypatch, run)
    with pytest.raises(CheckpointError, match="trial-1e-7: the disk is full"):
        sweep.main([file, f"--runs={tmp_path}"])
    with pytest.raises(CheckpointError, match="trial-1e-7"):
        sweep.main([file, f"--runs={tmp_path}"])
    assert tried == ["trial-1e-3", "trial-1e-7", "trial-1e-7"]
    runs = sweep.Sweep(sweep.read_sweep(file), tmp_path)
    with pytest.raises(ConfigError, match=r"chooses optim.peak_lr from runs that have not ended: trial-1e-7"):
        runs.arguments(runs.runs["last"])
    finish(tmp_path / "trial-1e-7", **{"validation/loss": 5.0})
    assert "--config.optim.peak_lr=1e-07" in runs.arguments(runs.runs["last"])
    finish(tmp_path / "trial-1e-7")
    with pytest.raises(ConfigError, match="none of trial-1e-3, trial-1e-7 has a validation/loss"):
        runs.arguments(runs.runs["last"])


def test_a_signal_between_runs_stops_the_sweep(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_task(monkeypatch, lambda workdir: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="stopped by SIGINT; run the same command to go on"):
        sweep.main([file, f"--runs={tmp_path}"])
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_comes_while_nobody_listens_comes_again() -> None:
    with sweep.deadline(0.0) as clock:
        heard = []
        time.sleep(0.3)
        signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
        time.sleep(2.5)
    assert clock.reason == "the time limit"
    assert len(heard) >= 1


def test_listing_trains_nothing(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep.main([file, f"--runs={tmp_path / 'runs'}", "--list"])
    assert "trial-1e-7" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([{"name": "a", "task": "lm"}], "a run has name, task, config"),
        ([{"name": "a", "task": "lm", "config": "x", "sets": {}}], "a run has name, task, config"),
        ([{"name": "a", "task": "lm", "config": "x"}] * 2, "run 'a' is there twice"),
        (
            [{"name": "a", "task": "lm", "config": "x", "choose": {"k": ["b"]}, "by": "m"}],
            "do not come before it: b",
        ),
    ],
)
def test_sweeps_that_cannot_work_are_refused(tmp_path: Path, runs: list, message: str) -> None:
    (tmp_path / "bad.py").write_text(f"def get_sweep(arg=None):\n    return {runs!r}\n")
    with pytest.raises(ConfigError, match=message):
        sweep.main([str(tmp_path / "bad.py"), f"--runs={tmp_path}"])


def test_wrong_options_are_named(file: str, tmp_path: Path) -> None:
    for options, message in (
        ([f"--runs={tmp_path}", "--minutes=0"], "must be positive"),
        ([f"--runs={tmp_path}", "--only=nothing*"], "there is no such run; there are trial-1e-3"),
        ([], "--runs"),
    ):
        with pytest.raises(ConfigError, match=message):
            sweep.main([file, *options])
    with pytest.raises(ConfigError, match="defines no get_sweep"):
        sweep.main(["configs/fox.py", f"--runs={tmp_path}"])


SWEEPS = [p for p in sorted((ROOT / "configs").glob("*.py")) if "\ndef get_sweep(" in p.read_text()]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_every_sweep_in_configs_is_made_of_runs_that_freeze(path: Path) -> None:
    runs = sweep.read_sweep(f"configs/{path.name}")
    assert runs
    for run in runs:
        task = importlib.import_module(f"tasks.{run['task']}.config")
        argv = [f"--config={run['config']}", *(f"--config.{k}={v}" for k, v in run.get("set", {}).items())]
        config = parse_command_line(make_parser(""), argv, schema=task.SCHEMA).config
        task.freeze_all(config)
        assert load_config(run["config"]) is not None
        for key in run.get("choose", {}):
            section, name = key.split(".")
            assert name in config[section]


def test_the_comparison_gives_every_architecture_the_same() -> None:
    """One size and recipe, equal trials, two seeds for the Pro models, one run without pruning."""
    runs = {run["name"]: run for run in sweep.read_sweep("configs/fox_comparison.py")}
    trials = [name for name in runs if name.startswith("trial-")]
    assert len(trials) == 12
    assert len(runs) == 19
    frozen = {}
    for name, run in runs.items():
        argv = [f"--config={run['config']}", *(f"--config.{k}={v}" for k, v in run["set"].items())]
        frozen[name] = freeze_all(parse_command_line(make_parser(""), argv, schema=SCHEMA).config)
    full = {name: cfg for name, cfg in frozen.items() if name not in trials}
    assert {(cfg.train, cfg.data, cfg.eval, cfg.optim) for cfg in full.values()} == {
        (cfg.train, cfg.data, cfg.eval, cfg.optim) for cfg in [full["fox_pro-0"]]
    }
    cfg = full["fox_pro-0"]
    assert (cfg.train.seq_len, cfg.eval.length, cfg.train.steps * cfg.train.batch_size) == (8192, 32768, 8192)
    assert (cfg.runtime.compute_dtype, cfg.runtime.scan_layers) == ("bfloat16", False)
    assert sorted(cfg.seed for cfg in full.values()) == [0, 0, 0, 0, 0, 1, 1]
    assert full["fox_pro-0-exact"].runtime.log_pruning_tolerance is None
    assert full["fox_pro-0-exact"].model == cfg.model
    assert {frozen[t].optim.peak_lr for t in trials} == {1e-3, 2e-3, 5e-3}
    assert {frozen[t].train.steps for t in trials} == {160}
