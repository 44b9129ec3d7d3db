"""Filters checked exactly, draws against the probabilities they should have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tasks.lm.sampling import NOT_A_TOKEN, Sampling, filter_logits, sample, step_keys


def keys_of(seed, rows, index):
    return step_keys(jax.random.key(seed), jnp.arange(rows), index)


LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.3, 0.2]]))


def kept(logits, **options):
    filtered = np.asarray(filter_logits(jnp.asarray(logits), Sampling(**options)))
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in filtered]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 0}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 2]),
        ({"top_p": 0.69}, [1, 2]),
        ({"top_p": 0.71}, [1, 2, 3]),
        ({"top_p": 0.95}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.5}, [1]),  # of the two kept, the first has 4/7 > 0.5
        ({"top_k": 2, "top_p": 0.6}, [1, 2]),
        ({"temperature": 0.5, "top_p": 0.5}, [1]),  # 0.16 / 0.30 > 0.5
        ({"temperature": 0.0}, [1]),
        ({"greedy": True, "top_k": 3}, [1]),
    ],
)
def test_filters_keep_exactly_these_tokens(options, expected):
    assert kept(LOGITS, **options) == [expected]


def test_ties_are_broken_by_the_lower_id():
    equal = [[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 2.0]]
    assert kept(equal, top_k=2) == [[0, 1], [1, 2]]
    assert kept(equal, top_p=0.5)[0] == [0, 1]  # exactly half: two of four equals suffice
    keys = keys_of(0, 2, 0)
    np.testing.assert_array_equal(sample(jnp.asarray(equal), keys, Sampling(greedy=True)), [0, 1])


def test_kept_tokens_keep_their_relative_weights():
    filtered = filter_logits(LOGITS, Sampling(temperature=2.0, top_k=3))
    weights = np.sqrt([0.4, 0.3, 0.2])
    np.testing.assert_allclose(jax.nn.softmax(filtered)[0, 1:], weights / weights.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.3, 0.2]),
        ({"temperature": 0.5}, np.square([0.1, 0.4, 0.3, 0.2]) / 0.3),
        ({"top_k": 2}, [0, 4 / 7, 3 / 7, 0]),
        ({"top_p": 0.8}, [0, 4 / 9, 3 / 9, 2 / 9]),
    ],
)
def test_draws_follow_the_distribution(options, expected):
    rows = 20000
    ids = sample(jnp.tile(LOGITS, (rows, 1)), keys_of(7, rows, 0), Sampling(**options))
    counts = np.bincount(ids, minlength=4)
    expected = np.asarray(expected) * rows
    assert not counts[expected == 0].any()
    live = expected > 0
    chi_square = np.sum((counts - expected)[live] ** 2 / expected[live])
    assert chi_square < 16.3  # the 0.1 % point for three degrees of freedom


def test_extreme_temperatures_and_masked_logits_stay_finite():
    keys = keys_of(0, 1, 0)
    for temperature in (1e-38, 1e-45, 1e-3):
        assert sample(LOGITS * 1e4, keys, Sampling(temperature=temperature))[0] == 1
    masked = LOGITS.at[0, 1].set(-jnp.inf)
    assert kept(masked, top_p=0.99) == [[0, 2, 3]]
    assert kept(masked, top_k=3) == [[0, 2, 3]]
    uniform = np.bincount(sample(jnp.tile(LOGITS, (4000, 1)), keys_of(1, 4000, 0), Sampling(temperature=1e6)))
    np.testing.assert_allclose(uniform / 4000, 0.25, atol=0.03)


@pytest.mark.parametrize("options", [{"greedy": True}, {}, {"top_p": 0.5}, {"top_k": 2}])
def test_unusable_rows_are_marked_and_the_others_unharmed(options):
    bad = jnp.full((1, 4), -jnp.inf)
    logits = jnp.concatenate([LOGITS, LOGITS.at[0, 2].set(jnp.nan), bad, LOGITS.at[0, 1].set(jnp.inf)])
    ids = sample(logits, keys_of(3, 4, 0), Sampling(**options))
    assert ids[0] == sample(LOGITS, keys_of(3, 1, 0), Sampling(**options))[0] >= 0
    np.testing.assert_array_equal(ids[1:], [NOT_A_TOKEN] * 3)


def test_a_rows_draw_depends_on_seed_row_and_step_alone():
    logits = jnp.zeros((3, 1000))

    def draw(seed, rows, index):
        return np.asarray(sample(logits[:rows], keys_of(seed, rows, index), Sampling()))

    np.testing.assert_array_equal(draw(5, 3, 2), draw(5, 3, 2))
    np.testing.assert_array_equal(draw(5, 3, 2)[:2], draw(5, 2, 2))
    assert len(set(draw(5, 3, 2))) == 3
    assert set(draw(5, 3, 2)).isdisjoint(draw(5, 3, 3))
    assert set(draw(5, 3, 2)).isdisjoint(draw(6, 3, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"top_p": float("nan")}, "top_p must be in"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
