"""Sequences sharded over a mesh axis, on simulated devices; the comparisons are in sharded_run.py."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kernels.linear_scan.sharded import sharded_linear_scan

RUN = str(Path(__file__).with_name("sharded_run.py"))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla_scan", "associative"])
def test_equals_a_scan_of_the_whole(run_python: Any, implementation: str) -> None:
    run_python(RUN, implementation, devices=8)


@pytest.mark.usefixtures("unchecked_types")
def test_refuses_what_it_cannot_shard() -> None:
    x = jnp.zeros((1, 7, 3))
    with pytest.raises(
        ValueError, match="axis='time' is not an axis of the mesh; its axes are none: pass mesh"
    ):
        sharded_linear_scan(x, x, axis="time")
    mesh = jax.sharding.AbstractMesh((2,), ("time",))
    with pytest.raises(ValueError, match="x has 7 steps, which 2 shards of axis 'time' do not divide"):
        sharded_linear_scan(x, x, axis="time", mesh=mesh)
    x = jnp.zeros((1, 8, 3))
    with pytest.raises(ValueError, match="implementation='reference' has no passes of its own"):
        sharded_linear_scan(x, x, axis="time", mesh=mesh, implementation="reference")
