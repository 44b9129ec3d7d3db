"""What others install: the lock agrees with the bounds, and a wheel works from any folder."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("models", "kernels", "tasks", "configs", "launch")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked() -> dict[str, Version]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def requirements(*extras: str) -> list[Requirement]:
    """Core and the named extras' requirements, with foxtrot[...] inside an extra opened up."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    found = []
    for requirement in map(Requirement, lines):
        if requirement.name == "foxtrot":
            # A set, whose order differs between test workers.
            found += requirements(*sorted(requirement.extras))
        else:
            found.append(requirement)
    return found


def test_lock_is_names_and_exact_versions_only():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!+]*", line), line
    gpu = [name for name in locked() if name.startswith("nvidia") or "cuda" in name]
    assert gpu == [], "the lock is for a CPU; device packages come from the extras"


@pytest.mark.parametrize("requirement", requirements("dev"), ids=str)
def test_lock_satisfies_the_bounds(requirement):
    pins = locked()
    assert canonicalize_name(requirement.name) in pins, "run `make lock`"
    assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), "run `make lock`"


def test_lock_is_complete():
    """.venv is installed with --no-deps: whatever a locked package needs must be locked too."""
    pins, missing = locked(), []
    for name in pins:
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            pin = pins.get(canonicalize_name(needed.name))
            if pin is None or not needed.specifier.contains(pin, prereleases=True):
                missing.append(f"{name} needs {line}, locked: {pin}")
    assert missing == []


def test_python_floor_is_stated_once_and_the_same():
    floor = (ROOT / ".python-version").read_text().strip()
    assert PROJECT["requires-python"] == f">={floor}"
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["mypy"]["python_version"] == floor
    assert tools["ruff"]["target-version"] == f"py{floor.replace('.', '')}"


def test_pre_commit_hooks_are_local():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo:\s*(\S+)", text) == ["local"]
    for tool in ("ruff check", "ruff format --check", "mypy"):
        assert f"-m {tool}" in text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy so that no build folder appears in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_every_file_of_the_packages(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT))
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected - inside == set(), "add them to [tool.setuptools.package-data]"
    extra = {name.split("/")[0] for name in inside} - set(PACKAGES)
    assert all(name.endswith(".dist-info") for name in extra), extra


PROGRAM = """
import pathlib, sys
import configs, kernels, launch, models, tasks

site = pathlib.Path(sys.argv[1]).resolve()
for package in (configs, kernels, launch, models, tasks):
    assert site in pathlib.Path(package.__file__).resolve().parents, package.__file__

import jax
import jax.numpy as jnp
from kernels.forgetting_attention import forgetting_attention
from models.fox import Fox, FoxConfig
from flax import nnx
from tasks.common.config import load_config

q = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
out = forgetting_attention(q, q, q, jnp.full((1, 5, 2), -0.1))
assert out.shape == (1, 5, 2, 8) and bool(jnp.isfinite(out).all())

model = Fox(FoxConfig.preset("fox_pro", "tiny", vocab_size=11), rngs=nnx.Rngs(0))
logits, _ = model(jnp.zeros((1, 6), jnp.int32))
assert logits.shape == (1, 6, 11) and bool(jnp.isfinite(logits).all())

assert "model" in load_config("configs/fox.py")
print("works")
"""


def test_installed_wheel_works_from_another_folder(wheel, run_python, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run_python(
        "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(site), str(wheel)
    )
    done = run_python("-c", PROGRAM, str(site), cwd=elsewhere, env={"PYTHONPATH": str(site)})
    assert done.stdout.strip().endswith("works")
