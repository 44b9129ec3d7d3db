"""What the three Hopper kernels share: job lists, rings of tiles in shared memory, bias offsets, visibility.

Each kernel is persistent: a CTA works through a list of jobs (`work_lists`). One producer warpgroup streams
tiles by TMA through rings of slots, across the borders of jobs; the consumer warpgroups own 64 rows of the
job's block each. What a job owns (its q, say) has one or two buffers; the results leave through them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels.common.hopper import BY_COLUMN, BY_ROW, WARPGROUP, drain, slot_of

LOG2E = math.log2(math.e)


class Job(NamedTuple):
    """One block of one lane and its tiles: masked outside [full_begin, full_end). All int32 scalars."""

    lane: Array
    block: Array
    begin: Array
    full_begin: Array
    full_end: Array
    end: Array

    @property
    def steps(self) -> Array:
        return self.end - self.begin


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static shape of one kernel.

    Attributes:
      rows, columns: tile of queries x keys. A CTA owns the whole of one side, 64 per consumer warpgroup, and
        loops over tiles of the other.
      stages: tiles of the streamed operands in shared memory at a time.
      buffers: blocks of the owned operands in shared memory, 2 if the next job's load early.
      group: query heads per key/value head.
      sm_scale: scale of the scores, > 0.
      left_masks: whether keys may be invisible on the left of a visible one.
      causal_offset: row i sees keys up to i + causal_offset, if that is all there is; else None: spans are
        read.
      turns: whether consumer warpgroups of the forward kernel hand their products to the tensor cores in
        turn.
      overlap: whether the softmax of the forward kernel runs beside the output product of the tile before.
      dk, dv: which of the two gradients `backward_kv` computes; at head dim 256 registers hold one.
      row_span, column_span: of the backward kernels: rows, and keys, whose parts of the bias share a base:
        the tiles that `backward_kv` and `backward_q` stream.
      delta: whether `backward_q` forms delta itself, which takes another block of shared memory.
    """

    rows: int
    columns: int
    stages: int
    buffers: int
    group: int
    sm_scale: float
    left_masks: bool
    causal_offset: int | None
    turns: bool = False
    overlap: bool = False
    dk: bool = True
    dv: bool = True
    row_span: int = WARPGROUP
    column_span: int = WARPGROUP
    delta: bool = False

    @property
    def exponent(self) -> float:
        """Factor of accumulated scores in the base-2 exponent."""
        return self.sm_scale * LOG2E


def launch(
    body: Callable[..., None],
    name: str,
    ctas: int,
    consumers: int,
    outputs: Sequence[Any],
    scratch: dict[str, Any],
) -> Callable[..., Sequence[Array]]:
    """A kernel of `ctas` CTAs with `consumers` warpgroups that compute and one that loads."""
    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=f"forgetting_attention_{name}",
    )


def job_at(jobs_ref: Any, index: Array) -> Job:
    """The CTA's record at `index`, or its last one."""
    index = jnp.minimum(index, jobs_ref.shape[1] - 1)
    # Values read inside `jax.shard_map` say over which mesh axes they vary, which results inside a kernel do
    # not: adding 0 makes the two alike, as loop carries must be.
    return Job(*(jobs_ref[lax.axis_index("cta"), index, field] + 0 for field in range(6)))


def job_count(jobs_ref: Any) -> Array:
    """How many jobs the CTA has."""
    return jobs_ref[lax.axis_index("cta"), 0, 6]


class Ring(NamedTuple):
    """Slots that are handed back together.

    Attributes:
      free: barrier per slot, on which every consumer arrives when it has read the slot.
      loads: (source, buffers, barrier per slot) of what a slot holds.
    """

    free: Any
    loads: Sequence[tuple[Any, Any, Any]]


def stream(rings: Sequence[Ring], begin: Array, end: Array, done: Array, size: int, stages: int) -> Array:
    """Loads tiles [begin, end) of `size` rows, `done` tiles after the rings' start; returns the tiles
    loaded.
    """

    @pl.loop(begin, end)
    def _(tile: Array) -> None:
        step = done + (tile - begin)
        slot, rows = slot_of(step, stages), pl.ds(tile * size, size)
        for ring in rings:

            @pl.when(step >= stages)
            def _(ring: Ring = ring) -> None:
                plgpu.barrier_wait(ring.free.at[slot])

            for source, target, ready in ring.loads:
                plgpu.copy_gmem_to_smem(source.at[rows], target.at[slot], ready.at[slot])

    return done + (end - begin)


