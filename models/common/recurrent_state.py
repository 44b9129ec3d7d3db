"""What a recurrent block remembers from one call to the next, and how a jitted step updates it in place."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.common.temporal_conv import Taps


class RecurrentState(NamedTuple):
    """What one recurrent block remembers.

    Attributes:
      lru: [B, *P, E] float32, h of the last frame (complex: real half, then imaginary half).
      conv: the last J - 1 raw inputs of the convolution, each [B, *P, E], oldest first, zeros before the
        first. Inputs of an earlier segment may be among them; positions say which.
    """

    lru: Float[Array, "B *P E"]
    conv: Taps


def init_recurrent_state(
    batch: int, width: int, taps: int, tubes: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
) -> RecurrentState:
    """Empty memory of fixed shapes.

    Args:
      batch, width, taps: B, E, J.
      tubes: sizes of the axes between time and channels.
      dtype: of the convolution's inputs; the recurrence is float32 (float64 with float64).
    """
    return RecurrentState(
        lru=jnp.zeros((batch, *tubes, width), jnp.promote_types(dtype, jnp.float32)),
        conv=tuple(jnp.zeros((batch, *tubes, width), dtype) for _ in range(taps - 1)),
    )


def handed_over[T](memory: T) -> T:
    """A memory as jitted steps take it that donate it and call `taken_over` first.

    Of each convolution's inputs the oldest comes last, where a step of one frame puts the newest: JAX pairs
    donated arrays with results of their shape in order, and what stays in its place is not copied.

    Args:
      memory: tree with `RecurrentState`s.
    """
    return _turned(memory, 1)


def taken_over[T](memory: T) -> T:
    """Undoes `handed_over`."""
    return _turned(memory, -1)


def _turned[T](memory: T, by: int) -> T:
    def turn(node: Any) -> Any:
        is_memory = isinstance(node, RecurrentState)
        return node._replace(conv=node.conv[by:] + node.conv[:by]) if is_memory else node

    return jax.tree.map(turn, memory, is_leaf=lambda node: isinstance(node, RecurrentState))
