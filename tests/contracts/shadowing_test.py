"""A stranger's package called `models`, `kernels`, ... in front of ours fails early and is named."""

from pathlib import Path

import pytest

from models.common.siblings import PACKAGES, require_siblings

ROOT = Path(__file__).resolve().parents[2]


def stranger(folder: Path, name: str, *, module: bool = False) -> Path:
    """A package (or single module) of that name, first on the path of a child that runs in `folder`."""
    target = folder / f"{name}.py" if module else folder / name / "__init__.py"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("")
    return target if module else target.parent


def test_ours_are_accepted():
    require_siblings(*PACKAGES)


@pytest.mark.parametrize(
    ("shadowed", "imported"),
    [
        ("kernels", "models"),
        ("kernels", "tasks"),
        ("models", "tasks"),
        ("configs", "tasks"),
        ("launch", "tasks"),
    ],
)
@pytest.mark.parametrize("module", [False, True], ids=["package", "module"])
def test_shadowed_package_is_named(run_python, tmp_path, shadowed, imported, module):
    other = stranger(tmp_path, shadowed, module=module)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {imported}"
    done = run_python("-c", code, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: Foxtrot needs its own package")
    assert f"own package {shadowed!r}" in last
    assert str(other) in last


def test_commands_refuse_a_mixed_house(run_python, tmp_path):
    stranger(tmp_path, "kernels")
    path = f"{tmp_path}:{ROOT}"
    done = run_python("-m", "tasks.lm.train", "--help", env={"PYTHONPATH": path}, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert f"finds {tmp_path / 'kernels'}, which shadows it" in done.stderr


def test_missing_package_is_named():
    with pytest.raises(ImportError, match=r"'no_such_package' from .*finds nothing of that name"):
        require_siblings("no_such_package")


def test_namespace_folder_in_front_of_nothing_is_no_problem(run_python, tmp_path):
    """A plain folder `models` (of checkpoints, say) in the working directory is no package: ours is found."""
    (tmp_path / "models").mkdir()
    done = run_python("-c", "import tasks, models; print(models.__file__)", cwd=tmp_path)
    assert Path(done.stdout.strip()) == ROOT / "models" / "__init__.py"


def test_kernels_alone_do_not_mind_a_stranger(run_python, tmp_path):
    """The kernels are a library of their own: a user's `models` package beside them is fine."""
    stranger(tmp_path, "models")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import kernels; print(kernels.__file__)"
    assert str(ROOT / "kernels") in run_python("-c", code).stdout
