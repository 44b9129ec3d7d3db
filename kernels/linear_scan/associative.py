"""log2(T) levels of pairwise combination (`jax.lax.associative_scan`): plain XLA, parallel in time."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.linear_scan import differentiable
from kernels.linear_scan.config import Request
from kernels.linear_scan.products import carry_dtype, product


def supports(request: Request) -> str | None:
    """Takes every call."""
    return None


def scan(x: Array, a: Array, h0: Array | None, *, reverse: bool, out_dtype: jnp.dtype) -> tuple[Array, Array]:
    """One pass. h0 is part of the first step's input, so that time gets no extra step."""
    wide = carry_dtype(x, a)
    x, a = x.astype(wide), a.astype(wide)
    first, last = (-1, 0) if reverse else (0, -1)
    if h0 is not None:
        x = x.at[:, first].add(product(a[:, first], h0))
    _, h = jax.lax.associative_scan(_combine, (a, x), axis=1, reverse=reverse)
    return h.astype(out_dtype), h[:, last]


def _combine(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
    (a_before, x_before), (a, x) = earlier, later
    return product(a, a_before), x + product(a, x_before)


PASSES = differentiable.composed(scan)
linear_scan = functools.partial(differentiable.linear_scan, passes=PASSES)
rglru_scan = functools.partial(differentiable.rglru_scan, passes=PASSES)
