"""The loop over time against `associative_scan` on a CPU: why it is the default there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common.bench import time_together
from kernels.linear_scan import linear_scan, rglru_scan

NAMES = ("xla_scan", "associative", "reference")


def forward(op: str, name: str) -> Callable[..., Any]:
    def run(x: jax.Array, gate_x: jax.Array, gate_a: jax.Array, a: jax.Array, a_param: jax.Array) -> Any:
        if op == "linear_scan":
            return linear_scan(x, a, implementation=name)
        return rglru_scan(x, gate_x, gate_a, a_param, implementation=name)

    return run


def both_passes(op: str, name: str) -> Callable[..., Any]:
    def run(*arrays: jax.Array) -> Any:
        out, pullback = jax.vjp(forward(op, name), *arrays)
        return out, pullback(out)

    return run


@pytest.mark.timing
@pytest.mark.parametrize("op", ["linear_scan", "rglru_scan"])
@pytest.mark.parametrize("shape", [(1576, 32, 768), (1, 4096, 2048)], ids=["short_rows", "one_long_row"])
def test_is_faster_than_the_associative_scan(op: str, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    x, gate_x, gate_a = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3))
    a = jnp.asarray(rng.uniform(0.5, 1, shape), jnp.float32)
    a_param = jnp.asarray(rng.uniform(-6, 0, shape[2:]), jnp.float32)
    for passes, make in (("forward", forward), ("forward + backward", both_passes)):
        timed = time_together({n: make(op, n) for n in NAMES}, x, gate_x, gate_a, a, a_param, calls=5)
        print(f"\n{op} {shape} {passes}, ms wall / cpu, compile s:", end="")
        for name, time in timed.items():
            print(f"  {name} {time.best_s * 1e3:.0f} / {time.cpu_s * 1e3:.0f}, {time.compile_s:.2f}", end="")
        assert timed["xla_scan"].cpu_s < timed["associative"].cpu_s