class Owned(NamedTuple):
    """What a job owns: blocks of `size` rows in buffers of their own.

    Attributes:
      loads: (rows -> source, buffers [buffers, consumers, 64, H]).
      ready: barrier per buffer, on which every load arrives.
      free: barrier per buffer, on which every consumer arrives when the results have left through it.
    """

    loads: Sequence[tuple[Callable[[Any], Any], Any]]
    ready: Any
    free: Any

    def load(self, index: Array, block: Array, size: int, buffers: int) -> None:
        """Loads the block of the CTA's job number `index`."""
        buffer = slot_of(index, buffers)

        @pl.when(index >= buffers)
        def _() -> None:
            plgpu.barrier_wait(self.free.at[buffer])

        for wg in range(size // WARPGROUP):
            rows = pl.ds(block * size + wg * WARPGROUP, WARPGROUP)
            for source, target in self.loads:
                plgpu.copy_gmem_to_smem(source(rows), target.at[buffer, wg], self.ready.at[buffer])


def produce_jobs(
    jobs_ref: Any,
    load_job: Callable[[Array, Array], Array],
    plan: Plan,
    *,
    own_free: Any,
    ring_free: Sequence[Any],
) -> None:
    """Runs `load_job(index, tiles loaded before)`, which returns the tiles loaded since, for the CTA's
    jobs.
    """
    count = job_count(jobs_ref)
    done = lax.fori_loop(0, count, load_job, jnp.int32(0))
    drain(done, plan.stages, *ring_free)
    drain(count, plan.buffers, own_free)


def consume_jobs(
    jobs_ref: Any,
    one_job: Callable[[Array, tuple[Job, Array, Any]], tuple[Job, Array, Any]],
    ahead: Callable[[Job], Any],
) -> None:
    """Runs `one_job(index, (job, tiles before, ahead(job)))`, which returns these of the next job, for the
    CTA's jobs.
    """
    count, first = job_count(jobs_ref), job_at(jobs_ref, jnp.int32(0))
    lax.fori_loop(0, count, one_job, (first, jnp.int32(0), ahead(first)))
    plgpu.wait_smem_to_gmem(0)


def base_offset(bases: tuple[Any, Any], tile: Array, own: tuple[Array, Array], unit: float) -> Array:
    """Bias between the bases of a tile and of the own block, times `unit`; `tile` may lie one beyond the end.

    Args:
      bases: hi and lo parts at the bases of the lane's tiles.
      tile: which of them.
      own: hi and lo parts at the base of the own block.
      unit: a constant factor.
    """
    hi, lo = bases
    tile = jnp.minimum(tile, hi.shape[0] - 1)
    return ((hi[tile] + own[0]) + (lo[tile] + own[1])) * unit


class Spans(NamedTuple):
    """Visible keys: of every row of the lane the first, of the batch entry the last. Unread in plain causal
    attention.
    """

    first: Any
    last: Any


def visible(
    row0: Array, key0: Array, shape: tuple[int, ...], spans: Spans, plan: Plan, *, transposed: bool = False
) -> Array:
    """Which entries of a tile (queries x keys, or keys x queries if transposed) are visible."""
    row_axis, key_axis = (1, 0) if transposed else (0, 1)
    keys = key0 + plgpu.broadcasted_iota(jnp.int32, shape, key_axis, layout=plgpu.Layout.WGMMA)
    if plan.causal_offset is not None:
        rows = plgpu.broadcasted_iota(jnp.int32, shape, row_axis, layout=plgpu.Layout.WGMMA)
        return keys <= rows + (row0 + plan.causal_offset)
    seen = keys <= along_axis(spans.last, row0, shape, row_axis)
    if plan.left_masks:
        seen &= keys >= along_axis(spans.first, row0, shape, row_axis)
    return seen


def along_axis(ref: Any, start: Array, shape: tuple[int, ...], axis: int) -> Array:
    """One value per row (axis 0) or column of a tile, from global memory, broadcast to the tile."""
    layout = BY_ROW if axis == 0 else BY_COLUMN
    values = plgpu.load(ref.at[pl.ds(start, shape[axis])], layout=layout, optimized=False)
    return lax.broadcast_in_dim(values, shape, [axis])


def over_tiles(job: Job, step: Callable[..., Any], carry: Any, *, before: bool, after: bool) -> Any:
    """Runs `step(tile, carry, masked=)` over the job's tiles.

    Args:
      job: its tiles; those outside [full_begin, full_end) have invisible entries.
      before, after: whether there may be such tiles on either side; else those there count as full.
    """

    def masked(tile: Array, carry: Any) -> Any:
        return step(tile, carry, masked=True)

    def full(tile: Array, carry: Any) -> Any:
        return step(tile, carry, masked=False)

    begin, full_end = job.begin, job.end
    if before:
        begin = jnp.maximum(begin, job.full_begin)
        carry = lax.fori_loop(job.begin, begin, masked, carry)
    if after:
        full_end = jnp.maximum(begin, job.full_end)
    carry = lax.fori_loop(begin, full_end, full, carry)
    return lax.fori_loop(full_end, job.end, masked, carry) if after else carry


def accumulator(shape: tuple[int, int]) -> Array:
    """Float32 zeros in the layout of a wgmma accumulator."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def per_row(fill: float) -> Array:
    """Float32 registers: one value per row of a warpgroup."""
    return plgpu.layout_cast(jnp.full((WARPGROUP,), fill, jnp.float32), BY_ROW)


def by_row(values: Array, shape: tuple[int, ...]) -> Array:
    """One value per row, broadcast to the shape of a tile."""
    return lax.broadcast_in_dim(values, shape, [0])


def multiply(accumulator: Array, a: Any, b: Any) -> Array:
    """accumulator + a b, waiting for the tensor cores."""

    def product(ref: Any) -> None:
        plgpu.wgmma(ref, a, b)

    return pl.run_state(product)(plgpu.ACC.init(accumulator))


def divided(lane: Array, by: int) -> tuple[Array, Array]:
    """Quotient and remainder."""
    return lax.div(lane, jnp.int32(by)), lax.rem(lane, jnp.int32(by))
