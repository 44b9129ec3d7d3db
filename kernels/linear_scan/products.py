"""Arithmetic that all implementations share: products in which 0 absorbs NaN and infinity, and dtypes.

A reset is a = 0. Whatever the state before it holds, even NaN, must not come through; and where nothing later
depends on a value its gradient is 0, even next to NaN. So here 0 times anything is 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Inexact

from kernels.common.manual import aligned_varying


def carry_dtype(x: Any, a: Any) -> jnp.dtype:
    """Dtype of the state: at least float32, complex if x is."""
    return jnp.promote_types(jnp.promote_types(x.dtype, a.dtype), jnp.float32)


def product(a: Array, b: Array) -> Array:
    """a * b, but 0 where either is 0."""
    return jnp.where((a == 0) | (b == 0), 0, a * b)


def decay_gradient(g: Array, a: Array, before: Array) -> Array:
    """Gradient of a in a * before: g * before, but 0 where a reset (a = 0) forgets a state that is not
    finite.
    """
    return product(g, jnp.where((a == 0) & ~jnp.isfinite(before), 0, before))


@jax.custom_vjp
def decayed(a: Inexact[Array, "*shape"], h: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """`product` whose gradients are products of that kind too; a and h of one dtype."""
    return product(a, h)


def _decayed_fwd(a: Array, h: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(a, h), (a, h)


def _decayed_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    a, h = saved
    return decay_gradient(g, a, h), product(g, a)


decayed.defvjp(_decayed_fwd, _decayed_bwd)


def zeros_like(x: Array, dtype: Any, *varying: Array) -> Array:
    """Zeros of x's shape and sharding, also over the manual mesh axes of `varying`: a loop's first carry."""
    return aligned_varying((jnp.zeros_like(x, dtype=dtype), x, *varying))[0]


def placed_state(x: Array, h0: Array | None) -> Array | None:
    """h0 [B, D], sharded as x [B, T, D] is over the explicit axes of a mesh, as the state will be."""
    if h0 is None:
        return None
    wanted = jax.typeof(x).sharding
    spec = PartitionSpec(wanted.spec[0], wanted.spec[2])
    if wanted.mesh.empty or jax.typeof(h0).sharding.spec == spec:
        return h0
    return jax.sharding.reshard(h0, NamedSharding(wanted.mesh, spec))


def initial_state(x: Array, h0: Array | None, dtype: Any) -> Array:
    """h0 [B, D], or zeros, of the given dtype."""
    return zeros_like(x[:, 0], dtype) if h0 is None else h0.astype(dtype)


def shifted(x: Array, first: Array, *, reverse: bool) -> Array:
    """x one step later along axis 1: `first` enters where time begins (at the end if time is reversed)."""
    entry = first[:, None].astype(x.dtype)
    if reverse:
        return jnp.concatenate([x[:, 1:], entry], axis=1)
    return jnp.concatenate([entry, x[:, :-1]], axis=1)


def cast(x: Array, dtype: Any) -> Array:
    """x in `dtype`; a complex gradient of a real input keeps its real part."""
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        x = x.real
    return x.astype(dtype)
