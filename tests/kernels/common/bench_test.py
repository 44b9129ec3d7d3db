"""The timing helper times what it says."""

import jax
import jax.numpy as jnp
import pytest

from kernels.common.bench import time_compiled, time_together


def test_longer_work_takes_longer_and_compiling_is_apart() -> None:
    def repeat(times: int):
        return lambda x: jax.lax.fori_loop(0, times, lambda _, y: jnp.sin(y) + y, x)

    timed = time_together({"long": repeat(2000), "short": repeat(2)}, jnp.ones(4096), calls=3)
    assert timed["long"].cpu_s > timed["short"].cpu_s
    assert timed["long"].best_s <= timed["long"].median_s
    assert timed["short"].compile_s > 0
    assert timed["short"].calls == 3


def test_zero_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        time_compiled(jnp.sin, jnp.ones(2), calls=0)
