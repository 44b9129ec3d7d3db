"""Bad arguments: each gets an error that names it; values are looked at only when they are known."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kernels.forgetting_attention import (
    TileConfig,
    attend_partial,
    check_values,
    explain,
    forgetting_attention,
    threshold_from_bound,
)

pytestmark = pytest.mark.usefixtures("unchecked_types")


def call(**changes: Any) -> dict[str, Any]:
    arrays = {
        "q": jnp.zeros((2, 6, 4, 8)),
        "k": jnp.zeros((2, 9, 2, 8)),
        "v": jnp.zeros((2, 9, 2, 8)),
        "log_fgate": jnp.full((2, 9, 4), -0.1),
    }
    return {**arrays, **changes}


BAD = {
    "q has no batch": ({"q": jnp.zeros((6, 4, 8))}, "q must have 4 axes"),
    "integer q": ({"q": jnp.zeros((2, 6, 4, 8), int)}, "q has dtype int32"),
    "mixed dtypes": ({"k": jnp.zeros((2, 9, 2, 8), jnp.bfloat16)}, "k has dtype bfloat16 but q has float32"),
    "v unlike k": ({"v": jnp.zeros((2, 8, 2, 8))}, "v must have the shape of k"),
    "head groups": ({"q": jnp.zeros((2, 6, 3, 8))}, "must be a multiple of the number of key/value heads"),
    "head dims": ({"q": jnp.zeros((2, 6, 4, 4))}, "k has head_dim 8 but q has 4"),
    "batch": ({"q": jnp.zeros((1, 6, 4, 8))}, "k has batch size 2 but q has 1"),
    "empty": ({"q": jnp.zeros((2, 0, 4, 8))}, "q has an empty axis"),
    "more queries than keys": ({"q": jnp.zeros((2, 10, 4, 8))}, "T <= S is needed"),
    "half-precision gates": ({"log_fgate": jnp.zeros((2, 9, 4), jnp.bfloat16)}, "log_fgate must be float32"),
    "gate shape": ({"log_fgate": jnp.zeros((2, 9, 2))}, r"log_fgate must have shape \(2, 9, 4\)"),
    "positive gate": ({"log_fgate": jnp.zeros((2, 9, 4)).at[1, 3, 2].set(0.5)}, "log_fgate must be <= 0"),
    "positive threshold": ({"adaptive_threshold": 0.5}, "adaptive_threshold must be <= 0"),
    "unknown threshold": ({"adaptive_threshold": "always"}, "adaptive_threshold='always' is not known"),
    "threshold shape": (
        {"adaptive_threshold": -jnp.ones((3, 4))},
        r"broadcast to \[batch, heads\] = \[2, 4\]",
    ),
    "tolerance": (
        {"adaptive_threshold": "auto", "log_pruning_tolerance": 1.0},
        "must be <= 0; got 1.0",
    ),
    "float seq_start": ({"seq_start": jnp.zeros(2)}, "seq_start must have an integer dtype"),
    "seq_start range": ({"seq_start": jnp.asarray([0, 10])}, r"seq_start must lie in \[0, 9\]"),
    "kv_length range": ({"kv_length": jnp.asarray([-1, 9])}, r"kv_length must lie in \[0, 9\]"),
    "segment shape": ({"segment_ids": jnp.zeros((2, 6), int)}, r"segment_ids must have shape \(2, 9\)"),
    "scale": ({"sm_scale": float("nan")}, "sm_scale must be a finite number"),
    "implementation": ({"implementation": "fastest"}, "'fastest' does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        forgetting_attention(**call(**changes))


def test_partial_refuses_half_given_options() -> None:
    arrays = call()
    gates = arrays.pop("log_fgate")
    decays = {"row_decay": gates[:, :6], "col_decay": gates}
    with pytest.raises(ValueError, match="must be given together"):
        attend_partial(**arrays, **decays, segment_ids=jnp.zeros((2, 9), int))
    with pytest.raises(ValueError, match="only meaningful with causal"):
        attend_partial(**arrays, **decays, query_offset=3)
    with pytest.raises(ValueError, match="'auto' needs the whole"):
        attend_partial(**arrays, **decays, adaptive_threshold="auto")


def test_values_are_not_looked_at_while_tracing() -> None:
    jax.eval_shape(lambda g: forgetting_attention(**call(log_fgate=g)), jnp.ones((2, 9, 4)))


def test_check_values_works_inside_jit() -> None:
    check_values(jnp.full((1, 2, 1), -1.0), -3.0)
    with pytest.raises(ValueError, match="log_fgate must be <= 0"):
        check_values(jnp.ones((1, 2, 1)))

    @jax.jit
    def step(gates: jax.Array, threshold: jax.Array) -> jax.Array:
        check_values(gates, threshold)
        return gates.sum()

    step(jnp.full((1, 2, 1), -1.0), jnp.float32(-1)).block_until_ready()
    jax.effects_barrier()

    def run_to_the_end() -> None:
        step(jnp.full((1, 2, 1), -1.0), jnp.float32(1)).block_until_ready()
        jax.effects_barrier()

    with pytest.raises(Exception, match="adaptive_threshold must be <= 0"):
        run_to_the_end()


def test_tiles_are_validated() -> None:
    with pytest.raises(ValueError, match="backward_kv must be"):
        TileConfig(backward_kv=(0, 16))
    with pytest.raises(ValueError, match="heads_per_step"):
        TileConfig(heads_per_step=0)


def test_threshold_from_bound_is_validated() -> None:
    with pytest.raises(ValueError, match="must be <= 0"):
        threshold_from_bound(jnp.ones(2), num_keys=4, log_pruning_tolerance=0.1)
    with pytest.raises(ValueError, match="num_keys"):
        threshold_from_bound(jnp.ones(2), num_keys=0)


def test_explain_reads_only_shapes() -> None:
    q = jax.ShapeDtypeStruct((1, 64, 4, 64), jnp.bfloat16)
    text = explain(q, q, adaptive_threshold="tight")
    assert "pruning=tight" in text
    assert "xla_chunked" in text
