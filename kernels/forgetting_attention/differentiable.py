"""What implementations share around their passes: gradients, vmap and the names remat policies know.

An implementation is a forward and a backward pass over `Operands`; this module makes differentiable functions
of them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kernels.common.manual import aligned_varying
from kernels.forgetting_attention.config import RESIDUAL_NAMES
from kernels.forgetting_attention.operands import Operands, Static, attention_operands, partial_operands


class Saved(NamedTuple):
    """Residuals of the forward pass: linear in T and S."""

    operands: Operands
    out: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"]


class Passes(NamedTuple):
    """An implementation.

    Attributes:
      forward: (operands, static) -> (out [B, T, N, H] in q's dtype, lse [B, T, N], -inf on dead rows).
      backward: ((saved, d_out, d_lse), static) -> gradients by operand name: q, k, v, row_hi, col_hi.
    """

    forward: Callable[[Operands, Static], tuple[Array, Array]]
    backward: Callable[[tuple[Saved, Array, Array], Static], dict[str, Array]]


def attention(*args: Any, passes: Passes, **options: Any) -> tuple[Array, Array]:
    """`forgetting_attention` after its checks; returns (out, lse)."""
    return _attend(*attention_operands(*args, **options), passes)


def partial(*args: Any, passes: Passes, **options: Any) -> tuple[Array, Array]:
    """`attend_partial` after its checks; returns (out, lse)."""
    return _attend(*partial_operands(*args, **options), passes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(operands: Operands, static: Static, passes: Passes) -> tuple[Array, Array]:
    return _folded(passes.forward, static)(operands)


def _attend_fwd(operands: Operands, static: Static, passes: Passes) -> tuple[tuple[Array, Array], Saved]:
    out, lse = _folded(passes.forward, static)(operands)
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), RESIDUAL_NAMES, strict=True))
    return (out, lse), Saved(operands, out, lse)


def _attend_bwd(
    static: Static, passes: Passes, saved: Saved, cotangents: tuple[Array, Array]
) -> tuple[Operands]:
    grads = _folded(passes.backward, static)((saved, *cotangents))
    nothing = Operands(*([None] * len(Operands._fields)))  # type: ignore[arg-type]
    return (nothing._replace(**grads),)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _folded(function: Any, static: Static) -> Any:
    """`function` with a vmap rule that folds the mapped axis into the batch, so every entry skips its own
    tiles.
    """

    @jax.custom_batching.custom_vmap
    def call(operands: Any) -> Any:
        # What a Pallas kernel returns has forgotten over which manual mesh axes its operands vary.
        return aligned_varying((function(operands, static), operands))[0]

    @call.def_vmap
    def rule(axis_size: int, in_batched: list[Any], operands: Any) -> tuple[Any, Any]:
        def fold(x: Any, batched: bool) -> Array:
            x = jnp.asarray(x)  # constants arrive as literals
            x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(axis_size * x.shape[1], *x.shape[2:])

        results = call(jax.tree.map(fold, operands, in_batched[0]))
        unfold = lambda x: x.reshape(axis_size, -1, *x.shape[1:])  # noqa: E731
        return jax.tree.map(unfold, results), jax.tree.map(lambda _: True, results)

    return call
