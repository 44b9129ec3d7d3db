"""Kernel of the frames of a recurrent block, one after the other, for Hopper (sm_90a): Pallas Mosaic GPU.

A CTA is two warpgroups and takes 64 tokens of a stream and 128 channels through all frames. The gates' maps
stay in shared memory and the state in registers; a frame is two tiles that come by TMA while the frame before
is computed, and one that leaves. A warpgroup has 64 channels. Where the gates' groups are wider, warpgroups
show each other what they convolved; else neither knows of the other.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.common import hopper
from kernels.common.hopper import WARPGROUP
from kernels.common.hopper_math import LOG2E, gelu, sigmoid_base2
from kernels.common.tiling import ceil_div
from kernels.recurrent_block._mosaic_gpu_step import COLUMNS, SHAPE, by_column, next_state, tile
from kernels.recurrent_block.config import BlockParams, Clip

WARPGROUPS = 2
CHANNELS = WARPGROUPS * COLUMNS  # of a CTA
Y_SLOTS = 2
# A frame takes a CTA's 4 to 5 us, whatever else there is to do: where few of the multiprocessors are busy for
# many frames, layers one by one are as fast.
FEW_CTAS, FEW_FRAMES = 48, 8


def is_worth_it(batch: int, frames: int, rows: int, width: int) -> bool:
    """Whether the kernel is worth more than layers one by one, which are parallel in time."""
    return frames <= FEW_FRAMES or batch * ceil_div(rows, WARPGROUP) * (width // CHANNELS) >= FEW_CTAS


@jax.jit  # traced once for all layers of a model
def clip_steps(clip: Clip, params: BlockParams) -> tuple[Float[Array, "B T P E"], Float[Array, "B P E"]]:
    """`ClipResult`'s arrays.

    Args:
      clip: P a multiple of 8, E one of 128; branches and taps of one 16-bit dtype, h float32; positions are
        int32.
      params: blocks of that dtype, everything else float32.
    """
    batch, frames, rows, width = clip.branches.shape
    size, taps = params.gate_blocks.shape[1], len(params.conv_kernel) - 1
    width //= 2
    remembers = clip.memory is not None
    operands = (
        clip.branches, clip.positions,
        *params._replace(
            gate_blocks=_by_warpgroup(params.gate_blocks), gate_bias=params.gate_bias * -LOG2E
        ),
        *((*clip.memory.taps, clip.memory.h) if clip.memory is not None else ()),
    )  # fmt: skip
    gated, h = plgpu.kernel(
        functools.partial(_kernel, taps=taps, frames=frames, remembers=remembers),
        out_type=[
            jax.ShapeDtypeStruct((batch, frames, rows, width), clip.branches.dtype),
            jax.ShapeDtypeStruct((batch, rows, width), jnp.float32),
        ],
        scratch_types=shared(size, taps, clip.branches.dtype, remembers=remembers),
        grid=(batch, ceil_div(rows, WARPGROUP), width // CHANNELS),
        grid_names=("stream", "row", "block"),
        num_threads=WARPGROUPS,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="recurrent_clip",
    )(*operands)
    return gated, h


def _by_warpgroup(blocks: Float[Array, "G S S2"]) -> Float[Array, "C W K 64 128"]:
    """The maps in the order in which warpgroups read them.

    C CTAs, W warpgroups; K parts of 64 input channels; 64 channels of the input gate, and those of the other.
    """
    groups, size, _ = blocks.shape
    parts = size // COLUMNS
    split = blocks.reshape(groups, parts, COLUMNS, 2, parts, COLUMNS)
    return split.transpose(0, 4, 1, 2, 3, 5).reshape(-1, WARPGROUPS, parts, COLUMNS, 2 * COLUMNS)


def shared(size: int, taps: int, dtype: Any, *, remembers: bool) -> dict[str, Any]:
    """Scratch of a CTA.

    Args:
      size: channels of the gates' groups.
      taps: frames before the current one that the convolution looks at.
      dtype: of what is loaded.
      remembers: whether there is a memory of frames before the clip.
    """
    wide, parts = jnp.float32, size // COLUMNS
    initial = parts + 5 + (taps + 1) * remembers
    return {
        "x_smem": hopper.tiles((WARPGROUPS, taps + 1, *SHAPE), dtype),
        "y_smem": hopper.tiles((WARPGROUPS, Y_SLOTS, *SHAPE), dtype),
        "v_smem": hopper.tiles((WARPGROUPS, *SHAPE), dtype),
        "w_smem": hopper.tiles((WARPGROUPS, parts, COLUMNS, 2 * COLUMNS), dtype),
        "h_smem": hopper.tiles((WARPGROUPS, *SHAPE), wide),
        "conv_smem": plgpu.SMEM((WARPGROUPS, taps + 1, COLUMNS), wide),
        "conv_bias_smem": plgpu.SMEM((WARPGROUPS, COLUMNS), wide),
        "gate_bias_smem": plgpu.SMEM((WARPGROUPS, 2, COLUMNS), wide),
        "rate_smem": plgpu.SMEM((WARPGROUPS, COLUMNS), wide),
        "first_ready": plgpu.Barrier(num_arrivals=initial, num_barriers=WARPGROUPS),
        "x_ready": plgpu.Barrier(num_barriers=WARPGROUPS * (taps + 1)),
        "y_ready": plgpu.Barrier(num_barriers=WARPGROUPS * Y_SLOTS),
        "v_ready": plgpu.Barrier(num_arrivals=WARPGROUPS),
        "v_free": plgpu.Barrier(num_arrivals=WARPGROUPS),
    }


def _kernel(*refs: Any, taps: int, frames: int, remembers: bool, **scratch: Any) -> None:
    branches, positions, sources = refs[0], refs[1], refs[2:7]
    memory, (gated_ref, last_ref) = refs[7:-2], refs[-2:]
    wg, stream = lax.axis_index("wg"), lax.axis_index("stream")
    rows = pl.ds(lax.axis_index("row") * WARPGROUP, WARPGROUP)
    first = lax.axis_index("block") * CHANNELS + wg * COLUMNS
    here, beside = pl.ds(first, COLUMNS), pl.ds(gated_ref.shape[3] + first, COLUMNS)
    x_smem, y_smem, h_smem = scratch["x_smem"].at[wg], scratch["y_smem"].at[wg], scratch["h_smem"].at[wg]

    def load(t: Array) -> None:
        """A frame's branches."""
        x_slot, y_slot = hopper.slot_of(t, taps + 1), hopper.slot_of(t, Y_SLOTS)
        source, x_ready = branches.at[stream, t], scratch["x_ready"].at[wg * (taps + 1) + x_slot]
        plgpu.copy_gmem_to_smem(source.at[rows, here], x_smem.at[x_slot], x_ready)
        y_ready = scratch["y_ready"].at[wg * Y_SLOTS + y_slot]
        plgpu.copy_gmem_to_smem(source.at[rows, beside], y_smem.at[y_slot], y_ready)

    load(jnp.int32(0))
    _load_first(sources, memory, wg, stream, rows, first, gated_ref.shape[3], taps, **scratch)

    def step(t: Array, h: Array) -> Array:
        position = positions[stream, t]
        reach = position if remembers else jnp.minimum(position, t)
        plgpu.barrier_wait(scratch["x_ready"].at[wg * (taps + 1) + hopper.slot_of(t, taps + 1)])
        v = _convolved(x_smem, t, reach, wg, taps, **scratch).astype(x_smem.dtype)
        # The convolution no longer looks at the oldest frame, and what left has been read.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        _show(v, t, wg, lambda: pl.when(t + 1 < frames)(lambda: load(t + 1)), **scratch)
        i, r = _gates(wg, **scratch)
        rate = by_column(scratch["rate_smem"].at[wg])
        is_start = lax.broadcast(position == 0, SHAPE)
        h = next_state(h, v.astype(jnp.float32), i, r, rate, is_start)
        slot = hopper.slot_of(t, Y_SLOTS)
        plgpu.barrier_wait(scratch["y_ready"].at[wg * Y_SLOTS + slot])
        y_smem[slot] = (h * gelu(tile(y_smem.at[slot]))).astype(y_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_smem.at[slot], gated_ref.at[stream, t, rows, here])
        return h

    h = tile(h_smem) if remembers else plgpu.layout_cast(jnp.zeros(SHAPE, jnp.float32), plgpu.Layout.WGMMA)
    h = lax.fori_loop(0, frames, step, h)
    h_smem[...] = h
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(h_smem, last_ref.at[stream, rows, here])
    plgpu.wait_smem_to_gmem(0)


