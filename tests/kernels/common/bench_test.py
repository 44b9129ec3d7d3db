"""The timing helper times what it says."""

import jax
import jax.numpy as jnp
import pytest

from kernels.common.bench import (
    compile_all,
    time_bursts,
    time_compiled,
    time_kernels,
    time_together,
)


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


class Device:
    """A device that takes `work` seconds a call and `sync` a wait, on a clock of its own."""

    def __init__(self, work: float, sync: float) -> None:
        self.work, self.sync, self.now, self.calls = work, sync, 0.0, 0

    def run(self):
        self.now += self.work
        self.calls += 1
        return jnp.zeros(())

    def clock(self) -> float:
        self.now += self.sync / 2
        return self.now


def test_a_burst_pays_for_one_wait_only() -> None:
    device = Device(work=1e-3, sync=1e-3)
    timed = time_bursts({"x": device.run}, bursts=3, seconds=0.2, clock=device.clock)["x"]
    assert timed.calls > 50
    assert timed.median_s == pytest.approx(1e-3, rel=0.02)
    assert timed.spread == pytest.approx(0, abs=1e-6)
    # One to load the program, two to count how many fill a burst, each after as many untimed.
    assert device.calls == 2 + 4 + 3 * 2 * timed.calls


def test_turns_differ_and_begin_untimed() -> None:
    """What ran before slows a call down: it must neither be timed nor always be the same call."""
    turns: list[str] = []

    class Throttled(Device):
        def starting(self, name: str):
            def run():
                self.now += 1e-3 if turns[-1:] == [name] else 0.5
                turns.append(name)
                return jnp.zeros(())

            return run

    device, names = Throttled(0.0, 0.0), ("a", "b", "c")
    timed = time_bursts({n: device.starting(n) for n in names}, bursts=6, seconds=2e-3, clock=device.clock)
    assert [timed[name].median_s for name in names] == pytest.approx([1e-3] * 3)
    orders = [name for i, name in enumerate(turns) if i == 0 or turns[i - 1] != name][3:]
    assert len({tuple(orders[i : i + 3]) for i in range(0, len(orders) - 2, 3)}) > 1


def test_slow_calls_make_bursts_of_one() -> None:
    device = Device(work=1.0, sync=0.0)
    assert time_bursts({"x": device.run}, bursts=1, seconds=0.05, clock=device.clock)["x"].calls == 1
    with pytest.raises(ValueError, match="at least 1"):
        time_bursts({"x": device.run}, bursts=0)


def test_compiled_programs_keep_their_names() -> None:
    programs = compile_all({"twice": (lambda x: 2 * x, (jnp.ones(3),)), "sum": (jnp.sum, (jnp.ones(3),))})
    assert programs["twice"](jnp.ones(3)).tolist() == [2, 2, 2]
    assert float(programs["sum"](jnp.ones(3))) == 3


def test_kernels_are_timed_by_trace() -> None:
    def repeat(times: int):
        work = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, y: jnp.sin(y) + y, x))
        x = jnp.ones(4096)
        return lambda: work(x)

    timed = time_kernels({"long": repeat(500), "short": repeat(2)}, traces=2, repeats=3)
    assert timed["long"].median_s > 20 * timed["short"].median_s > 0
    assert (timed["short"].calls, timed["short"].bursts) == (3, 2)
    with pytest.raises(ValueError, match="at least 1; got 0 and 10"):
        time_kernels({}, traces=0)
