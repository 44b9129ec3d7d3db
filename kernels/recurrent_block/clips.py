"""Clips frame by frame, by any implementation of one frame."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.recurrent_block.config import BlockParams, Clip, ClipResult, Frame, FrameResult, Memory


def frame_by_frame(
    step: Callable[[Frame, BlockParams], FrameResult], clip: Clip, params: BlockParams
) -> ClipResult:
    """`recurrent_clip` by `step`, which takes the tokens of all streams as rows."""
    batch, _, tokens, _ = clip.branches.shape
    memory = empty_memory(clip, params) if clip.memory is None else clip.memory
    flat = jax.tree.map(lambda x: x.reshape(batch * tokens, -1), memory)

    def advance(before: Memory, inputs: tuple[Array, Array]) -> tuple[Memory, Array]:
        branches, positions = inputs
        rows = branches.reshape(batch * tokens, -1)
        result = step(Frame(rows, *before, jnp.repeat(positions, tokens)), params)
        newest = result.newest.astype(before.taps[0].dtype if before.taps else rows.dtype)
        return Memory((*before.taps, newest)[1:], result.h), result.gated

    frames = (jnp.swapaxes(clip.branches, 0, 1), clip.positions.T)
    after, gated = jax.lax.scan(advance, flat, frames)
    gated = jnp.swapaxes(gated.reshape(-1, batch, tokens, gated.shape[-1]), 0, 1)
    return ClipResult(gated, after.h.reshape(memory.h.shape))


def empty_memory(clip: Clip, params: BlockParams) -> Memory:
    """Zeros: of frames that there were not."""
    batch, _, tokens, width = clip.branches.shape
    shape = (batch, tokens, width // 2)
    tap = jnp.zeros(shape, clip.branches.dtype)
    wide = jnp.promote_types(clip.branches.dtype, jnp.float32)
    return Memory((tap,) * (len(params.conv_kernel) - 1), jnp.zeros(shape, wide))
