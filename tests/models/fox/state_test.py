"""FoX's decode cache beyond the state contract: padding, overflow, rewinding, eviction, gate sums."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common.numerics import add_pairs
from models.fox import FoxConfig, apply, init_state
from tests.models.fox.small_fox import VOCAB, random_params, run, runtime, tokens

PRO = dataclasses.replace(FoxConfig.preset("fox_pro", "tiny", vocab_size=VOCAB), num_layers=1)


def test_padding_over_several_chunks_is_never_stored():
    """Rows with 0, 4 and 7 pads: in chunks of 3 a row may be nothing but padding for two calls."""
    x, params, pads = tokens(3, 9), random_params(PRO), np.array([0, 4, 7])
    mask = np.arange(9)[None] >= pads[:, None]
    state = init_state(PRO, 3, 12)
    outputs = []
    for part in (slice(0, 3), slice(3, 6), slice(6, 9)):
        y, state = run(PRO, runtime(), params, x[:, part], state, mask=jnp.asarray(mask[:, part]))
        outputs.append(y)
    y = np.concatenate(outputs, axis=1)
    np.testing.assert_array_equal(state.length, 9 - pads)
    whole, _ = run(PRO, runtime(), params, x, mask=jnp.asarray(mask))
    np.testing.assert_allclose(y[mask], whole[mask], atol=2e-5)
    stored = np.asarray(state.layers["0"].k)
    assert not stored[2, 2:].any(), "slots beyond the document are untouched"


def test_overflow_poisons_its_own_tokens_only():
    params, x = random_params(PRO), tokens(2, 8)
    state = init_state(PRO, 2, 5)
    reset = jnp.zeros((2, 8), bool).at[1, 4].set(True)
    expected, _ = run(PRO, runtime(), params, x, reset=reset)
    first, state = run(PRO, runtime(), params, x[:, :4], state, reset[:, :4])
    second, state = run(PRO, runtime(), params, x[:, 4:], state, reset[:, 4:])
    y = np.concatenate([first, second], axis=1)
    np.testing.assert_array_equal(np.isnan(y).all(-1), np.isnan(y).any(-1))
    np.testing.assert_array_equal(np.isnan(y[..., 0]), [[0] * 5 + [1] * 3, [0] * 8])
    finite = ~np.isnan(y)
    np.testing.assert_allclose(y[finite], np.asarray(expected)[finite], atol=2e-5)
    # The poisoned row stays poisoned, and a new document heals it.
    again, state = run(PRO, runtime(), params, x[:, :1], state)
    assert np.isnan(again[0]).all()
    healed, state = run(PRO, runtime(), params, x[:, :1], state, jnp.ones((2, 1), bool))
    fresh, _ = run(PRO, runtime(), params, x[:, :1])
    np.testing.assert_allclose(healed, fresh, atol=2e-5)
    np.testing.assert_array_equal(state.length, 1)


def test_overflow_raises_where_lengths_are_known():
    params, x = random_params(PRO), tokens(2, 4)
    _, state = run(PRO, runtime(), params, x, init_state(PRO, 2, 5))
    with pytest.raises(
        ValueError, match=r"documents of rows \[0, 1\] are longer than the state's max_length = 5"
    ):
        apply(PRO, runtime(), params, x[:, :2], state)


def test_malformed_padding_under_jit_is_nan_in_that_row():
    mask = jnp.array([[False, True, True], [True, False, True]])
    logits, _ = run(PRO, runtime(), random_params(PRO), tokens(2, 3), mask=mask)
    np.testing.assert_array_equal(np.isnan(logits).any(axis=(1, 2)), [False, True])


@functools.cache
def forgetful_params():
    """Head 0 forgets a factor e^4 per token, head 1 nearly nothing; weak norms give a threshold near -22."""
    params = jax.tree.map(lambda p: p, random_params(PRO))
    attn = params["layers"]["0"]["attn"]
    attn["fgate_proj"]["kernel"] = jnp.zeros_like(attn["fgate_proj"]["kernel"])
    attn["fgate_proj"]["bias"] = jnp.array([-4.0, 9.0])
    for norm in ("q_norm", "k_norm"):
        attn[norm]["scale"] = jnp.ones_like(attn[norm]["scale"])
    return params


def test_eviction_follows_the_threshold_and_pruned_keys_are_not_read():
    params, x, pruning = forgetful_params(), tokens(1, 16), runtime(log_pruning_tolerance=-10.0)
    exact, _ = run(PRO, runtime(), params, x)
    state, outputs = init_state(PRO, 1, 20), []
    log_f = float(jax.nn.log_sigmoid(-4.0))
    threshold = -(2 * 4 + np.log(20)) - 10  # sqrt(16) = 4 bounds the scores; L is the buffer's length
    for t in range(16):
        y, state = run(PRO, pruning, params, x[:, t : t + 1], state)
        outputs.append(y)
        first_kept = np.asarray(state.layers["0"].gates.first_kept)
        # Slot j is pruned after token t once (t - j) log f < threshold.
        assert first_kept.tolist() == [[max(0, t - int(threshold / log_f)), 0]]
        # What is pruned may be given away: overwrite it.
        layer = state.layers["0"]
        gone = np.arange(20)[None, :, None] < first_kept[:, None, :]
        layer = layer._replace(
            k=jnp.where(gone[..., None], 1e3, layer.k), v=jnp.where(gone[..., None], 1e3, layer.v)
        )
        state = state._replace(layers={"0": layer})
    assert first_kept[0, 0] > 5
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), exact, atol=1e-3)


def test_no_eviction_without_a_bound_that_lasts():
    """The rules that look at q and k hold for one call; a later, longer query could need the key."""
    for mode in ("auto", "tight"):
        pruning = runtime(log_pruning_tolerance=-10.0, adaptive_threshold=mode)
        _, state = run(PRO, pruning, forgetful_params(), tokens(1, 16), init_state(PRO, 1, 20))
        np.testing.assert_array_equal(state.layers["0"].gates.first_kept, 0)


def test_eviction_starts_anew_with_a_document():
    pruning, params = runtime(log_pruning_tolerance=-10.0), forgetful_params()
    _, state = run(PRO, pruning, params, tokens(1, 16), init_state(PRO, 1, 20))
    assert int(state.layers["0"].gates.first_kept[0, 0]) > 5
    _, state = run(PRO, pruning, params, tokens(1, 1), state, jnp.array([[True]]))
    np.testing.assert_array_equal(state.layers["0"].gates.first_kept, 0)
    np.testing.assert_array_equal(state.length, 1)


def test_gate_sums_stay_accurate_over_many_steps():
    """100k gates added one by one: the hi/lo pair keeps what a float32 running sum loses."""
    gates = -np.random.default_rng(0).uniform(1, 9, 100_000).astype(np.float32)

    def step(total, gate):
        pair = add_pairs(total[:2], (gate, jnp.zeros_like(gate)))
        return (*pair, total[2] + gate), None

    hi, lo, plain = jax.jit(lambda g: jax.lax.scan(step, (jnp.zeros(()),) * 3, g)[0])(gates)
    exact = gates.astype(np.float64).sum()
    error, plain_error = (abs(value - exact) for value in (float(hi) + float(lo), float(plain)))
    assert plain_error > 0.1
    assert error < 1e-4


def test_a_step_sums_no_gates_again():
    """The program of a single step holds no cumulative sum over the buffer."""
    state = init_state(PRO, 1, 4096)
    program = jax.make_jaxpr(lambda p, x, s: apply(PRO, runtime(), p, x, s))(
        random_params(PRO), tokens(1, 1), state
    )
    text = str(program)
    assert "4096" in text
    for primitive in ("cumsum", "cumlogsumexp", "associative_scan", "reduce_window_sum"):
        for line in text.splitlines():
            assert not (f"{primitive}[" in line and "4096" in line), line


def test_states_of_plain_transformers_hold_no_gates():
    config = FoxConfig.preset("transformer_llama", "tiny", vocab_size=VOCAB)
    layer = init_state(config, 2, 8, jnp.bfloat16).layers["1"]
    assert (layer.gates, layer.last_k, layer.last_v) == (None, None, None)
    assert layer.k.shape == (2, 8, 2, 16)
    assert layer.k.dtype == jnp.bfloat16
