"""One frame of a recurrent block on Hopper GPUs: one Pallas Mosaic GPU kernel.

Made for inference: gradients are those of `xla`, computed from the inputs again.
"""

import jax
import jax.numpy as jnp

from kernels.common.hopper import not_hopper
from kernels.common.hopper_rows import DTYPES, ROW_GROUP, with_gradients_of
from kernels.common.manual import aligned_varying
from kernels.recurrent_frame import _mosaic_gpu_sm90 as sm90
from kernels.recurrent_frame import xla
from kernels.recurrent_frame.config import Frame, FrameParams, FrameResult, Request


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
    if request.block not in sm90.BLOCKS:
        return f"takes groups of {' or '.join(map(str, sm90.BLOCKS))} channels, not {request.block}"
    if not 2 <= request.taps <= 4:
        return f"takes convolutions over 2 to 4 frames, not {request.taps}"
    return None


def recurrent_frame(frame: Frame, params: FrameParams) -> FrameResult:
    """Convolution, gates, recurrence and output gate of one frame: float32 but for the products' operands."""
    result: FrameResult = with_gradients_of(xla.recurrent_frame, _run, frame, params)
    return result


@jax.custom_batching.sequential_vmap  # type: ignore[untyped-decorator]
def _run(frame: Frame, params: FrameParams) -> FrameResult:
    dtype = frame.branches.dtype
    taps = tuple(tap.astype(dtype) for tap in frame.taps)
    wide = FrameParams(
        *(x if name == "gate_blocks" else x.astype(jnp.float32) for name, x in params._asdict().items())
    )
    positions = jnp.minimum(frame.positions, len(taps)).astype(jnp.float32)
    results = sm90.frame_step(frame._replace(taps=taps), wide, positions)
    # What a Pallas kernel returns has forgotten over which manual mesh axes its operands vary.
    return FrameResult(*aligned_varying((*results, frame, params))[:3])
