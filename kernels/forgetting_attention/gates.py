"""Accurate cumulative sums of log forget gates, and their gradient.

lambda_t = sum of log f over [0, t]; the decay bias between two positions is a difference of lambdas. Plain
float32 sums lose it at long context (see README.md), so lambda is an unevaluated pair hi + lo everywhere.
"""

import jax
from jaxtyping import Array, Bool, Float

from kernels.common.numerics import compensated_cumsum, reverse_cumsum, reverse_segment_cumsum


def gate_sums(log_fgate: Float[Array, "B S N"]) -> tuple[Float[Array, "B S N"], Float[Array, "B S N"]]:
    """Compensated inclusive cumulative sum of log gates along axis 1.

    D_ij = (hi_i - hi_j) + (lo_i - lo_j) is then accurate to one rounding of D itself, at any distance from
    the start.

    Args:
      log_fgate: log forget gates, float32 or float64.

    Returns:
      (hi, lo) in the same dtype. The gradient flows through hi alone: lo is the rounding of hi, so a sum
      that uses both differentiates as if it used the exact lambda once.
    """
    return segment_gate_sums(log_fgate, None)


@jax.custom_vjp
def segment_gate_sums(
    log_fgate: Float[Array, "B S N"], ends: Bool[Array, "B S"] | None
) -> tuple[Float[Array, "B S N"], Float[Array, "B S N"]]:
    """Compensated cumulative sum whose gradient stops at segment ends.

    The sum itself runs on across segments: only differences inside a segment are ever used, and the gate of a
    segment's first key must be 0, so the gradient of a gate is the sum of d lambda from there to the end of
    its segment. `ends` marks those; None is one segment.
    """
    return compensated_cumsum(log_fgate)


def _forward(log_fgate: Array, ends: Array | None) -> tuple[tuple[Array, Array], Array | None]:
    return compensated_cumsum(log_fgate), ends


def _backward(ends: Array | None, cotangents: tuple[Array, Array]) -> tuple[Array, None]:
    if ends is None:
        return reverse_cumsum(cotangents[0]), None
    return reverse_segment_cumsum(cotangents[0], ends), None


segment_gate_sums.defvjp(_forward, _backward)
