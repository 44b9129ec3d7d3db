"""Killed at any moment, a run continues with exactly the losses it would have had."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.common.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[3]
STEPS = 30
OPTIONS = (
    f"--config.train.steps={STEPS}",
    "--config.optim.total=240",
    "--config.checkpoint.every=3",
)


def losses(workdir: Path) -> list[str]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["kind"] == "train"]


def start(program: str, workdir: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, program, f"--workdir={workdir}", *OPTIONS, *options]
    with (workdir.parent / "child.log").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)


def finish(program: str, workdir: Path, *options: str) -> None:
    child = start(program, workdir, *options)
    assert child.wait(timeout=300) == 0, (workdir.parent / "child.log").read_text()


def kill_when(child: subprocess.Popen[str], ready: Callable[[], bool]) -> bool:
    """Kills the child once `ready`; False if it ended before."""
    while child.poll() is None:
        if ready():
            child.kill()
            child.wait()
            return True
        time.sleep(0.001)
    return False


def saving(workdir: Path) -> Callable[[], bool]:
    """True while a checkpoint is being written, but not the run's first."""
    folder = workdir / "checkpoints"

    def ready() -> bool:
        try:
            names = [path.name for path in folder.iterdir()]
        except FileNotFoundError:
            return False
        return any("tmp" in name for name in names) and any(name.isdigit() for name in names)

    return ready


def stepping(workdir: Path, more: int, delay: float) -> Callable[[], bool]:
    """True `delay` seconds after the log has grown by `more` lines."""
    path = workdir / "metrics.jsonl"

    def lines() -> int:
        try:
            return path.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    wanted = lines() + more
    reached: list[float] = []

    def ready() -> bool:
        if not reached and lines() >= wanted:
            reached.append(time.monotonic())
        return bool(reached) and time.monotonic() - reached[0] >= delay

    return ready


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(str(Path(__file__).with_name("tiny_run.py")), workdir)
    lines = losses(workdir)
    assert [json.loads(line)["step"] for line in lines] == list(range(STEPS))
    return lines


def disturb(program: str, workdir: Path, kills: int, seed: int) -> int:
    """Runs to the end through `kills` kills, in saves and in steps by turns; how many happened."""
    rng = random.Random(seed)
    happened = 0
    for attempt in range(kills):
        child = start(program, workdir, "--pause=0.05")
        in_step = stepping(workdir, rng.randint(1, 4), rng.random() * 0.1)
        happened += kill_when(child, saving(workdir) if attempt % 2 else in_step)
    finish(program, workdir)
    return happened


@pytest.mark.slow
def test_killed_in_a_step_and_in_a_save(tiny_program: str, undisturbed: list[str], tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    assert disturb(tiny_program, workdir, kills=2, seed=0) == 2
    assert losses(workdir) == undisturbed


@pytest.mark.slow
def test_killed_ten_times(tiny_program: str, undisturbed: list[str], tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    # Few steps fit between kills, so that ten of them fall into one run.
    assert disturb(tiny_program, workdir, kills=10, seed=1) >= 8
    assert losses(workdir) == undisturbed


def test_sigterm_saves_and_exits_with_its_code(
    tiny_program: str, undisturbed: list[str], tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    child = start(tiny_program, workdir, "--pause=0.05")
    ready = stepping(workdir, 4, 0.0)
    while child.poll() is None and not ready():
        time.sleep(0.005)
    child.send_signal(signal.SIGTERM)
    log = tmp_path / "child.log"
    assert child.wait(timeout=120) == 75, log.read_text()
    assert "stopped by SIGTERM after step" in log.read_text()
    assert "Traceback" not in log.read_text()
    done = len(losses(workdir))
    assert 4 <= done < STEPS
    assert losses(workdir) == undisturbed[:done]
    assert load_checkpoint(workdir).step == done
