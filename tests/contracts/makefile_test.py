"""What the Makefile runs and how it sets up .venv, with nothing installed: make -n and a stand-in for pip."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BOOTSTRAP = '"$python" .ci/bootstrap.py'


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """The files make looks at, in a folder of their own; no .venv yet."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock", ".python-version"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    return tmp_path


def dry_run(house: Path, *arguments: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "ARGS")}
    command = ["make", "--no-print-directory", "-n", *arguments]
    return subprocess.run(
        command, cwd=house, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def installed(house: Path, *, age: float = 0) -> None:
    stamp = house / ".venv" / ".installed"
    stamp.parent.mkdir(exist_ok=True)
    stamp.touch()
    now = max(path.stat().st_mtime for path in house.iterdir())
    os.utime(stamp, (now + 10 - age, now + 10 - age))


@pytest.mark.parametrize("target", ["train", "test", "test-all", "lint"])
def test_every_target_sets_up_first(house, target):
    first, *rest = dry_run(house, target)
    assert first.endswith(BOOTSTRAP)
    assert rest


def test_train_runs_the_documented_command(house):
    installed(house)
    assert dry_run(house, "train") == [
        ".venv/bin/python -m tasks.lm.train --config=configs/fox.py",
    ]
    (line,) = dry_run(house, "train", "ARGS=--config.train.steps=5")
    assert line.endswith("--config=configs/fox.py --config.train.steps=5")


def test_an_environment_older_than_the_lock_is_renewed(house):
    installed(house, age=1000)
    assert dry_run(house, "train")[0].endswith(BOOTSTRAP)


def test_all_runs_the_fast_tests_then_the_slow_ones(house):
    installed(house)
    fast, every = dry_run(house, "test"), dry_run(house, "test-all")
    assert every[: len(fast)] == fast
    assert [line for line in fast if "--slow" in line] == []
    slow = every[len(fast) :]
    assert slow
    assert all("-m pytest" in line and "--slow" in line for line in slow)


def test_no_test_is_left_out_of_make_test_all(house):
    """The marker expressions cover every test just once: fast, timing, slow, and slow and timing."""
    installed(house)
    lines = [line.split("-m pytest", 1)[1] for line in dry_run(house, "test-all")]
    for slow in (False, True):
        for timing in (False, True):
            runs = [line for line in lines if _selects(line, slow=slow, timing=timing)]
            assert len(runs) == 1, (slow, timing, runs)
            parallel = "-n" in runs[0].split()
            assert not (timing and parallel), "speed claims need the machine to themselves"


def _selects(line: str, *, slow: bool, timing: bool) -> bool:
    if (slow or timing) and "--slow" not in line.split():
        return False  # tests/conftest.py deselects it
    _, _, expression = line.partition('-m "')
    expression = expression.partition('"')[0] or "True"
    return bool(eval(expression, {"slow": slow, "timing": timing}))


def test_ci_runs_everything():
    script = (ROOT / ".ci" / "run").read_text()
    assert "make --no-print-directory test-all" in script
    assert "export CI=true" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# The stand-in answers the probe, then notes every pip call and fails at the one named in the file `fail_at`.
STAND_IN = """#!/bin/sh
cd "$(dirname "$0")/../.."
case "$*" in *"import sys, pip"*) echo True; exit 0;; esac
echo "$*" >> calls
echo "Collecting somepackage==1.0 (from https://mirror.example/simple)"
case "$*" in *"$(cat fail_at)"*) echo "ERROR: No matching distribution"; exit 1;; esac
"""


@pytest.fixture
def bootstrap(house: Path, monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("bootstrap_under_test", house / ".ci" / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    python = house / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)
    (house / "fail_at").write_text("nothing fails")
    return module


def test_bootstrap_installs_the_lock_then_the_project_then_stamps(bootstrap, house, capsys):
    bootstrap.main()
    lock, project = (house / "calls").read_text().splitlines()
    assert lock.endswith("requirements.lock")
    assert "--no-deps" in lock
    assert "--editable" in project
    assert "--no-deps" in project
    assert (house / ".venv" / ".installed").exists()
    out = capsys.readouterr().out
    assert f"{len(bootstrap.pinned(house / 'requirements.lock'))} pinned packages" in out
    assert "mirror.example" not in out


@pytest.mark.parametrize("step", ["requirements.lock", "--editable"])
def test_an_interrupted_bootstrap_leaves_no_stamp_and_is_repeated(bootstrap, house, step):
    (house / "fail_at").write_text(step)
    with pytest.raises(SystemExit, match=r"(?s)pip failed:.*No matching distribution.*make again"):
        bootstrap.main()
    assert not (house / ".venv" / ".installed").exists()
    assert (house / ".venv" / "bin" / "python").read_text() == STAND_IN  # a working environment is kept
    (house / "fail_at").write_text("nothing fails")
    bootstrap.main()
    assert (house / ".venv" / ".installed").exists()


def test_half_made_environment_is_made_anew(bootstrap, house, monkeypatch):
    made = []
    monkeypatch.setattr(
        bootstrap.venv.EnvBuilder, "create", lambda self, folder: made.append((self.clear, folder))
    )
    python = house / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    assert bootstrap.ensure_venv(house / ".venv") == python
    python.unlink()
    bootstrap.ensure_venv(house / ".venv")
    assert made == [(True, house / ".venv")] * 2


def test_killed_while_pip_was_unpacking(bootstrap, house, monkeypatch):
    """pip takes a package whose metadata is there for installed, files or not: start afresh."""
    made = []
    monkeypatch.setattr(bootstrap.venv.EnvBuilder, "create", lambda self, folder: made.append(folder))

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "progress", killed)
        with pytest.raises(KeyboardInterrupt):
            bootstrap.main()
    assert made == []
    assert not (house / ".venv" / ".installed").exists()
    bootstrap.main()
    assert made == [house / ".venv"]
    assert not (house / ".venv" / ".installing").exists()
    assert (house / ".venv" / ".installed").exists()


def test_environment_of_an_old_python_is_refused(bootstrap, house):
    (house / ".venv" / "bin" / "python").write_text("#!/bin/sh\necho False\n")
    with pytest.raises(SystemExit, match=r"older than 3.12: remove it"):
        bootstrap.ensure_venv(house / ".venv")


@pytest.fixture
def find_python(house: Path, tmp_path: Path):
    """find_python(name=usable, ...): the outcome where PATH holds just these interpreters."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for tool in ("cat", "dirname"):
        (bin_folder / tool).symlink_to(shutil.which(tool))

    def run(extra: dict[str, str] | None = None, **interpreters: bool):
        for name, usable in interpreters.items():
            file = bin_folder / name.replace("_", ".")
            file.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n' if usable else "#!/bin/sh\nexit 1\n")
            file.chmod(0o755)
        environment = {"PATH": str(bin_folder), "HOME": str(tmp_path), **(extra or {})}
        script = ["/bin/sh", str(house / ".ci" / "find-python")]
        done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
        return done, bin_folder

    return run


def test_python_of_the_wanted_version_comes_first(find_python):
    done, folder = find_python(python3_12=True, python3=True)
    assert done.stdout.strip() == str(folder / "python3.12")


def test_an_unusable_python_is_passed_over(find_python):
    done, folder = find_python(python3_12=False, python3=True)
    assert done.stdout.strip() == str(folder / "python3")


def test_pyenv_versions_are_found(find_python, tmp_path):
    real = tmp_path / ".pyenv" / "versions" / "3.12.9" / "bin" / "python"
    real.parent.mkdir(parents=True)
    real.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    real.chmod(0o755)
    done, _ = find_python(python3=True)
    assert done.stdout.strip() == str(real)


def test_no_python_is_a_clear_error(find_python):
    done, _ = find_python(python3=False)
    assert done.returncode == 1
    assert "needs Python >= 3.12" in done.stderr
    assert "PYTHON=/path" in done.stderr


def test_chosen_python_must_be_usable(find_python):
    done, _ = find_python({"PYTHON": "python3"}, python3=False, python3_12=True)
    assert done.returncode == 1
    assert "PYTHON=python3 is not" in done.stderr
