"""Every model: parameters with axes, a step that learns, and switches of the runtime that change nothing.

Cases come from tests/models/<room>/contract_cases.py (see state_test.py).
"""

import functools

import jax
import numpy as np
import pytest

from models.common.params import flatten_names
from tests.contracts.model_cases import named_cases, rooms_with_cases

# Where only values matter, not bits: half the compile time.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


CASES = named_cases(rooms_with_cases())


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def test_every_parameter_has_its_axes(case):
    flat, axes = flatten_names(case.params), flatten_names(case.axes)
    assert flat.keys() == axes.keys()
    for name, leaf in flat.items():
        assert len(axes[name]) == leaf.ndim, name


def test_gradient_reaches_every_parameter_and_a_step_learns(case):
    x = case.inputs(2, 12)
    step = jax.jit(jax.value_and_grad(case.loss), compiler_options=QUICK_COMPILE)
    before, grads = step(case.params, x)
    for name, grad in flatten_names(grads).items():
        assert np.isfinite(grad).all(), name
        assert np.abs(grad).max() > 0, f"no gradient for {name}"
    after, _ = step(jax.tree.map(lambda p, g: p - 1e-2 * g, case.params, grads), x)
    assert after < before


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.close])
def test_ways_to_run_agree(name, subtests):
    case = CASES[name]
    x = case.inputs(2, 12)
    step = jax.value_and_grad(case.loss)
    expected_loss, expected = jax.jit(step, compiler_options=QUICK_COMPILE)(case.params, x)
    for title, run in case.close.items():
        with subtests.test(title):
            step = jax.value_and_grad(functools.partial(case.loss, run=run))
            loss, grads = jax.jit(step, compiler_options=QUICK_COMPILE)(case.params, x)
            np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
            flat = flatten_names(grads)
            for key, grad in flatten_names(expected).items():
                np.testing.assert_allclose(flat[key], grad, atol=1e-6, err_msg=key)


def check_bitwise(case, pairs, subtests):
    """A resumed run may switch from one to the other: loss and gradients must be the same, bit for bit.

    64 tokens: differences in fusion and memory order do not show in shorter sums.
    """
    x = case.inputs(2, 64)
    for name, pair in pairs.items():
        with subtests.test(name):
            steps = [jax.jit(jax.value_and_grad(functools.partial(case.loss, run=run))) for run in pair]
            (loss, grads), (other_loss, other_grads) = (step(case.params, x) for step in steps)
            np.testing.assert_array_equal(other_loss, loss)
            flat = flatten_names(other_grads)
            for key, grad in flatten_names(grads).items():
                np.testing.assert_array_equal(flat[key], grad, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exact])
def test_switches_change_no_bit(name, subtests):
    check_bitwise(CASES[name], CASES[name].exact, subtests)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.slow_exact])
def test_combined_switches_change_no_bit(name, subtests):
    check_bitwise(CASES[name], CASES[name].slow_exact, subtests)
