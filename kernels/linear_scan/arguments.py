"""Checks of what callers pass in: every error names the argument, what is wrong and what would be right."""

from typing import Any

import jax
import jax.numpy as jnp

REAL_DTYPES = ("float16", "bfloat16", "float32", "float64")
COMPLEX_DTYPES = ("complex64", "complex128")


def check_sequence(op: str, x: Any, dtypes: tuple[str, ...]) -> None:
    """Raises ValueError unless x is [batch, time, width], without an empty axis, of a listed dtype."""
    if getattr(x, "ndim", None) != 3:
        raise ValueError(f"{op}: x must have 3 axes [batch, time, width]; got shape {_shape(x)}.")
    if 0 in x.shape:
        raise ValueError(
            f"{op}: x has an empty axis: shape {_shape(x)}; every axis needs at least one entry."
        )
    check_dtype(op, "x", x, dtypes)


def check_gated(op: str, x: Any, gate_x: Any, gate_a: Any, a_param: Any, reset: Any) -> None:
    """Raises ValueError unless these fit together as arguments of `rglru_scan`."""
    check_sequence(op, x, REAL_DTYPES)
    for name, gate in (("gate_x", gate_x), ("gate_a", gate_a)):
        check_like(op, name, gate, x.shape, REAL_DTYPES)
    check_like(op, "a_param", a_param, x.shape[2:], REAL_DTYPES)
    check_reset(op, reset, x.shape[:2])


def check_dtype(op: str, name: str, x: Any, dtypes: tuple[str, ...]) -> None:
    """Raises ValueError unless x has one of these dtypes."""
    if str(x.dtype) not in dtypes:
        raise ValueError(f"{op}: {name} has dtype {x.dtype}; use one of {', '.join(dtypes)}.")


def check_like(op: str, name: str, x: Any, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    """Raises ValueError unless x is an array of this shape and one of these dtypes."""
    if getattr(x, "shape", None) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}; got {_shape(x)}.")
    check_dtype(op, name, x, dtypes)


def check_linear(op: str, x: Any, a: Any) -> None:
    """Raises ValueError unless x and a fit together as arguments of `linear_scan`."""
    check_sequence(op, x, (*REAL_DTYPES, *COMPLEX_DTYPES))
    check_like(op, "a", a, x.shape, (*REAL_DTYPES, *COMPLEX_DTYPES))
    if str(a.dtype) in COMPLEX_DTYPES and str(x.dtype) not in COMPLEX_DTYPES:
        raise ValueError(
            f"{op}: a is {a.dtype} but x is {x.dtype}, and h is returned in x's dtype; cast x to {a.dtype}."
        )


def check_time_is_whole(op: str, x: Any) -> None:
    """Raises ValueError if x is explicitly sharded in time."""
    sharding = getattr(jax.typeof(x), "sharding", None) if isinstance(x, jax.Array) else None
    axis = None if sharding is None or sharding.mesh.empty else sharding.spec[1]
    if axis is not None:
        raise ValueError(
            f"{op}: x is sharded over {axis!r} in time; use kernels.linear_scan.sharded.sharded_{op}."
        )


def check_state(op: str, h0: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Raises ValueError unless h0 is None or a state: [B, D], of the carry's dtype."""
    if h0 is None:
        return
    if getattr(h0, "shape", None) != shape:
        raise ValueError(f"{op}: h0 must have shape [batch, width] = {shape}; got {_shape(h0)}.")
    if h0.dtype != dtype:
        raise ValueError(
            f"{op}: h0 must be {jnp.dtype(dtype).name}, as h_last is: a rounded state drifts; got {h0.dtype}."
        )


def check_reset(op: str, reset: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless reset is None or a bool array [B, T]."""
    if reset is None:
        return
    if getattr(reset, "shape", None) != shape:
        raise ValueError(f"{op}: reset must have shape [batch, time] = {shape}; got {_shape(reset)}.")
    if reset.dtype != jnp.bool_:
        raise ValueError(
            f"{op}: reset must be bool, True where a segment starts; got {reset.dtype}. From positions:"
            " reset = position == 0."
        )


def _shape(x: Any) -> Any:
    return getattr(x, "shape", type(x).__name__)
