"""Kernel of one frame of a recurrent block for Hopper (sm_90a), written with Pallas Mosaic GPU.

A CTA is one warpgroup and takes 64 rows of one group of the gates' channels: everything there is to it fits
shared memory at once. All loads are issued first; two CTAs share a multiprocessor, so that one loads while
the other computes. What a thread writes lies where it read what is no longer needed.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.common import hopper
from kernels.common.hopper import WARPGROUP
from kernels.common.hopper_math import gelu, sigmoid
from kernels.common.tiling import ceil_div
from kernels.recurrent_block._mosaic_gpu_step import COLUMNS, by_column, by_row, next_state, tile
from kernels.recurrent_block.config import BlockParams, Frame

ROWS = WARPGROUP  # of a CTA


@jax.jit  # traced once for all layers of a model
def frame_step(
    frame: Frame, params: BlockParams, positions: Float[Array, " R"]
) -> tuple[Float[Array, "R E"], Float[Array, "R E"], Float[Array, "R E"]]:
    """`FrameResult`'s arrays.

    Args:
      frame: R a multiple of 8; branches and taps of one 16-bit dtype, h float32.
      params: blocks of that dtype, everything else float32.
      positions: as the frame's, float32.
    """
    branches, h = frame.branches, frame.h
    rows, width = h.shape
    groups, size, _ = params.gate_blocks.shape
    taps, dtype, wide = len(frame.taps), branches.dtype, jnp.float32
    scratch = {
        "x_smem": hopper.tiles((ROWS, size), dtype),
        "y_smem": hopper.tiles((ROWS, size), dtype),
        "tap_smem": hopper.tiles((taps, ROWS, size), dtype),
        "v_smem": hopper.tiles((ROWS, size), dtype),
        "w_smem": hopper.tiles((size, 2 * size), dtype),
        "h_smem": hopper.tiles((ROWS, size), wide),
        "positions_smem": plgpu.SMEM((ROWS,), wide),
        "conv_smem": plgpu.SMEM((taps + 1, size), wide),
        "conv_bias_smem": plgpu.SMEM((size,), wide),
        "gate_bias_smem": plgpu.SMEM((2, size), wide),
        "rate_smem": plgpu.SMEM((size,), wide),
        "ready": plgpu.Barrier(num_arrivals=taps + 10),
    }

    def body(*refs: Any) -> None:
        kernel = functools.partial(_kernel, *refs, taps=taps, size=size, width=width)
        pl.run_scoped(kernel, **scratch)

    # The state, and of the inputs before the oldest, are written where they are read. XLA for GPUs (jax
    # 0.11.2) would let a call read a slice of an array in its place, and forget that the call writes there.
    operands = lax.optimization_barrier((branches, *frame.taps, h, positions, *params))
    branches, (oldest, *younger), state = operands[0], operands[1 : 1 + taps], operands[1 + taps]
    oldest, state = jax.new_ref(oldest), jax.new_ref(state)
    (gated,) = pl.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(h.shape, dtype)],
        mesh=plgpu.Mesh(grid=(ceil_div(rows, ROWS), groups), grid_names=("row", "group")),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        name="recurrent_frame",
    )(branches, oldest, *younger, state, *operands[2 + taps :])
    gated, after, newest = lax.optimization_barrier((gated, jax.freeze(state), jax.freeze(oldest)))
    return gated, after, newest


def _kernel(*refs: Any, taps: int, size: int, width: int, **scratch: Any) -> None:
    branches, tap_refs, h_ref = refs[0], refs[1 : 1 + taps], refs[1 + taps]
    sources, outputs = refs[2 + taps : -1], (refs[-1], h_ref, tap_refs[0])
    rows = pl.ds(lax.axis_index("row") * ROWS, ROWS)
    first = lax.axis_index("group") * size
    channels = pl.ds(first, size)
    _load(branches, tap_refs, h_ref, sources, rows, first, size, width, **scratch)
    columns = [pl.ds(start, COLUMNS) for start in range(0, size, COLUMNS)]
    for part in columns:
        _convolve(part, taps, **scratch)
    plgpu.commit_smem()
    for part in columns:
        _step(part, size, **scratch)
    plgpu.commit_smem()
    for name, target in zip(("y_smem", "h_smem", "x_smem"), outputs, strict=True):
        plgpu.copy_smem_to_gmem(scratch[name], target.at[rows, channels])
    plgpu.wait_smem_to_gmem(0)


def _load(
    branches: Any, tap_refs: Sequence[Any], h_ref: Any, sources: Sequence[Any], rows: Any, first: Array,
    size: int, width: int, *, x_smem: Any, y_smem: Any, tap_smem: Any, h_smem: Any, w_smem: Any,
    positions_smem: Any, conv_smem: Any, conv_bias_smem: Any, gate_bias_smem: Any, rate_smem: Any, ready: Any,
    **others: Any,
) -> None:  # fmt: skip
    """Everything the CTA reads."""
    del others
    positions, conv_kernel, conv_bias, blocks, gate_bias, rate = sources
    here, beside = pl.ds(first, size), pl.ds(width + first, size)
    pairs = [
        (branches.at[rows, here], x_smem),
        *((ref.at[rows, here], tap_smem.at[number]) for number, ref in enumerate(tap_refs)),
        (blocks.at[lax.axis_index("group")], w_smem),
        (positions.at[rows], positions_smem),
        (conv_kernel.at[:, here], conv_smem),
        (conv_bias.at[here], conv_bias_smem),
        (gate_bias.at[here], gate_bias_smem.at[0]),
        (gate_bias.at[beside], gate_bias_smem.at[1]),
        (rate.at[here], rate_smem),
        (h_ref.at[rows, here], h_smem),
        (branches.at[rows, beside], y_smem),
    ]
    for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, ready)
    plgpu.barrier_wait(ready)


def _convolve(
    part: Any, taps: int, *, x_smem: Any, tap_smem: Any, v_smem: Any, positions_smem: Any, conv_smem: Any,
    conv_bias_smem: Any, **others: Any,
) -> None:  # fmt: skip
    """v = b + sum_s w[J-1-s] x_(t-s) of some columns, rounded to the branches' dtype."""
    del others
    positions = by_row(positions_smem)
    total = by_column(conv_bias_smem.at[part]) + by_column(conv_smem.at[taps, part]) * tile(
        x_smem.at[:, part]
    )
    for age in range(1, taps + 1):
        tap = jnp.where(positions >= float(age), tile(tap_smem.at[taps - age, :, part]), 0.0)
        total = total + by_column(conv_smem.at[taps - age, part]) * tap
    v_smem[:, part] = total.astype(v_smem.dtype)


