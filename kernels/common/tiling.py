"""Cutting an axis into blocks."""

import jax.numpy as jnp
from jaxtyping import Array


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def pad_axis_to(x: Array, axis: int, multiple: int, *, edge: bool = False) -> Array:
    """Pads the end of an axis to a multiple: with zeros, or with copies of the last entry."""
    missing = -x.shape[axis] % multiple
    if missing == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, mode="edge" if edge else "constant")


def blocks(x: Array, size: int, fill: float | None) -> Array:
    """Splits the last axis into blocks of `size`: [..., L] -> [..., ceil(L / size), size].

    Args:
      x: any array.
      size: block length.
      fill: value of the missing entries of the last block; None repeats the last entry.
    """
    widths = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    padded = jnp.pad(x, widths, mode="edge") if fill is None else jnp.pad(x, widths, constant_values=fill)
    return padded.reshape(*x.shape[:-1], -1, size)
