"""Public functions of the linear scans: argument checks and choice of implementation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from kernels.common.dispatch import check_sizes, choose, explain_choice, refuse_pruning, target
from kernels.linear_scan import (
    arguments,
    associative,
    pallas_mosaic_gpu,
    pallas_mosaic_tpu,
    reference,
    xla_scan,
)
from kernels.linear_scan.arguments import COMPLEX_DTYPES, REAL_DTYPES
from kernels.linear_scan.config import Request
from kernels.linear_scan.differentiable import Passes
from kernels.linear_scan.products import carry_dtype
from kernels.linear_scan.rglru import Gated, total_log_decay, wide_dtype


class ScanImplementation(NamedTuple):
    """An implementation: whether it can take a call, its two differentiable entry points, and the passes that
    they are made of (None if JAX differentiates it).
    """

    supports: Callable[[Request], str | None]
    linear_scan: Callable[..., tuple[Array, Array]]
    rglru_scan: Callable[..., tuple[Array, Array]]
    passes: Passes | None


IMPLEMENTATIONS: Mapping[str, ScanImplementation] = {
    name: ScanImplementation(
        module.supports, module.linear_scan, module.rglru_scan, getattr(module, "PASSES", None)
    )
    for name, module in (
        ("pallas_mosaic_gpu", pallas_mosaic_gpu),
        ("pallas_mosaic_tpu", pallas_mosaic_tpu),
        ("xla_scan", xla_scan),
        ("associative", associative),
        ("reference", reference),
    )
}
# Automatic choice by platform, best first, as measured (README.md). A loop over time suits CPUs; where
# starting a step costs more than its work, log2(T) large steps do. `reference` is never chosen.
PREFERENCE = {
    "cpu": ("xla_scan", "associative"),
    "gpu": ("pallas_mosaic_gpu", "associative", "xla_scan"),
    "tpu": ("pallas_mosaic_tpu", "associative", "xla_scan"),
}


def linear_scan(
    x: Inexact[Array, "B T D"],
    a: Inexact[Array, "B T D"],
    h0: Inexact[Array, "B D"] | None = None,
    *,
    reverse: bool = False,
    return_decay: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Inexact[Array, "B ... D"], ...]:
    """The linear recurrence h_t = a_t h_(t-1) + x_t, elementwise, over axis 1.

    The state is carried in float32 (float64 if x or a is float64, complex if x is). a = 0 is a reset: what
    came before, even NaN or infinity, does not pass it, forwards or backwards. Differentiable in x, a and h0,
    saving h, a and h0 only.

    Args:
      x: inputs.
      a: decays, of any float dtype; prefer float32, as bfloat16 rounds 0.998 to 1. Complex only if x is.
      h0: state before the first step, in the carry's dtype; zeros if None.
      reverse: time runs from T - 1 to 0; h0 enters at T - 1 and h_last is the state at 0.
      return_decay: also return the sum over time of log |a|.
      implementation: None (automatic), a name (that one or an error), or names tried in order. One step
        (T = 1) is a closed form in all of them.

    Returns:
      (h, h_last), with log_decay if asked for: h in x's dtype, h_last [B, D] in the carry's dtype, log_decay
      [B, D] real and wide, -inf if some a is 0. It is differentiable where a is not 0.

    Raises:
      ValueError: an argument has a wrong shape or dtype; the message names it.
    """
    op = "linear_scan"
    arguments.check_linear(op, x, a)
    arguments.check_time_is_whole(op, x)
    arguments.check_state(op, h0, (x.shape[0], x.shape[2]), carry_dtype(x, a))
    call = request(op, x, a, reverse=reverse, has_state=h0 is not None)
    _, chosen = choose(op, IMPLEMENTATIONS, call, implementation, preference(call))
    h, h_last = chosen.linear_scan(x, a, h0, reverse=reverse)
    return (h, h_last, _total_log(a)) if return_decay else (h, h_last)


def rglru_scan(
    x: Float[Array, "B T D"],
    gate_x: Float[Array, "B T D"],
    gate_a: Float[Array, "B T D"],
    a_param: Float[Array, " D"],
    h0: Float[Array, "B D"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    reverse: bool = False,
    return_decay: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "B ... D"], ...]:
    """The RG-LRU from its gates' pre-activations on (Griffin, arXiv 2402.19427, section 2.4).

    i = sigmoid(gate_x), log a = -8 sigmoid(gate_a) softplus(a_param), h_t = a_t h_(t-1) + sqrt(1 - a_t^2)
    (i_t x_t). At a reset the state is dropped and the input enters unscaled: h_t = i_t x_t. Gates, a and the
    state are float32 (float64 if x or a gate is float64), whatever the inputs' dtypes. The derivative of the
    square root is clipped at 1000. Differentiable in everything but reset; saves its inputs and h, and
    computes the gates again in the backward pass.

    Args:
      x: inputs.
      gate_x, gate_a: pre-activations of the input gate and the recurrence gate, of any float dtype.
      a_param: Lambda; softplus(a_param) is the decay rate.
      h0: state before the first step, float32 (float64 as above); zeros if None.
      reset: where a segment starts. A first step without a reset is scaled by sqrt(1 - a^2), also from
        state 0. With `reverse` a segment starts at its last step.
      reverse, return_decay, implementation: as in `linear_scan`.

    Returns:
      (h, h_last), with log_decay [B, D] if asked for: -inf after a reset (without a gradient).

    Raises:
      ValueError: an argument has a wrong shape or dtype; the message names it.
    """
    op = "rglru_scan"
    arguments.check_gated(op, x, gate_x, gate_a, a_param, reset)
    arguments.check_time_is_whole(op, x)
    arguments.check_state(op, h0, (x.shape[0], x.shape[2]), wide_dtype(x, gate_x, gate_a))
    call = request(op, x, gate_a, reverse=reverse, has_state=h0 is not None, has_reset=reset is not None)
    _, chosen = choose(op, IMPLEMENTATIONS, call, implementation, preference(call))
    gated = Gated(x, gate_x, gate_a, a_param, reset)
    h, h_last = chosen.rglru_scan(gated, h0, reverse=reverse)
    return (h, h_last, total_log_decay(gated)) if return_decay else (h, h_last)


def explain(
    x: Array | jax.ShapeDtypeStruct,
    a: Array | jax.ShapeDtypeStruct | None = None,
    *,
    op: str = "linear_scan",
    reverse: bool = False,
    has_state: bool = False,
    has_reset: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> str:
    """Says which implementation would run for such arguments, and why not the others.

    Arrays may be `jax.ShapeDtypeStruct`s: only shapes and dtypes are read.

    Args:
      x: as in the call.
      a: the decay (of `rglru_scan`: gate_a); like x if None.
      op: "linear_scan" or "rglru_scan".
      reverse: as in the call.
      has_state, has_reset: whether h0 and reset are given.
      implementation: as in the call.
    """
    arguments.check_sequence(op, x, (*REAL_DTYPES, *COMPLEX_DTYPES))
    flags = {"reverse": reverse, "has_state": has_state, "has_reset": has_reset}
    call = request(op, x, x if a is None else a, **flags)
    return explain_choice(op, IMPLEMENTATIONS, call, implementation, preference(call))


def explain_shape(
    sizes: Mapping[str, int],
    dtype: str,
    *,
    pruning: str | None = None,
    implementation: str | Sequence[str] | None = None,
) -> str:
    """`explain` from sizes by letter (B, T, D; the rest is default) for both ops, for the command line.

    Raises:
      ValueError: a letter is not a size of this op, or pruning is asked for.
    """
    check_sizes("linear_scan", sizes, "BTD")
    refuse_pruning("linear_scan", pruning)
    x = jax.ShapeDtypeStruct((sizes.get("B", 1), sizes.get("T", 4096), sizes.get("D", 2048)), dtype)
    a = jax.ShapeDtypeStruct(x.shape, jnp.promote_types(dtype, jnp.float32))
    return "\n".join(
        [
            explain(x, a, implementation=implementation),
            explain(x, op="rglru_scan", has_reset=True, implementation=implementation),
        ]
    )


def request(
    op: str, x: Any, a: Any, *, reverse: bool = False, has_state: bool = False, has_reset: bool = False
) -> Request:
    """What dispatch needs to know of a call; `a` is gate_a for `rglru_scan`."""
    device = target()
    return Request(
        op, device.platform, device.capability, device.kind, str(x.dtype), str(a.dtype),
        batch=x.shape[0], length=x.shape[1], width=x.shape[2],
        reverse=reverse, has_state=has_state, has_reset=has_reset,
    )  # fmt: skip


def preference(request: Request) -> Sequence[str]:
    """The automatic order of implementations on the request's platform, best first."""
    return PREFERENCE.get(request.platform, PREFERENCE["gpu"])


def _total_log(a: Array) -> Array:
    """Sum over time of log |a|, wide and real; where a = 0 it is -inf, without a gradient."""
    a = a.astype(jnp.promote_types(a.dtype, jnp.float32))
    zero = a == 0
    size = jnp.where(zero, 1, jnp.abs(jnp.where(zero, 1, a)))
    return jnp.sum(jnp.where(zero, -jnp.inf, jnp.log(size)), axis=1)
