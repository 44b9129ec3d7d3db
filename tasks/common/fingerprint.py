"""Fingerprints of arrays: what tells a good checkpoint from one with flipped bytes.

A leaf's fingerprint is two 32-bit words, sum_i bits_i * odd(i) mod 2^32 for two different odd-number
sequences, over the bit patterns of its elements in row-major order. A flipped bit b changes one bits_i by
2^b mod 2^32, and 2^b times an odd number is not 0 mod 2^32: any single flipped bit changes both words.
Integer addition is associative, so the value does not depend on the sharding, the layout or the order of
the sum. Computed on the device, one pass over the data.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

from tasks.common.state import leaf_names

# Multiplier and offset of the two index sequences (odd numbers; any would do, these are well mixed).
_LANES = ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F))


def _bits(x: Any) -> Any:
    """Unsigned bit patterns, at most 32 bits each; 64-bit elements become a trailing axis of two."""
    if isinstance(x, np.ndarray | np.generic):
        x = np.ascontiguousarray(x)
        if x.dtype.itemsize == 8:
            return x.view(np.uint32).reshape((*x.shape, 2))
        return x.view(f"u{x.dtype.itemsize}").reshape(x.shape)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    width = x.dtype.itemsize
    return lax.bitcast_convert_type(x, jnp.uint32 if width == 8 else jnp.dtype(f"uint{8 * width}"))


def _index(shape: tuple[int, ...]) -> Array:
    """Row-major position of every element, mod 2^32."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def _words(bits: Array) -> UInt32[Array, "2"]:
    index = _index(bits.shape)
    words = []
    for multiplier, offset in _LANES:
        mixed = (index + jnp.uint32(1)) * jnp.uint32(multiplier) + jnp.uint32(offset)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
        odd = (mixed ^ (mixed >> 13)) | jnp.uint32(1)
        words.append(jnp.sum(bits.astype(jnp.uint32) * odd, dtype=jnp.uint32))
    return jnp.stack(words)


# One small program per shape and dtype: a model repeats few, and one program of all leaves compiles slowly.
_words_of_bits = jax.jit(_words)
_words_of_leaf = jax.jit(lambda leaf: _words(_bits(leaf)))


def fingerprints(tree: Any) -> dict[str, list[int]]:
    """Two 32-bit words per leaf, by slash-joined name.

    Args:
      tree: jax arrays of any sharding, or numpy arrays, of any dtype of 1, 2, 4 or 8 bytes.

    Returns:
      {name: [word, word]}; equal bit patterns in equal shapes give equal words, on any device or mesh.
    """
    words = [
        _words_of_bits(_bits(leaf)) if isinstance(leaf, np.ndarray | np.generic) else _words_of_leaf(leaf)
        for leaf in jax.tree.leaves(tree)
    ]
    # One transfer for all leaves, not one round trip each.
    return {
        name: [int(word) for word in pair]
        for name, pair in zip(leaf_names(tree), jax.device_get(words), strict=True)
    }