def _load_first(
    sources: Sequence[Any], memory: Sequence[Any], wg: Array, stream: Array, rows: Any, first: Array,
    width: int, taps: int, *, x_smem: Any, w_smem: Any, h_smem: Any, conv_smem: Any, conv_bias_smem: Any,
    gate_bias_smem: Any, rate_smem: Any, first_ready: Any, **others: Any,
) -> None:  # fmt: skip
    """What a warpgroup needs before the first frame: parameters, and the memory of frames before."""
    del others
    conv_kernel, conv_bias, blocks, gate_bias, rate = sources
    here, beside = pl.ds(first, COLUMNS), pl.ds(width + first, COLUMNS)
    pairs = [
        (conv_kernel.at[:, here], conv_smem.at[wg]),
        (conv_bias.at[here], conv_bias_smem.at[wg]),
        (gate_bias.at[here], gate_bias_smem.at[wg, 0]),
        (gate_bias.at[beside], gate_bias_smem.at[wg, 1]),
        (rate.at[here], rate_smem.at[wg]),
    ]
    for part in range(w_smem.shape[1]):
        pairs.append((blocks.at[lax.axis_index("block"), wg, part], w_smem.at[wg, part]))
    if memory:
        *befores, h = memory
        # Frame -1 has the slot before that of frame 0, and so on.
        pairs += [(before.at[stream, rows, here], x_smem.at[wg, 1 + i]) for i, before in enumerate(befores)]
        pairs.append((h.at[stream, rows, here], h_smem.at[wg]))
    ready = first_ready.at[wg]
    for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, ready)
    plgpu.barrier_wait(ready)


