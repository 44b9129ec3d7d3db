"""One run on several meshes: the same losses, and it goes on wherever it is resumed (simulated devices)."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from tasks.common.checkpoint import load_checkpoint
from tasks.common.errors import ConfigError
from tasks.common.mesh import MeshConfig, make_mesh, put_batch
from tasks.common.writer import read_records

# Trains in one process on each mesh in turn: mesh sizes and steps come from the command line.
PROGRAM = """
import json, sys
import jax, numpy as np
from tasks.common.fingerprint import fingerprints
from tasks.common.job import Job
from tasks.common.loop import fit
from tasks.common.mesh import MeshConfig, make_mesh
from tests.tasks.common import tiny_run as tiny

for leg in json.loads(sys.argv[1]):
    sizes = {"data": leg["data"], "fsdp": leg["fsdp"]}
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: leg["data"] * leg["fsdp"]])
    config = tiny.tiny_config(**{"train.steps": leg["steps"], "train.accum": leg.get("accum", 1)})
    given = tiny.arguments(leg["workdir"], config, mesh=mesh, free_keys=("train", "mesh"))
    state = fit(Job(**given))
    kernel = state.params["layers"]["0"]["kernel"]
    moment = state.opt_state[1].mu["layers"]["0"]["kernel"]
    assert kernel.sharding.spec == moment.sharding.spec == jax.P("fsdp", None)
    assert kernel.addressable_shards[0].data.shape == (8 // leg["fsdp"], 16)
    # The fingerprint of a sharded array is that of the array.
    assert fingerprints(state.params) == fingerprints(jax.tree.map(np.asarray, state.params))
"""


def leg(workdir: Path, data: int, fsdp: int, steps: int, accum: int = 1) -> dict[str, object]:
    return {"workdir": str(workdir), "data": data, "fsdp": fsdp, "steps": steps, "accum": accum}


def column(workdir: Path, name: str) -> list[float]:
    return [record[name] for record in read_records(workdir) if record["kind"] == "train"]


@pytest.mark.slow
def test_meshes_agree_and_a_run_moves_between_them(run_python: Callable[..., object], tmp_path: Path) -> None:
    legs = [leg(tmp_path / "one", 1, 1, 8), leg(tmp_path / "eight", 2, 4, 5)]
    for data in (4, 2, 1):
        legs += [leg(tmp_path / f"to_{data}", 2, 4, 5), leg(tmp_path / f"to_{data}", data, 1, 8)]
    legs += [leg(tmp_path / "accum", 2, 2, 5, accum=2)]
    run_python("-c", PROGRAM, json.dumps(legs), devices=8)

    for name in ("loss", "abs_error", "grad_norm", "param_norm"):
        wanted = column(tmp_path / "one", name)
        assert len(wanted) == 8
        np.testing.assert_allclose(column(tmp_path / "eight", name), wanted[:5], rtol=1e-5, err_msg=name)
        for data in (4, 2, 1):
            moved = column(tmp_path / f"to_{data}", name)
            assert moved[:5] == column(tmp_path / "eight", name)
            np.testing.assert_allclose(moved, wanted, rtol=1e-5, err_msg=f"{name}, data={data}")
    # Accumulation draws another rng per micro-batch, whose noise on the targets is small.
    accumulated = column(tmp_path / "accum", "loss")
    np.testing.assert_allclose(accumulated, column(tmp_path / "one", "loss")[:5], rtol=0.1)
    # Any mesh's checkpoint is read without one.
    assert load_checkpoint(tmp_path / "eight").state["layers"]["0"]["kernel"].shape == (8, 16)


def test_a_mesh_that_does_not_fit_is_named() -> None:
    devices = jax.devices() * 8  # only counted
    with pytest.raises(ConfigError, match=r"mesh.data=3, mesh.fsdp=1 does not fit 8 cpu device\(s\)"):
        make_mesh(MeshConfig(data=3), devices[:8])
    with pytest.raises(ConfigError, match=r"mesh.data=-1, mesh.fsdp=3 does not fit 8"):
        make_mesh(MeshConfig(fsdp=3), devices[:8])
    with pytest.raises(ConfigError, match="both -1"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ConfigError, match=r"mesh.fsdp = 0"):
        MeshConfig(fsdp=0)


def test_rows_must_be_shareable() -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(
        ValueError, match=r"batch\['x'\] has shape \(3, 2\): its rows must be a multiple of 2"
    ):
        put_batch({"x": np.zeros((3, 2))}, mesh, micro_batches=2)
    placed = put_batch({"x": np.arange(8, dtype=np.int32).reshape(4, 2)}, mesh, micro_batches=2)["x"]
    assert placed.shape == (2, 2, 2)
    assert placed[1, 0].tolist() == [4, 5]
