"""What the kernel contract does not ask: complex arrays, dtypes, what is saved, resets, program size."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.linear_scan import linear_scan, rglru_scan
from kernels.linear_scan.config import RESIDUAL_NAMES

FAST = ("xla_scan", "associative")
ALL = (*FAST, "reference")
# Of the largest reference value.
TOLERANCE = {"float64": 1e-12, "complex128": 1e-12, "complex64": 2e-6, "float32": 2e-6}


def draw(shape: tuple[int, ...], dtype: Any, seed: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    return jnp.asarray(x + 1j * rng.standard_normal(shape) if jnp.issubdtype(dtype, complex) else x, dtype)


def with_gradients(function: Any) -> Any:
    """A compiled function: results, and gradients of their sum with random weights."""

    @jax.jit
    def both(*arrays: jax.Array) -> list[jax.Array]:
        out, pullback = jax.vjp(function, *arrays)
        return [*out, *pullback(tuple(draw(o.shape, o.dtype, 50 + i) for i, o in enumerate(out)))]

    return both


def assert_close(actual: Any, wanted: Any, tolerance: float) -> None:
    for index, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        assert a.dtype == w.dtype
        a, w = (np.asarray(x, complex) for x in (a, w))
        error = np.abs(a - w).max() / max(1, np.abs(w).max())
        assert error <= tolerance, f"result {index}: error {error:.2e}"


def loop(x: np.ndarray, a: np.ndarray, h0: np.ndarray, reverse: bool) -> np.ndarray:
    """The recurrence in numpy."""
    h, states = h0, np.zeros_like(x)
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        states[:, t] = h
    return states


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_complex(name: str, reverse: bool) -> None:
    """Complex x with complex and real a: values by a loop, gradients by difference quotients."""
    with jax.enable_x64(True):
        x, h0 = draw((2, 9, 3), jnp.complex128, 0), draw((2, 3), jnp.complex128, 1)
        for decay_dtype in (jnp.complex128, jnp.float64):
            a = 0.5 * draw(x.shape, decay_dtype, 2)
            run = functools.partial(linear_scan, reverse=reverse, implementation=name)
            h, h_last, dx, da, dh0 = with_gradients(run)(x, a, h0)
            wanted = loop(*(np.asarray(part) for part in (x, a, h0)), reverse)
            np.testing.assert_allclose(h, wanted, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(h_last, wanted[:, 0 if reverse else -1], rtol=1e-12, atol=1e-12)
            weights = [np.asarray(draw(o.shape, o.dtype, 50 + i)) for i, o in enumerate((h, h_last))]

            def weighted(x: Any, a: Any, h0: Any, weights: Any = weights) -> complex:
                states = loop(np.asarray(x), np.asarray(a), np.asarray(h0), reverse)
                last = states[:, 0 if reverse else -1]
                return np.sum(states * weights[0]) + np.sum(last * weights[1])

            # JAX: the gradient is the derivative of the sum, without conjugates, and real for real inputs.
            for index, gradient in enumerate((dx, da, dh0)):
                arguments = [np.asarray(part) for part in (x, a, h0)]
                direction = np.asarray(draw(gradient.shape, gradient.dtype, 9 + index))
                ends = []
                for sign in (1, -1):
                    moved = list(arguments)
                    moved[index] = moved[index] + sign * 1e-6 * direction
                    ends.append(weighted(*moved))
                slope = (ends[0] - ends[1]) / 2e-6
                found = np.sum(np.asarray(gradient) * direction)
                if not np.iscomplexobj(arguments[index]):
                    slope = slope.real
                np.testing.assert_allclose(found, slope, rtol=1e-7)


@pytest.mark.parametrize(
    ("x_dtype", "a_dtype", "state"),
    [
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        ("float16", "float16", "float32"),
        ("float64", "float64", "float64"),
        ("complex64", "float32", "complex64"),
    ],
)
def test_dtypes_of_results_and_gradients(x_dtype: str, a_dtype: str, state: str) -> None:
    with jax.enable_x64("64" in x_dtype and "complex" not in x_dtype):
        x, a, h0 = draw((2, 5, 3), jnp.dtype(x_dtype), 0), draw((2, 5, 3), jnp.dtype(a_dtype), 1), None
        h0 = draw((2, 3), jnp.dtype(state), 2)
        for name in ALL:
            run = functools.partial(linear_scan, implementation=name)
            found = [str(o.dtype) for o in with_gradients(run)(x, a, h0)]
            assert found == [x_dtype, state, x_dtype, a_dtype, state], name


@pytest.mark.parametrize("name", ALL)
def test_the_state_is_wide(name: str) -> None:
    """Additions of 1 in bfloat16 stop at 256; h_last must not."""
    ones = jnp.ones((1, 1024, 1), jnp.bfloat16)
    h, h_last = jax.jit(functools.partial(linear_scan, implementation=name))(ones, ones)
    assert h_last[0, 0] == 1024
    assert h[0, -1, 0] == 1024


@given(
    length=st.integers(2, 12), cut=st.integers(1, 11), reverse=st.booleans(), seed=st.integers(0, 99),
    name=st.sampled_from(ALL),
)  # fmt: skip
@settings(max_examples=6)
def test_chunks_continue_each_other(length: int, cut: int, reverse: bool, seed: int, name: str) -> None:
    cut = min(cut, length - 1)
    x, a = draw((2, length, 3), jnp.float32, seed), 0.7 * draw((2, length, 3), jnp.float32, seed + 1)
    options = {"reverse": reverse, "implementation": name}
    h, h_last = linear_scan(x, a, **options)
    parts = [(x[:, :cut], a[:, :cut]), (x[:, cut:], a[:, cut:])]
    first, second = parts[::-1] if reverse else parts
    early, state = linear_scan(*first, **options)
    late, state = linear_scan(*second, state, **options)
    joined = jnp.concatenate([late, early] if reverse else [early, late], axis=1)
    assert_close((joined, state), (h, h_last), 2e-6)
    flipped, _ = linear_scan(x[:, ::-1], a[:, ::-1], reverse=not reverse, implementation=name)
    assert_close((flipped[:, ::-1],), (h,), 2e-6)


def gated_arrays(length: int = 12) -> tuple[jax.Array, ...]:
    x, gate_x, gate_a = (draw((2, length, 3), jnp.float32, seed) for seed in range(3))
    return x, gate_x, gate_a, draw((3,), jnp.float32, 3) - 3, draw((2, 3), jnp.float32, 4)


@pytest.mark.parametrize(("reverse", "bad"), [(False, np.nan), (True, np.inf)])
@pytest.mark.parametrize("name", FAST)
def test_nothing_passes_a_reset(name: str, reverse: bool, bad: float) -> None:
    """Garbage in one segment changes neither results nor gradients of the other two, or of a_param."""
    reset = jnp.zeros((2, 12), bool).at[:, jnp.array([3, 7] if reverse else [4, 8])].set(True)
    segment = slice(4, 8)
    used = jnp.ones((2, 12, 1), bool).at[:, segment].set(False)
    *arrays, h0 = gated_arrays()

    def run(x: jax.Array, *others: jax.Array) -> tuple[jax.Array, jax.Array]:
        h, h_last = rglru_scan(x, *others, reset, reverse=reverse, implementation=name)
        return jnp.where(used, h, 0), h_last

    poisoned = [x.at[:, segment].set(bad) for x in arrays[:3]]
    both = with_gradients(run)
    clean, dirty = both(*arrays, h0), both(*poisoned, arrays[3], h0)
    for index, (c, d) in enumerate(zip(clean, dirty, strict=True)):
        np.testing.assert_array_equal(c, d, err_msg=f"result {index}")

    def plain(x: jax.Array, a: jax.Array, h0: jax.Array) -> tuple[jax.Array, jax.Array]:
        a = jnp.where(reset[..., None], 0, a)
        h, h_last = linear_scan(x, a, h0, reverse=reverse, implementation=name)
        return jnp.where(used, h, 0), h_last

    both = with_gradients(plain)
    clean, dirty = both(*arrays[:2], h0), both(*poisoned[:2], h0)
    for index, (c, d) in enumerate(zip(clean, dirty, strict=True)):
        np.testing.assert_array_equal(c, d, err_msg=f"result {index}")


@pytest.mark.parametrize("name", FAST)
def test_reset_equals_separate_sequences(name: str) -> None:
    x, gate_x, gate_a, a_param, h0 = gated_arrays()
    reset = jnp.zeros((2, 12), bool).at[:, 5].set(True)
    h, h_last = rglru_scan(x, gate_x, gate_a, a_param, h0, reset, implementation=name)
    start = jnp.zeros((2, 7), bool).at[:, 0].set(True)
    late = rglru_scan(x[:, 5:], gate_x[:, 5:], gate_a[:, 5:], a_param, None, start, implementation=name)
    assert_close((h[:, 5:], h_last), late, 1e-6)
    np.testing.assert_allclose(h[:, 5], jax.nn.sigmoid(gate_x[:, 5]) * x[:, 5], rtol=1e-6)


def test_a_near_one_keeps_its_digits() -> None:
    """1 - a^2 by expm1: with log a = -1e-9 the scale is 4.5e-5; 1 - exp(2 log a) in float32 would be 0."""
    a_param = jnp.full((1,), np.log(np.expm1(1e-9 / 4)), jnp.float32)
    one = jnp.ones((1, 1, 1))
    h, _ = rglru_scan(one, 50 * one, 0 * one, a_param)
    np.testing.assert_allclose(h[0, 0, 0], np.sqrt(2e-9), rtol=1e-5)
    gradient = jax.grad(lambda g: rglru_scan(one, 50 * one, g, a_param)[0].sum())(-200 * one)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ALL)
def test_log_decay(name: str) -> None:
    x, gate_x, gate_a, a_param, _ = gated_arrays()
    a = jnp.where(gate_x > 0, 0.5, -0.8) * (1 + 0.1 * gate_a)
    *_, total = linear_scan(x, a, return_decay=True, implementation=name)
    np.testing.assert_allclose(total, jnp.sum(jnp.log(jnp.abs(a)), axis=1), rtol=1e-6)
    weights = draw(total.shape, jnp.float32, 8)
    gradient = jax.grad(lambda a: jnp.sum(weights * linear_scan(x, a, return_decay=True)[2]))(a)
    np.testing.assert_allclose(gradient, weights[:, None] / a, rtol=1e-5)
    forgotten = linear_scan(x, a.at[0, 3, 1].set(0), return_decay=True)[2]
    assert forgotten[0, 1] == -jnp.inf
    assert np.isfinite(forgotten).sum() == forgotten.size - 1
    reset = jnp.zeros((2, 12), bool).at[1, 3].set(True)
    *_, total = rglru_scan(x, gate_x, gate_a, a_param, None, reset, return_decay=True, implementation=name)
    log_a = -8 * jax.nn.sigmoid(gate_a) * jax.nn.softplus(a_param)
    np.testing.assert_allclose(total[0], log_a[0].sum(0), rtol=1e-5)
    assert (total[1] == -jnp.inf).all()


@pytest.mark.parametrize("name", FAST)
def test_nothing_is_saved_but_inputs_and_states(name: str) -> None:
    """The pullback holds h, a, h0 (x is not needed); for the RG-LRU its inputs, h and h0."""
    x, gate_x, gate_a, a_param, h0 = gated_arrays()
    shape, size = x.shape, x.size
    scan = functools.partial(linear_scan, implementation=name)
    leaves = jax.tree.leaves(jax.jit(lambda *args: jax.vjp(scan, *args)[1])(x, gate_a, h0))
    assert sum(leaf.size for leaf in leaves) == 2 * size + h0.size, [leaf.shape for leaf in leaves]
    gated = functools.partial(rglru_scan, implementation=name)
    arguments = (x, gate_x, gate_a, a_param, h0)
    leaves = jax.tree.leaves(jax.jit(lambda *args: jax.vjp(gated, *args)[1])(*arguments))
    assert sum(leaf.size for leaf in leaves) == 4 * size + h0.size + 3, [leaf.shape for leaf in leaves]
    assert sorted(leaf.shape for leaf in leaves if leaf.ndim == 3) == [shape] * 4


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("name", FAST)
def test_gradients_where_only_one_result_is_used(name: str, used: int) -> None:
    """h alone, or h_last alone: the gradient of the other never exists as an array."""
    x, a, gate_x, gate_a = (draw((2, 5, 3), "float32", seed) for seed in range(4))
    a_param, h0 = draw((3,), "float32", 4), draw((2, 3), "float32", 5)

    def gradients(name: str) -> Any:
        def loss(x: Any, a: Any, gate_x: Any, gate_a: Any, a_param: Any, h0: Any) -> jax.Array:
            plain = linear_scan(x, a, h0, implementation=name)[used]
            gated = rglru_scan(x, gate_x, gate_a, a_param, implementation=name)[used]
            return (plain * gated).sum()

        return jax.jit(jax.grad(jax.checkpoint(loss), range(6)))(x, a, gate_x, gate_a, a_param, h0)

    assert_close(gradients(name), gradients("reference"), TOLERANCE["float32"])


@pytest.mark.parametrize("name", FAST)
def test_a_remat_policy_can_keep_the_states(name: str) -> None:
    x, gate_x, gate_a, a_param, h0 = gated_arrays()

    def scans(policy: Any) -> int:
        def loss(x: jax.Array) -> jax.Array:
            run = functools.partial(rglru_scan, implementation=name)
            h, _ = jax.checkpoint(run, policy=policy)(x, gate_x, gate_a, a_param, h0)
            return jnp.sum(h**2)

        return str(jax.make_jaxpr(jax.grad(loss))(x)).count("exp ")

    keep = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
    assert scans(keep) < scans(jax.checkpoint_policies.nothing_saveable)


@pytest.mark.parametrize("name", FAST)
def test_jit_and_remat_change_nothing(name: str) -> None:
    *arrays, h0 = gated_arrays(7)
    run = functools.partial(rglru_scan, implementation=name)
    wanted = with_gradients(run)(*arrays, h0)
    assert_close(with_gradients(jax.checkpoint(run))(*arrays, h0), wanted, 1e-6)
    assert_close(run(*arrays, h0), wanted[:2], 1e-6)


def program_lines(name: str, length: int) -> int:
    def loss(x: jax.Array, a: jax.Array) -> jax.Array:
        h, h_last = linear_scan(x, a, implementation=name)
        return jnp.sum(h**2) + jnp.sum(h_last)

    x = jax.ShapeDtypeStruct((1, length, 4), jnp.float32)
    return len(jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, x).as_text().splitlines())


def test_program_size_does_not_grow_with_time() -> None:
    assert program_lines("xla_scan", 64) == program_lines("xla_scan", 4096)
    assert program_lines("associative", 4096) <= 2.2 * program_lines(
        "associative", 64
    )  # log2: 12 levels to 6


def test_two_runs_are_bitwise_equal() -> None:
    arrays = gated_arrays()
    for name in FAST:
        run = functools.partial(rglru_scan, implementation=name)
        both = with_gradients(run)
        for first, second in zip(both(*arrays), both(*arrays), strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_slow_decay_over_many_steps(name: str) -> None:
    """Decays in [0.99, 0.9999], 8192 steps: float32 against float64."""
    x = np.random.default_rng(0).standard_normal((1, 8192, 16))
    a = np.random.default_rng(1).uniform(0.99, 0.9999, x.shape)
    x32, a32 = (jnp.asarray(part, jnp.float32) for part in (x, a))
    actual = with_gradients(functools.partial(linear_scan, implementation=name))(x32, a32)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(part, np.float64)) for part in (x32, a32)]
        out, pullback = jax.vjp(functools.partial(linear_scan, implementation="reference"), *exact)
        weights = [np.asarray(draw(o.shape, jnp.float64, 50 + i), np.float32) for i, o in enumerate(out)]
        wanted = [*out, *pullback(tuple(jnp.asarray(w, jnp.float64) for w in weights))]
        for index, (found, right) in enumerate(zip(actual, wanted, strict=True)):
            error = np.abs(np.asarray(found) - right).max() / np.abs(right).max()
            assert error < 2e-5, f"result {index}: {error:.1e}"
