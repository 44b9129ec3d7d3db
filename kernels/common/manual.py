"""Types of arrays inside jax.shard_map, where kernels see local arrays that vary over manual mesh axes."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def varying_axes(x: Array) -> set[str]:
    """Manual mesh axes over which x differs between devices; empty outside of shard_map."""
    return set(jax.typeof(x).manual_axis_type.varying)


def varying_zeros(shape: tuple[int, ...], like: Array, dtype: Any) -> Array:
    """Zeros that vary over the same manual mesh axes as `like`, as loop carries inside shard_map must."""
    zeros = jnp.zeros(shape, dtype)
    axes = tuple(varying_axes(like))
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros


def aligned_varying[Tree](tree: Tree) -> Tree:
    """Inside shard_map, makes all arrays of a tree vary over the same manual mesh axes; elsewhere does
    nothing.

    Loop carries must have one type throughout, and a custom gradient must return what it was given.
    """
    axes: set[str] = set()
    for leaf in jax.tree.leaves(tree):
        axes |= varying_axes(leaf)

    def align(leaf: Array) -> Array:
        missing = tuple(axes - varying_axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(align, tree)
