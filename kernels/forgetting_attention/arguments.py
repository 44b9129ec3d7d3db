"""Checks of what callers pass in: every error names the argument, what is wrong and what would be right."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ATTENTION_DTYPES = ("float16", "bfloat16", "float32", "float64")


def host_value(x: Any) -> np.ndarray | None:
    """The values of x if they can be looked at now: not while tracing, nor if other hosts hold a part."""
    if x is None or isinstance(x, jax.core.Tracer):
        return None
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    return np.asarray(x)


def check_shapes(q: Any, k: Any, v: Any, op: str) -> None:
    """Raises ValueError unless q [B,T,N,H] and k, v [B,S,K,H] fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if getattr(x, "ndim", None) != 4:
            raise ValueError(
                f"{op}: {name} must have 4 axes [batch, length, heads, head_dim]; got shape {_shape(x)}."
            )
        if str(x.dtype) not in ATTENTION_DTYPES:
            raise ValueError(f"{op}: {name} has dtype {x.dtype}; use one of {', '.join(ATTENTION_DTYPES)}.")
        if x.dtype != q.dtype:
            raise ValueError(f"{op}: {name} has dtype {x.dtype} but q has {q.dtype}; cast them to one dtype.")
        if 0 in x.shape:
            raise ValueError(f"{op}: {name} has an empty axis: shape {_shape(x)}.")
    if k.shape != v.shape:
        raise ValueError(f"{op}: v must have the shape of k, {_shape(k)}; got {_shape(v)}.")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"{op}: k has batch size {k.shape[0]} but q has {q.shape[0]}.")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"{op}: k has head_dim {k.shape[3]} but q has {q.shape[3]}.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{op}: the number of query heads must be a multiple of the number of key/value heads; q has"
            f" {q.shape[2]} heads, k has {k.shape[2]}."
        )


def check_array(op: str, name: str, x: Any, shape: tuple[int, ...], kind: str) -> None:
    """Raises ValueError unless x is None or an array of this shape and kind ("integer" or "wide float")."""
    if x is None:
        return
    if getattr(x, "shape", None) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}; got {_shape(x)}.")
    if kind == "integer" and not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{op}: {name} must have an integer dtype; got {x.dtype}.")
    if kind == "wide float" and str(x.dtype) not in ("float32", "float64"):
        raise ValueError(
            f"{op}: {name} must be float32 (or float64): sums of log gates lose all precision below that;"
            f" got {x.dtype}. Cast the gate logits before log_sigmoid."
        )


def check_range(op: str, name: str, x: Any, low: int, high: int) -> None:
    """Raises ValueError if x holds values outside [low, high]; values that are being traced are not looked
    at.
    """
    values = host_value(x)
    if values is not None and ((values < low) | (values > high)).any():
        raise ValueError(f"{op}: {name} must lie in [{low}, {high}]; got {values}.")


def check_gates(op: str, log_fgate: Any) -> None:
    """Raises ValueError if a log gate is positive; NaN passes, since unused positions may hold anything."""
    values = host_value(log_fgate)
    if values is not None:
        largest = float(values.max(initial=-np.inf, where=values == values))
        if largest > 0:
            raise ValueError(
                f"{op}: log_fgate must be <= 0 (the log of a gate in (0, 1)); its largest value is"
                f" {largest}. Pass jax.nn.log_sigmoid(logits) in float32."
            )


def check_threshold(op: str, threshold: Any, batch: int, heads: int) -> None:
    """Raises ValueError unless adaptive_threshold is None, "auto", "tight", or <= 0 and broadcastable to
    [batch, heads].
    """
    if threshold is None:
        return
    if isinstance(threshold, str):
        if threshold not in ("auto", "tight"):
            raise ValueError(
                f'{op}: adaptive_threshold={threshold!r} is not known; use None, "auto", "tight", or'
                f" values <= 0 broadcastable to [{batch}, {heads}]."
            )
        return
    shape = jnp.shape(threshold)
    try:
        fits = jnp.broadcast_shapes(shape, (batch, heads)) == (batch, heads)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{op}: adaptive_threshold must broadcast to [batch, heads] = [{batch}, {heads}]; got"
            f" shape {shape}."
        )
    values = host_value(threshold)
    if values is not None and (values > 0).any():
        raise ValueError(
            f"{op}: adaptive_threshold must be <= 0: a positive one prunes the diagonal; got {threshold}."
        )


def check_scale(op: str, sm_scale: float | None, head_dim: int) -> float:
    """The scale of the scores: head_dim ** -0.5 by default; ValueError unless finite."""
    if sm_scale is None:
        return head_dim**-0.5
    if not math.isfinite(sm_scale):
        raise ValueError(f"{op}: sm_scale must be a finite number; got {sm_scale}.")
    return float(sm_scale)


def check_values(log_fgate: jax.Array, adaptive_threshold: Any = None) -> None:
    """Value checks that also work inside jit, for debugging: positive log gates or thresholds stop the run.

    Under tracing, `forgetting_attention` cannot look at values and assumes log_fgate <= 0 (pruning is only
    safe then). This inserts a host callback, which costs a device round trip, so it is not done by default.

    Raises:
      ValueError: at once for concrete values; from the callback under jit (wrapped in jax's runtime error).
    """

    def raise_if_positive(gates_top: Any, threshold_top: Any) -> None:
        if gates_top > 0:
            raise ValueError(f"log_fgate must be <= 0; its largest value is {gates_top}.")
        if threshold_top > 0:
            raise ValueError(f"adaptive_threshold must be <= 0; its largest value is {threshold_top}.")

    numeric = adaptive_threshold is not None and not isinstance(adaptive_threshold, str)
    top = jnp.max(jnp.asarray(adaptive_threshold)) if numeric else jnp.zeros(())
    gates_top = jnp.nanmax(log_fgate)
    if host_value(gates_top) is not None and host_value(top) is not None:
        raise_if_positive(gates_top, top)
    else:
        jax.debug.callback(raise_if_positive, gates_top, top)


def _shape(x: Any) -> Any:
    return getattr(x, "shape", type(x).__name__)
