"""Weights and whose they are: files and folders that are opened, and those that are refused."""

from pathlib import Path

import numpy as np
import pytest

from models import tapnext
from models.common.params import flatten_names
from tasks.common.config import save_resolved, to_json
from tasks.common.errors import ConfigError
from tasks.points.trained import initial_params, open_model, run_config
from tests.integration.points_runs import MODEL, frozen
from tests.models.common import torch_writer
from tests.models.tapnext.small_tapnext import random_params


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights in both released formats."""
    folder, params = tmp_path_factory.mktemp("official"), random_params(MODEL)
    tapnext.convert.save_official(folder / "x.npz", params, MODEL)
    torch_writer.save(folder / "x.pt", tapnext.convert.to_official(params, MODEL, layout="torch"))
    return {"npz": folder / "x.npz", "pt": folder / "x.pt"}


@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_official_files_are_models_and_weights_to_start_from(kind: str, official: dict[str, Path]) -> None:
    """Files state the sizes that a configuration leaves open."""
    numerics = {"npz": "jax", "pt": "torch"}[kind]
    model = open_model(official[kind])
    assert (model.run, model.source, model.config.numerics) == (None, official[kind], numerics)
    assert (model.config.lru_width, model.config.coordinate_bins) == (32, (32, 32))
    args = f"init={official[kind]},numerics={numerics}"
    for options in ((), ("--config.model.decode_radius=8", "--config.model.min_rad=0.5")):
        given = flatten_names(initial_params(frozen(args, *options)))
        expected = flatten_names(random_params(MODEL))
        assert given.keys() == expected.keys()
        assert all(np.array_equal(given[name], expected[name]) for name in given)


def test_another_models_weights_are_refused(official: dict[str, Path]) -> None:
    changes = ("lru_width=64", "coordinate_bins=(64, 64)", "depth=1", "query_scale=2")
    options = [f"--config.model.{change}" for change in changes]
    with pytest.raises(ConfigError, match=r"x\.npz holds another model than config\.model:\n") as caught:
        initial_params(frozen(f"init={official['npz']}", *options))
    assert str(caught.value).split("\n")[1:] == [
        "  coordinate_bins: [32, 32] -> [64, 64]",
        "  depth: 2 -> 1",
        "  lru_width: 32 -> 64",
        "  query_scale: 1 -> 2",
    ]


def test_weights_to_start_from_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.init_from: .*gone: no such file or folder"):
        initial_params(frozen(f"init={tmp_path / 'gone'}"))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone: no such file or folder"):
        open_model(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"is not the workdir of a run: it has no config\.json"):
        open_model(tmp_path)
    for name, content in {"x.npz": b"PK", "x.pt": b"\x80\x02."}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            open_model(tmp_path / name)
    np.savez(tmp_path / "other.npz", weights=np.zeros(3, np.float32))
    with pytest.raises(ConfigError, match=r"other\.npz: .*not a TAPNext checkpoint"):
        open_model(tmp_path / "other.npz")


def test_the_configuration_of_a_run(tmp_path: Path) -> None:
    """Completed where an older run lacks keys; another task's is refused."""
    cfg = frozen("", "--config.loss.occluded=0.2")
    record = to_json(dict(cfg._asdict()))
    del record["loss"]["normalize"]
    save_resolved(tmp_path / "run", record)
    assert run_config(tmp_path / "run") == cfg
    save_resolved(tmp_path / "other", {"seed": 0, "model": {"vocab_size": 3}})
    with pytest.raises(ConfigError, match=r"unknown config key 'model\.vocab_size'"):
        run_config(tmp_path / "other")
