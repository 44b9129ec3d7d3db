"""A language-model run killed at random moments ends with the loss log it would have had, to the last bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.common.writer import FILE_NAME
from tests.conftest import ROOT
from tests.integration.lm_runs import TINY, write_texts

RUN = ("-m", "tasks.lm.train", *TINY, "--config.model.num_layers=2", "--config.checkpoint.every=3")


def _command(texts: Path, workdir: Path, steps: int, *options: str) -> list[str]:
    config = f"--config=configs/fox.py:size=tiny,ctx=64,batch=4,tokens=100k,data=text,path={texts},vocab=259"
    return [sys.executable, *RUN, config, f"--workdir={workdir}", f"--config.train.steps={steps}", *options]


def _environment(cache: Path) -> dict[str, str]:
    # Every start compiles the same program; the cache makes ten kills affordable, and is itself under test.
    return {
        **os.environ,
        "FOXTROT_CACHE": str(cache / "text"),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


def _finish(command: list[str], environment: dict[str, str]) -> None:
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)


def _progress(workdir: Path) -> int:
    log = workdir / FILE_NAME
    return log.read_bytes().count(b'"train"') if log.exists() else 0


def _kill_after(
    command: list[str], environment: dict[str, str], workdir: Path, steps: int, wait: float
) -> bool:
    """Runs until `steps` more steps are logged, waits, then SIGKILLs; False if it finished first."""
    target = _progress(workdir) + steps
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while child.poll() is None and _progress(workdir) < target:
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.01)
    time.sleep(wait)
    if child.poll() is not None:
        assert child.returncode == 0
        return False
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return True


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    """SIGKILL during steps and saves, with other data workers and scanned layers in between."""
    steps = 200
    texts, environment = write_texts(tmp_path / "texts"), _environment(tmp_path / "cache")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    _finish(_command(texts, undisturbed, steps), environment)

    dice = random.Random(0)
    variants = [
        (),
        ("--config.runtime.scan_layers=true",),
        ("--config.train.num_workers=1",),
        ("--config.train.num_workers=2", "--config.runtime.scan_layers=true"),
    ]
    kills = 0
    for attempt in range(10):
        command = _command(texts, killed, steps, *variants[attempt % len(variants)])
        kills += _kill_after(command, environment, killed, dice.randint(1, 6), dice.uniform(0, 0.4))
    assert kills == 10, "the run finished before its ten kills: train longer"
    _finish(_command(texts, killed, steps), environment)

    lines = [
        [line for line in (folder / FILE_NAME).read_text().splitlines() if '"train"' in line]
        for folder in (undisturbed, killed)
    ]
    assert len(lines[0]) == steps
    assert lines[1] == lines[0]
