"""How the Hopper scan kernels move data: rows of a few channels stream through shared memory while they run.

Work is cut into strips of 128 channels of one batch entry, one channel per thread of the only warpgroup. A
CTA takes strips one after the other, and their chunks of steps in the order of the recurrence; TMA loads run
`stages` chunks ahead, across the borders of strips, and stores run behind. The state stays in registers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels.common.tiling import ceil_div

CHANNELS = 128
LAYOUT = plgpu.Layout.WG_STRIDED((CHANNELS,), 1)
# Steps whose loads and gates the compiler may put before the recurrence needs them.
UNROLL = 8
# Shorter sequences are padded to whole groups of that many steps.
SHORT = 32
SHARED_BYTES = 220 * 1024
OUTPUT_BUFFERS = 2
# Bytes loaded and stored per step and channel from which one CTA keeps a multiprocessor's share of memory
# busy; a second one hides what the first waits for where there are fewer, and is in its way where not.
WIDE = 16
# Float32s in 128 bytes: what TMA copies must begin at a multiple of that in shared memory.
ALIGNED = 32


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static shape of one kernel.

    Attributes:
      batch, length, width: B, T, D.
      steps: of a chunk, a multiple of 8.
      stages: chunks of the inputs in shared memory at a time.
      ctas: how many there are.
      descending: whether chunks and steps are taken from the last one to the first.
    """

    batch: int
    length: int
    width: int
    steps: int
    stages: int
    ctas: int
    descending: bool

    @property
    def chunks(self) -> int:
        """Of a strip."""
        return ceil_div(self.length, self.steps)

    @property
    def strips(self) -> int:
        """Of the batch."""
        return self.batch * ceil_div(self.width, CHANNELS)


