"""Every file in configs/ that defines a run, in every variant it names, freezes and traces.

Its docstring says how it is run (`python -m tasks.<task>.train --config=configs/<file>.py`); VARIANTS list
the arguments it vouches for. Nothing is computed: shapes only, at full size.
"""

import functools
import importlib
import re
from pathlib import Path

import jax
import pytest

from tasks.common.config import load_config, with_defaults

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for path in sorted((ROOT / "configs").glob("*.py")) if "\ndef get_config(" in path.read_text()]
# Of every task; a task may have more.
SECTIONS = {"seed", "model", "runtime", "data", "optim", "train", "eval", "mesh", "checkpoint", "log"}


def variants(path: Path) -> tuple[str, ...]:
    return importlib.import_module(f"configs.{path.stem}").VARIANTS


def address(path: Path, variant: str) -> str:
    return f"configs/{path.name}:{variant}".rstrip(":")


CASES = [pytest.param(path, v, id=address(path, v)) for path in FILES for v in variants(path)]


def task_of(path: Path) -> str:
    """The task that the file's docstring says it is for."""
    docstring = importlib.import_module(f"configs.{path.stem}").__doc__ or ""
    commands = re.findall(rf"python -m (tasks\.\w+)\.train --config=configs/{path.name}", docstring)
    assert commands, f"{path.name} does not say `python -m tasks.<task>.train --config=configs/{path.name}`"
    return commands[0]


def task_config(path: Path):
    return importlib.import_module(f"{task_of(path)}.config")


def freeze(path: Path, variant: str):
    module = task_config(path)
    return module.freeze_all(with_defaults(load_config(address(path, variant)), module.SCHEMA))


def test_there_are_configs():
    assert {"fox.py", "transformer.py"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_variants_are_listed_once_and_include_the_default(path):
    listed = variants(path)
    assert listed[0] == "", "VARIANTS starts with the default, the empty string"
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize(("path", "variant"), CASES)
def test_config_freezes(path, variant):
    config, sections = load_config(address(path, variant)), set(task_config(path).SCHEMA)
    assert sections >= SECTIONS
    assert set(config) <= sections
    frozen = freeze(path, variant)
    assert set(frozen._fields) == sections
    for name in sections - {"seed"}:
        section = getattr(frozen, name)
        assert type(section).__dataclass_params__.frozen, f"{name} is not a frozen dataclass"
        hash(section)  # sections travel as static arguments


@pytest.mark.parametrize(("path", "variant"), CASES)
def test_model_traces_at_full_size(path, variant):
    frozen = freeze(path, variant)
    room = importlib.import_module(type(frozen.model).__module__.rsplit(".", 1)[0])
    params = jax.eval_shape(functools.partial(room.init_params, frozen.model), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == room.count_params(frozen.model)


@pytest.mark.parametrize(("path", "variant"), CASES)
def test_loss_traces_at_full_size(path, variant, tmp_path):
    """What the loop is told of the run, on one row of a batch."""
    train = importlib.import_module(f"{task_of(path)}.train")
    config = with_defaults(load_config(address(path, variant)), task_config(path).SCHEMA)
    if "time" in config.mesh:  # there is one device here
        config.mesh.time = 1
    job = train.make_job(config, tmp_path)
    params = jax.eval_shape(job.init_params, jax.random.key(0))
    teacher = (params,) if job.teacher else ()
    batch = train.abstract_batch(freeze(path, variant))
    loss, _ = jax.eval_shape(job.loss_fn, params, batch, jax.random.key(0), *teacher)
    assert loss.shape == ()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_unknown_argument_names_the_nearest(path):
    with pytest.raises(ValueError, match=r"unknown config argument 'sede': did you mean 'seed'"):
        load_config(address(path, "sede=1"))