def _step(
    part: Any, size: int, *, y_smem: Any, v_smem: Any, w_smem: Any, h_smem: Any, positions_smem: Any,
    gate_bias_smem: Any, rate_smem: Any, **others: Any,
) -> None:  # fmt: skip
    """Gates, recurrence and output gate of some columns: h in the place of the state, h gelu(y) in y's."""
    del others
    start = part.start

    def products(accumulators: Any) -> None:
        for gate, accumulator in enumerate(accumulators):
            plgpu.wgmma(accumulator, v_smem, w_smem.at[:, pl.ds(gate * size + start, COLUMNS)])
        plgpu.wgmma_wait(0)

    biases = [by_column(gate_bias_smem.at[gate, part]) for gate in range(2)]
    gate_x, gate_a = pl.run_state(products)(tuple(plgpu.ACC.init(bias) for bias in biases))
    is_start = by_row(positions_smem) < 0.5
    before, v, rate = tile(h_smem.at[:, part]), tile(v_smem.at[:, part]), by_column(rate_smem.at[part])
    after = next_state(before, v, sigmoid(gate_x), sigmoid(gate_a), rate, is_start)
    gated = after * gelu(tile(y_smem.at[:, part]))
    h_smem[:, part] = after
    y_smem[:, part] = gated.astype(y_smem.dtype)
