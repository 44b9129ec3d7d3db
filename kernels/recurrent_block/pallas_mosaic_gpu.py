"""Recurrent blocks on Hopper GPUs: Pallas Mosaic GPU kernels of one frame, and of all frames of a clip.

Made for inference: gradients are those of `xla`, computed from the inputs again.
"""

import jax
import jax.numpy as jnp

from kernels.common.hopper import not_hopper
from kernels.common.hopper_rows import DTYPES, ROW_GROUP, with_gradients_of
from kernels.common.manual import aligned_varying
from kernels.recurrent_block import _mosaic_gpu_clip, _mosaic_gpu_frame, xla
from kernels.recurrent_block._mosaic_gpu_step import SIZES
from kernels.recurrent_block.config import (
    CLIP,
    FRAME,
    BlockParams,
    Clip,
    ClipResult,
    Frame,
    FrameResult,
    Memory,
    Request,
)


def supports(request: Request) -> str | None:
    """Hopper, 16-bit branches, taps and blocks, float32 else; groups of 64 or 128 channels."""
    if refusal := not_hopper(request.platform, request.capability):
        return refusal
    if request.dtype not in DTYPES or request.state_dtype != "float32":
        return f"takes bfloat16 or float16 and a float32 state, not {request.dtype} and {request.state_dtype}"
    if request.blocks_dtype != request.dtype or not {request.dtype, "float32"} >= set(request.others):
        found = ", ".join(sorted({request.blocks_dtype, *request.others}))
        return f"takes taps and parameters of {request.dtype} or float32 beside {request.dtype}, not {found}"
    if request.rows % ROW_GROUP:
        return f"takes a multiple of {ROW_GROUP} rows, not {request.rows}"
    if request.block not in SIZES:
        return f"takes groups of {' or '.join(map(str, SIZES))} channels, not {request.block}"
    if request.op == CLIP and request.width % _mosaic_gpu_clip.CHANNELS:
        return f"takes clips of a multiple of {_mosaic_gpu_clip.CHANNELS} channels, not {request.width}"
    if not 2 <= request.taps <= 4:
        return f"takes convolutions over 2 to 4 frames, not {request.taps}"
    return None


def is_worth_it(request: Request) -> bool:
    """Whether a kernel takes the call, and is worth more than layers one by one."""
    if supports(request) is not None:
        return False
    sizes = request.batch, request.frames, request.rows, request.width
    return request.op == FRAME or _mosaic_gpu_clip.is_worth_it(*sizes)


def recurrent_frame(frame: Frame, params: BlockParams) -> FrameResult:
    """Convolution, gates, recurrence and output gate of one frame: float32 but for the products' operands."""
    result: FrameResult = with_gradients_of(xla.recurrent_frame, _run_frame, frame, params)
    return result


def recurrent_clip(clip: Clip, params: BlockParams) -> ClipResult:
    """The same for all frames of a clip."""
    result: ClipResult = with_gradients_of(xla.recurrent_clip, _run_clip, clip, params)
    return result


@jax.custom_batching.sequential_vmap  # type: ignore[untyped-decorator]
def _run_frame(frame: Frame, params: BlockParams) -> FrameResult:
    dtype = frame.branches.dtype
    taps = tuple(tap.astype(dtype) for tap in frame.taps)
    positions = jnp.minimum(frame.positions, len(taps)).astype(jnp.float32)
    results = _mosaic_gpu_frame.frame_step(frame._replace(taps=taps), _wide(params), positions)
    # What a Pallas kernel returns has forgotten over which manual mesh axes its operands vary.
    return FrameResult(*aligned_varying((*results, frame, params))[:3])


@jax.custom_batching.sequential_vmap  # type: ignore[untyped-decorator]
def _run_clip(clip: Clip, params: BlockParams) -> ClipResult:
    memory = clip.memory
    if memory is not None:
        memory = Memory(tuple(tap.astype(clip.branches.dtype) for tap in memory.taps), memory.h)
    clip = clip._replace(memory=memory, positions=clip.positions.astype(jnp.int32))
    results = _mosaic_gpu_clip.clip_steps(clip, _wide(params))
    return ClipResult(*aligned_varying((*results, clip, params))[:2])


def _wide(params: BlockParams) -> BlockParams:
    """Everything but the operands of products in float32."""
    blocks = params.gate_blocks
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)._replace(gate_blocks=blocks)
