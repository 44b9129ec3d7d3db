"""Which tests run, and which skips CI accepts: our conftest tried on a small suite in a child process."""

import shutil
from pathlib import Path

import pytest

CONTRACTS = Path(__file__).resolve().parent
SUITE = """
import os

import pytest

import jax


def test_runs_on_the_cpu():
    assert jax.default_backend() == "cpu"


@pytest.mark.slow
def test_slow():
    pass


@pytest.mark.timing
def test_timing():
    pass


@pytest.mark.gpu
def test_gpu():
    raise AssertionError("selected without a GPU")


@pytest.mark.golden("op_*.npz")
def test_golden(golden_file, golden_dir):
    assert golden_file.parent == golden_dir
"""
SKIPPING = """
import pytest


def test_skipped():
    pytest.skip("the moon is full")


@pytest.mark.xfail(reason="known trouble")
def test_known_trouble():
    raise ValueError


def test_passes():
    pass
"""


@pytest.fixture
def suite(tmp_path: Path, run_python):
    """suite(source, *options, allowed="", ci=True): pytest on that one file, under a copy of our conftest."""

    def run(source: str, *options: str, allowed: str = "", ci: bool = True):
        tests = tmp_path / "tests"
        (tests / "golden" / "fox").mkdir(parents=True, exist_ok=True)
        shutil.copy(CONTRACTS.parent / "conftest.py", tests)
        (tests / "allowed_skips.txt").write_text(allowed)
        (tests / "sample_test.py").write_text(source)
        settings = f"--config-file={CONTRACTS.parents[1] / 'pyproject.toml'}"
        command = ["-m", "pytest", settings, f"--rootdir={tmp_path}", "-p", "no:cacheprovider", *options]
        environment = {"CI": "true" if ci else None, "PYTEST_ADDOPTS": None}
        return run_python(*command, str(tests), cwd=tmp_path, env=environment, check=False)

    return run


def golden_folder(root: Path, *names: str) -> Path:
    root.mkdir(parents=True)
    for name in names:
        (root / name).write_bytes(b"")
    return root


def test_slow_and_device_tests_are_deselected(suite, tmp_path):
    folder = golden_folder(tmp_path / "g", "op_a.npz", "op_b.npz", "acp_c.npz")
    done = suite(SUITE, f"--golden-dir={folder}")
    assert done.returncode == 0, done.stdout
    assert "3 passed, 3 deselected" in done.stdout


def test_slow_tests_run_when_asked_for(suite, tmp_path):
    folder = golden_folder(tmp_path / "g" / "fox", "op_a.npz").parent  # one folder per room works too
    done = suite(SUITE, "--slow", f"--golden-dir={folder}")
    assert done.returncode == 0, done.stdout
    assert "4 passed, 1 deselected" in done.stdout


def test_missing_golden_folder_is_named(suite, tmp_path):
    done = suite(SUITE, f"--golden-dir={tmp_path / 'nowhere'}")
    assert done.returncode != 0
    assert "nowhere: no such folder" in done.stderr


def test_golden_files_of_our_own_may_not_be_missing(suite):
    done = suite(SUITE, allowed=(CONTRACTS.parent / "allowed_skips.txt").read_text())
    assert done.returncode == 1, done.stdout
    assert "no op_*.npz in tests/golden" in done.stdout


def test_a_given_golden_folder_may_hold_a_part(suite, tmp_path):
    folder = golden_folder(tmp_path / "g", "acp_c.npz")
    allowed = (CONTRACTS.parent / "allowed_skips.txt").read_text()
    done = suite(SUITE, f"--golden-dir={folder}", allowed=allowed)
    assert done.returncode == 0, done.stdout
    assert "no op_*.npz in the folder of --golden-dir" in done.stdout


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["serial", "xdist"])
def test_ci_refuses_unlisted_skips(suite, workers):
    done = suite(SKIPPING, *workers)
    assert done.returncode == 1, done.stdout
    assert "sample_test.py::test_skipped | the moon is full" in done.stdout
    assert "sample_test.py::test_known_trouble | known trouble" in done.stdout


def test_ci_accepts_listed_skips(suite):
    allowed = "# why\n*::test_skipped | the moon *\n*::test_known_trouble | known trouble\n"
    done = suite(SKIPPING, allowed=allowed)
    assert done.returncode == 0, done.stdout
    assert "the moon is full" in done.stdout  # accepted, yet it still prints why


def test_skip_for_another_reason_than_the_listed_one_is_refused(suite):
    done = suite(SKIPPING, allowed="*::test_skipped | rain\n*::test_known_trouble | *\n")
    assert done.returncode == 1, done.stdout
    assert "test_known_trouble |" not in done.stdout


def test_outside_ci_a_skip_only_prints_why(suite):
    done = suite(SKIPPING, ci=False)
    assert done.returncode == 0, done.stdout
    assert "the moon is full" in done.stdout


def test_malformed_list_is_refused(suite):
    done = suite(SKIPPING, allowed="*::test_skipped\n")
    assert done.returncode != 0
    assert "allowed_skips.txt:1" in done.stdout + done.stderr
