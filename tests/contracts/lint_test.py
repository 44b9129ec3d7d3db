"""`make lint` is clean: CI has no other guard for it."""

import pytest


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)],
    ids=["ruff-check", "ruff-format", "mypy"],
)
def test_clean(run_python, command):
    done = run_python("-m", *command, check=False, env={"NO_COLOR": "1", "FORCE_COLOR": None})
    assert done.returncode == 0, done.stdout + done.stderr