def _convolved(
    frames: Any, t: Array, reach: Array, wg: Array, taps: int, *, conv_smem: Any, conv_bias_smem: Any,
    **others: Any,
) -> Float[Array, "64 64"]:  # fmt: skip
    """v = b + sum_s w[J-1-s] x_(t-s) of a warpgroup's channels, s no more than `reach`."""
    del others

    def total(is_inside: Callable[[int, Array], Array]) -> Array:
        result = by_column(conv_bias_smem.at[wg])
        for age in range(taps + 1):
            x = tile(frames.at[hopper.slot_of(t + taps + 1 - age, taps + 1)])
            result = result + by_column(conv_smem.at[wg, taps - age]) * is_inside(age, x)
        return result

    def masked(age: int, x: Array) -> Array:
        return jnp.where(lax.broadcast(reach >= age, SHAPE), x, 0.0) if age else x

    return lax.cond(reach >= taps, lambda: total(lambda age, x: x), lambda: total(masked))


def _show(
    v: Array, t: Array, wg: Array, load: Callable[[], None], *, v_smem: Any, w_smem: Any, v_ready: Any,
    v_free: Any, **others: Any,
) -> None:  # fmt: skip
    """Puts v where the products read it. `load` runs when all of the warpgroup have convolved."""
    del others
    if w_smem.shape[1] > 1:
        pl.when(t > 0)(lambda: plgpu.barrier_wait(v_free))
    v_smem[wg] = v
    plgpu.commit_smem()
    if w_smem.shape[1] > 1:
        plgpu.barrier_arrive(v_ready)
    load()


def _gates(
    wg: Array, *, v_smem: Any, w_smem: Any, gate_bias_smem: Any, v_ready: Any, v_free: Any, **others: Any
) -> tuple[Float[Array, "64 64"], Float[Array, "64 64"]]:  # fmt: skip
    """Input gate and recurrence gate."""
    del others
    parts = w_smem.shape[1]
    if parts > 1:
        plgpu.barrier_wait(v_ready)

    def products(*accumulators: Any) -> tuple[Array, Array]:
        for part in range(parts):
            source = v_smem.at[part if parts > 1 else wg]
            for gate, accumulator in enumerate(accumulators):
                columns = pl.ds(gate * COLUMNS, COLUMNS)
                plgpu.wgmma(accumulator, source, w_smem.at[wg, part, :, columns])
        plgpu.wgmma_wait(0)
        return accumulators[0][...], accumulators[1][...]

    accumulator = plgpu.ACC(SHAPE, jnp.float32)
    sums = pl.run_scoped(products, accumulator, accumulator)
    if parts > 1:
        plgpu.barrier_arrive(v_free)
    # The biases are those of exponents in base 2.
    i, r = (sigmoid_base2(x * -LOG2E + by_column(gate_bias_smem.at[wg, gate])) for gate, x in enumerate(sums))
    return i, r