def make_plan(
    shape: Sequence[int], row_bytes: int, output_row_bytes: int, cores: int, *, descending: bool
) -> Plan:
    """The longest chunks of which three and more fit, in as few CTAs as keep memory busy.

    Args:
      shape: B, T, D.
      row_bytes, output_row_bytes: of all loaded and stored arrays, per step and channel.
      cores: multiprocessors.
      descending: see `Plan`.
    """
    batch, length, width = shape
    strips = batch * ceil_div(width, CHANNELS)

    def stages(per_core: int, steps: int) -> int:
        stored = OUTPUT_BUFFERS * steps * output_row_bytes * CHANNELS
        return min(6, (SHARED_BYTES // per_core - stored) // ((steps + 1) * row_bytes * CHANNELS))

    # No longer than the arrays, which are padded if they are short.
    longest = (ceil_div(length, UNROLL) if length < SHORT else length // UNROLL) * UNROLL

    def even(size: int) -> int:
        """Steps of chunks of up to `size`, such that the last one has little to spare."""
        return min(ceil_div(ceil_div(length, ceil_div(length, size)), UNROLL) * UNROLL, longest)

    per_core = min(1 if row_bytes + output_row_bytes >= WIDE else 2, ceil_div(strips, cores))
    steps = next(even(size) for size in (64, 32, 16, 8) if stages(per_core, even(size)) >= 3)
    ctas = min(strips, per_core * cores)
    return Plan(batch, length, width, steps, stages(per_core, steps), ctas, descending)


class Chunk(NamedTuple):
    """Where a chunk lies. All int32 scalars.

    Attributes:
      entry, block: batch entry and block of channels.
      begin: first step.
      rows: steps in it; fewer than `plan.steps` in a last one.
      is_first, is_last: of its strip, in the order of the recurrence.
    """

    entry: Array
    block: Array
    begin: Array
    rows: Array
    is_first: Array
    is_last: Array

    @property
    def channels(self) -> Any:
        """Slice of the width."""
        return pl.ds(self.block * CHANNELS, CHANNELS)


class Load(NamedTuple):
    """An array [B, T, D] that is read, and its slots in shared memory.

    `shift` is 0, or -1 or +1 where also the step before, or after, the chunk's is wanted: then a slot has one
    row more.
    """

    source: Any
    slots: Any
    shift: int = 0

    def start(self, chunk: Chunk, slot: Array, ready: Any, plan: Plan) -> None:
        """Loads a chunk, and the step beside it."""
        rows = pl.ds(chunk.begin, plan.steps)
        target = self.slots.at[slot]
        if not self.shift:
            plgpu.copy_gmem_to_smem(self.source.at[chunk.entry, rows, chunk.channels], target, ready)
            return
        # The row beyond the sequence's end is somebody's initial state: what is loaded there is not used.
        extra = jnp.clip(chunk.begin + (plan.steps if self.shift > 0 else -1), 0, jnp.int32(plan.length - 1))
        inner = pl.ds(0 if self.shift > 0 else 1, plan.steps)
        outer = pl.ds(plan.steps if self.shift > 0 else 0, 1)
        source = self.source.at[chunk.entry, rows, chunk.channels]
        plgpu.copy_gmem_to_smem(source, target.at[inner], ready)
        source = self.source.at[chunk.entry, pl.ds(extra, 1), chunk.channels]
        plgpu.copy_gmem_to_smem(source, target.at[outer], ready)


class RowLoad(NamedTuple):
    """An array [B, T'] that is read, a number per step, T' a multiple of 8 and no less than T."""

    source: Any
    slots: Any

    def start(self, chunk: Chunk, slot: Array, ready: Any, plan: Plan) -> None:
        """Loads a chunk's numbers."""
        rows, target = pl.ds(chunk.begin, plan.steps), self.slots.at[slot, pl.ds(0, plan.steps)]
        plgpu.copy_gmem_to_smem(self.source.at[chunk.entry, rows], target, ready)


class Store(NamedTuple):
    """An array [B, T, D] that is written, and its buffers in shared memory."""

    target: Any
    buffers: Any

    def start(self, chunk: Chunk, buffer: Array, plan: Plan) -> None:
        """Stores a chunk; steps beyond the sequence's end are not written."""
        rows = pl.ds(chunk.begin, plan.steps)
        target = self.target.at[chunk.entry, rows, chunk.channels]
        plgpu.copy_smem_to_gmem(self.buffers.at[buffer], target, commit_group=False)


def chunk_at(plan: Plan, step: Array) -> Chunk:
    """The chunk that the CTA takes as number `step`."""
    strip = lax.axis_index("cta") + lax.div(step, jnp.int32(plan.chunks)) * plan.ctas
    place = lax.rem(step, jnp.int32(plan.chunks))
    begin = ((plan.chunks - 1 - place) if plan.descending else place) * plan.steps
    rows = jnp.minimum(jnp.int32(plan.steps), plan.length - begin)
    # CTAs next to each other read strips next to each other.
    blocks = jnp.int32(plan.strips // plan.batch)
    entry, block = lax.div(strip, blocks), lax.rem(strip, blocks)
    return Chunk(entry, block, begin, rows, place == 0, place == plan.chunks - 1)


def stream(
    plan: Plan,
    loads: Sequence[Load | RowLoad],
    stores: Sequence[Store],
    ready: Any,
    begin: Callable[[Chunk, Array, Any], Any],
    inputs: Callable[[Array, Array, Any], Any],
    update: Callable[[Any, Any], tuple[Any, Sequence[Array]]],
    end: Callable[[Chunk, Any], None],
    carry: Any,
) -> None:
    """Runs all of the CTA's chunks.

    Args:
      plan: static shape.
      loads, stores: arrays.
      ready: barrier per slot, with as many arrivals as there are copies.
      begin: (chunk, slot, carry) -> carry, before its first step, when it has been loaded.
      inputs: (slot, row, carry) -> what `update` needs of a row; `carry` is that of some row before, of which
        only what stays the same within a strip may be used. Of several rows it is computed before the first
        update, for a store would keep later loads from being issued early.
      update: (inputs, carry) -> (carry, a row of each of the stores), for every row of the chunk in order.
      end: (chunk, carry), after its last step.
      carry: registers, whatever is in them at first.
    """
    strips = lax.div(plan.strips - 1 - lax.axis_index("cta"), jnp.int32(plan.ctas)) + 1
    total = strips * plan.chunks

    def load(number: Array) -> None:
        @pl.when(number < total)
        def _() -> None:
            slot = lax.rem(number, jnp.int32(plan.stages))
            for array in loads:
                array.start(chunk_at(plan, number), slot, ready.at[slot], plan)

    @pl.loop(0, plan.stages)
    def _(number: Array) -> None:
        load(number)

    def run(number: Array, carry: Any) -> Any:
        slot, buffer = lax.rem(number, jnp.int32(plan.stages)), lax.rem(number, jnp.int32(OUTPUT_BUFFERS))
        chunk = chunk_at(plan, number)
        plgpu.barrier_wait(ready.at[slot])
        carry = begin(chunk, slot, carry)
        # The stores that left from this buffer have been read out of it.
        plgpu.wait_smem_to_gmem(OUTPUT_BUFFERS - 1, wait_read_only=True)

        def row_at(index: Array) -> Array:
            return chunk.rows - 1 - index if plan.descending else index

        def advance(rows: Sequence[Array], carry: Any) -> Any:
            read = [inputs(slot, row, carry) for row in rows]
            for row, values in zip(rows, read, strict=True):
                carry, results = update(values, carry)
                for array, result in zip(stores, results, strict=True):
                    array.buffers[buffer, row] = result.astype(array.buffers.dtype)
            return carry

        def several(group: Array, carry: Any) -> Any:
            return advance([row_at(group * UNROLL + index) for index in range(UNROLL)], carry)

        groups = lax.div(chunk.rows, jnp.int32(UNROLL))
        carry = lax.fori_loop(0, groups, several, carry)
        if plan.length % UNROLL:
            rest = groups * UNROLL
            carry = lax.fori_loop(rest, chunk.rows, lambda i, carry: advance([row_at(i)], carry), carry)
        end(chunk, carry)
        plgpu.commit_smem()  # also: every thread has read its slot
        for array in stores:
            array.start(chunk, buffer, plan)
        plgpu.commit_smem_to_gmem_group()
        load(number + plan.stages)
        return carry

    lax.fori_loop(0, total, run, carry)
    plgpu.wait_smem_to_gmem(0)


def shared(
    plan: Plan, loads: Sequence[tuple[Any, int]], stores: Sequence[Any], *, by_row: int = 0
) -> dict[str, Any]:
    """Scratch of a kernel: slots of all loads, buffers of all stores, a barrier per slot.

    Args:
      plan: static shape.
      loads: dtype and shift of each `Load`.
      stores: dtype of each `Store`.
      by_row: how many `RowLoad`s of float32 follow the loads.
    """
    slots = [plgpu.SMEM((plan.stages, plan.steps + (shift != 0), CHANNELS), dtype) for dtype, shift in loads]
    slots += [plgpu.SMEM((plan.stages, ceil_div(plan.steps, ALIGNED) * ALIGNED), jnp.float32)] * by_row
    buffers = [plgpu.SMEM((OUTPUT_BUFFERS, plan.steps, CHANNELS), dtype) for dtype in stores]
    copies = sum(1 + (shift != 0) for _, shift in loads) + by_row
    return {
        "slots": slots,
        "buffers": buffers,
        "ready": plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages),
    }


def launch(body: Callable[..., None], name: str, plan: Plan, outputs: Sequence[Any], scratch: Any) -> Any:
    """A kernel of `plan.ctas` CTAs with one warpgroup each.

    Pallas would put a barrier of the warpgroup before and after every store of a row. None is needed: what a
    thread reads of memory that threads write is what it wrote itself, and copies by TMA begin and end at
    barriers of `stream`.
    """
    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=(plan.ctas,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=f"linear_scan_{name}",
    )


def read(ref: Any) -> Array:
    """A strip's row from memory as float32, a channel per thread."""
    return plgpu.load(ref, layout=LAYOUT, optimized=False).astype(jnp.float32)


def started(chunk: Chunk, initial_ref: Any | None, carry: Array) -> Array:
    """The carry, or the initial values [B or 1, Dp] of a strip that begins: zeros without a reference."""
    return lax.cond(chunk.is_first, lambda: initial(chunk, initial_ref), lambda: carry)


def initial(chunk: Chunk, ref: Any | None) -> Array:
    """A strip's values of [B, Dp], or of [1, Dp] for all entries; zeros without a reference."""
    if ref is None:
        return zeros()
    return read(ref.at[chunk.entry if ref.shape[0] > 1 else 0, chunk.channels])


def zeros() -> Array:
    """Float32 registers."""
    return plgpu.layout_cast(jnp.zeros((CHANNELS,), jnp.float32), LAYOUT)


def per_strip(plan: Plan) -> jax.ShapeDtypeStruct:
    """Float32 [B, D], D padded to whole strips."""
    return jax.ShapeDtypeStruct((plan.batch, ceil_div(plan.width, CHANNELS) * CHANNELS), jnp.float32)


def put_initial_state(chunk: Chunk, slot: Array, h0_ref: Any | None, h_slots: Any, shift: int) -> None:
    """Puts h0 beside the first step of the recurrence, where `shift` makes room for the step before it.

    Every thread reads back no other channel than it writes.
    """

    @pl.when(chunk.is_last)  # the gradient comes to that step last
    def _() -> None:
        row = chunk.rows if shift > 0 else 0
        h_slots[slot, row] = initial(chunk, h0_ref).astype(h_slots.dtype)
