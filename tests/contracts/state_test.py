"""Every model with memory: a whole pass, any chunking and single steps give the same, in fixed shapes.

Rooms are found by listing models/: a package that exports `init_state` must have tests/models/<room>/
contract_cases.py, whose `cases()` says how to build and run it. A new room gets these tests by existing.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from tests.conftest import ROOT
from tests.contracts.model_cases import named_cases

BATCH, LENGTH = 3, 12
CHUNKINGS = {"whole": [12], "chunks and steps": [5, 1, 5, 1], "steps": [1] * 12}
# Many small programs that run once each: half the compile time for the same arithmetic.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


def rooms_with_memory() -> list[str]:
    names = sorted(path.parent.name for path in (ROOT / "models").glob("*/__init__.py"))
    return [name for name in names if hasattr(importlib.import_module(f"models.{name}"), "init_state")]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        named = named_cases(rooms_with_memory())
        metafunc.parametrize("case", named.values(), ids=named.keys())


def test_rooms_are_found():
    assert {"fox", "trecvit"} <= set(rooms_with_memory())


@functools.cache
def jitted(case):
    """One cache of compiled programs per case, shared by the tests."""
    return jax.jit(case.run, compiler_options=QUICK_COMPILE)


def resets() -> jax.Array:
    """Starts inside a chunk, at a chunk's first token, at the very first token, two in one chunk, none."""
    reset = np.zeros((BATCH, LENGTH), bool)
    reset[0, [3, 6, 8]] = True
    reset[1, [0, 5, 11]] = True
    return jnp.asarray(reset)


def advance(case, x, reset, state, chunks):
    """Outputs for x given in chunks, and the state after it; the state's shapes must not change."""
    shapes = jax.tree.map(jax.typeof, state)
    outputs, start = [], 0
    for size in chunks:
        part = slice(start, start + size)
        y, state = jitted(case)(case.params, x[:, part], state, reset[:, part])
        assert jax.tree.map(jax.typeof, state) == shapes
        outputs.append(y)
        start += size
    return jnp.concatenate(outputs, axis=1), state


def test_any_chunking_equals_the_whole_pass(case, subtests):
    x, reset = case.inputs(BATCH, LENGTH), resets()
    step = jitted(case)
    expected, none = step(case.params, x, None, reset)
    assert none is None
    unbroken, _ = step(case.params, x, None, jnp.zeros_like(reset))
    assert float(jnp.abs(expected - unbroken)[:2].max()) > 1e-3, "resets must matter"
    more, no_reset = x[:, :5], jnp.zeros_like(reset[:, :5])
    continuations = []
    for name, chunks in CHUNKINGS.items():
        with subtests.test(name):
            outputs, state = advance(case, x, reset, case.init_state(BATCH, LENGTH + 5), chunks)
            np.testing.assert_allclose(outputs, expected, atol=2e-5)
            continuations.append(advance(case, more, no_reset, state, [5])[0])
    for other in continuations[1:]:
        np.testing.assert_allclose(other, continuations[0], atol=2e-5)
    # One program for the whole pass without memory, and one per chunk length: 12, 5 and 1.
    assert step._cache_size() == 4


def test_rows_can_be_reordered(case):
    """Selecting rows of every leaf selects histories: what beam search and continuous batching need."""
    x, reset = case.inputs(BATCH, LENGTH), resets()
    order = jnp.array([2, 0, 0])
    _, state = advance(case, x[:, :5], reset[:, :5], case.init_state(BATCH, LENGTH + 5), [5])
    selected = jax.tree.map(lambda leaf: leaf[order], state)
    outputs, _ = advance(case, x[order, 5:10], reset[order, 5:10], selected, [5])
    expected, _ = advance(case, x[order], reset[order], case.init_state(BATCH, LENGTH + 5), [5, 5])
    np.testing.assert_allclose(outputs, expected[:, 5:10], atol=1e-6)


def test_a_state_can_be_continued_twice(case):
    """A call returns a new state and leaves the given one as it was."""
    x, reset = case.inputs(BATCH, LENGTH), resets()
    _, state = advance(case, x[:, :5], reset[:, :5], case.init_state(BATCH, LENGTH + 5), [5])
    before = jax.tree.map(np.asarray, state)
    first, _ = advance(case, x[:, 5:10], reset[:, 5:10], state, [5])
    again, _ = advance(case, x[:, 5:10], reset[:, 5:10], state, [5])
    np.testing.assert_array_equal(first, again)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state), before)
