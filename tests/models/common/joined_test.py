"""Joined parameters: what layers make of them is what they make of the canonical ones, up to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common import vit
from models.common.block_diagonal import pre_activations
from models.common.joined import expected_shapes, is_joined, join_params
from models.common.params import flatten_names
from models.common.recurrent_state import init_recurrent_state
from models.common.rglru import residual_block, residual_block_specs, rg_lru, rg_lru_specs
from tests.models.common.rglru_test import QUICK_COMPILE, B, D, E, G, P, normal, random_tree

SPECS = residual_block_specs(D, E, G, 3, num_layers=2, min_rad=0.5, channel_mlp_size=10)
PARAMS = random_tree(SPECS)


def test_names_and_shapes_are_joined():
    joined = {name: leaf.shape for name, leaf in flatten_names(join_params(PARAMS)).items()}
    gone = (
        "recurrent/linear_x/",
        "recurrent/linear_y/",
        "rglru/input_gate/",
        "rglru/a_gate/",
        "channel_mlp/up/",
    )
    for name, leaf in flatten_names(PARAMS).items():
        assert (name in joined) != any(group in name for group in gone), name
        assert joined.get(name, leaf.shape) == leaf.shape
    assert joined["recurrent/linear_x+linear_y/kernel"] == (D, 2 * E)
    assert joined["recurrent/rglru/input_gate+a_gate/kernel"] == (E, 2 * E)
    assert joined["recurrent/rglru/input_gate+a_gate/bias"] == (2 * E,)
    assert joined["channel_mlp/gate+value/kernel"] == (D, 20)
    assert joined["recurrent/rglru/rate"] == joined["recurrent/rglru/a_param"] == (E,)


def test_expected_shapes_follow_the_form_of_the_parameters():
    joined = join_params(PARAMS)
    assert (is_joined(PARAMS), is_joined(joined)) == (False, True)
    for params in (PARAMS, joined):
        found = {name: leaf.shape for name, leaf in flatten_names(params).items()}
        assert {name: spec.shape for name, spec in expected_shapes(SPECS, params).items()} == found
    again = jax.tree.leaves(join_params(joined))
    assert all(one is other for one, other in zip(again, jax.tree.leaves(joined), strict=True))


@pytest.mark.parametrize("frames", [1, 4])
def test_a_block_gives_the_same(frames):
    """In one frame and in several, with memory, at starts and after them."""
    step = jax.jit(residual_block, compiler_options=QUICK_COMPILE)
    x, positions = normal(B, frames, P, D), jnp.arange(frames)[None] + jnp.array([[0], [7]])
    state = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=3), init_recurrent_state(B, E, 3, (P,)))
    expected = step(x, PARAMS, positions, state)
    found = step(x, join_params(PARAMS), positions, state)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6)


def test_the_complex_recurrence_gives_the_same():
    params = random_tree(rg_lru_specs(E, G, 0.5, real=False))
    x, positions, h = normal(B, 1, P, E), jnp.array([[0], [7]]), normal(B, P, E, seed=2)
    for one, other in zip(
        rg_lru(x, join_params(params), positions, h), rg_lru(x, params, positions, h), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.parametrize("frames", [1, 2])
def test_gates_leave_their_product_in_float32(frames):
    """From bfloat16 operands: next to saturated gates the difference to 1 must survive."""
    x, params = normal(B, frames, P, E).astype(jnp.bfloat16), PARAMS["recurrent"]["rglru"]
    expected = pre_activations(x, params, "bfloat16")
    for gate, other in zip(pre_activations(x, join_params(params), "bfloat16"), expected, strict=True):
        assert gate.dtype == jnp.float32
        np.testing.assert_allclose(gate, other, atol=2e-6)
    assert np.abs(expected[0] - expected[0].astype(jnp.bfloat16)).max() > 1e-3


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("asked", [None, 2])
def test_attention_gives_the_same(monkeypatch, few, asked):
    """Of few rows by one product, of many by three; of the last tokens only, with a mask that they see by."""
    if not few:
        monkeypatch.setattr(vit, "FEW_ROWS", 3 * 5 - 1)
    params = random_tree(vit.vit_block_specs(8, 12, 2))
    joined = join_params(params)
    names = {name for name in flatten_names(joined) if name.startswith("attn/")}
    assert names == {
        f"attn/{m}/{leaf}" for m in ("q_proj+k_proj+v_proj", "out_proj") for leaf in ("kernel", "bias")
    }
    x, mask = normal(3, 5, 8), jnp.asarray(np.tril(np.ones((3, 5, 5), bool)))

    def attend(x, params):
        return vit.attention(x, params, 2, "float32", mask=mask, asked=asked)

    expected = attend(x, params["attn"])
    assert expected.shape == (3, asked or 5, 8)
    np.testing.assert_allclose(attend(x, joined["attn"]), expected, atol=2e-6)
    products = [str(jax.make_jaxpr(attend)(x, p["attn"])).count("dot_general") for p in (joined, params)]
    assert products[0] == products[1] - (2 if few else 0)
