"""Forward kernel of forgetting attention for Hopper (sm_90a), written with Pallas Mosaic GPU.

Scores are accumulators of q.k that start from the column part of the decay bias, so the bias costs no
arithmetic: s = q.k + col_j, exponent = c s + offset(tile) in base 2, c = sm_scale log2(e). Each step of a
warpgroup hands the tensor cores the output product of the previous tile together with the scores of the next.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels.common import hopper
from kernels.common.hopper import WARPGROUP
from kernels.forgetting_attention import _mosaic_gpu_sm90 as sm90
from kernels.forgetting_attention._mosaic_gpu_sm90 import LOG2E, Job, Plan

# Below every real score: a row that has seen nothing yet. Finite, so that differences of maxima are not NaN.
NOTHING_SEEN = -1e30


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    col: Float[Array, "G Sp"],
    row_base: Float[Array, "2 G Mr"],
    col_base: Float[Array, "2 G Mc"],
    jobs: Int[Array, "C P 7"],
    first: Int[Array, "*first"],
    last: Int[Array, "*last"],
    *,
    plan: Plan,
) -> tuple[Float[Array, "B T N H"], Float[Array, "G Tp"]]:
    """Attention output, and the base-2 log-normaliser relative to the row block's base.

    Args:
      q, k, v: 16-bit; T and S multiples of 8 and no less than a tile; H in {64, 128, 256}.
      col: column part of the decay bias from its tile's base on, divided by sm_scale; G = B * N, whole tiles.
      row_base, col_base: hi and lo parts of the bias at the bases of row blocks and column tiles, natural
        log.
      jobs: see `work_lists`; every job has at least one tile.
      first, last: visible keys of every row, [G, Tp] and [B, Tp]; read only if `plan.causal_offset` is None.
      plan: static choices.
    """
    batch, _, heads, head_dim = q.shape
    consumers = plan.rows // WARPGROUP
    ring = hopper.tiles((plan.stages, plan.columns, head_dim), k.dtype)
    kernel = sm90.launch(
        functools.partial(_kernel, plan=plan, heads=heads),
        "forward",
        jobs.shape[0],
        consumers,
        [
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch * heads, row_base.shape[2] * plan.rows), jnp.float32),
        ],
        {
            "q_smem": hopper.tiles((plan.buffers, consumers, WARPGROUP, head_dim), q.dtype),
            "k_smem": ring,
            "v_smem": ring,
            "col_smem": plgpu.SMEM((plan.stages, plan.columns), jnp.float32),
            "lse_smem": plgpu.SMEM((plan.buffers, consumers, WARPGROUP), jnp.float32),
            "q_ready": plgpu.Barrier(num_arrivals=consumers, num_barriers=plan.buffers),
            "q_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=plan.buffers),
            "k_ready": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
            "v_ready": plgpu.Barrier(num_barriers=plan.stages),
            "k_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=plan.stages),
            "v_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=plan.stages),
            "turn": plgpu.Barrier(num_barriers=consumers),
        },
    )
    out, lse = kernel(q, k, v, col, row_base, col_base, jobs, first, last)
    return out, lse


class _Inputs(NamedTuple):
    """References to the operands in global memory."""

    q: Any
    k: Any
    v: Any
    col: Any
    row_base: Any
    col_base: Any
    jobs: Any
    first: Any
    last: Any


def _kernel(*refs: Any, plan: Plan, heads: int, **scratch: Any) -> None:
    inputs, out_ref, lse_ref = _Inputs(*refs[:-2]), refs[-2], refs[-1]

    hopper.warpgroups(
        plan.rows // WARPGROUP,
        lambda: _produce(inputs, plan, heads, **scratch),
        lambda wg: _consume(inputs, out_ref, lse_ref, wg, plan, heads, scratch),
    )


def _produce(
    inputs: _Inputs, plan: Plan, heads: int, *, q_smem: Any, k_smem: Any, v_smem: Any, col_smem: Any,
    q_ready: Any, q_free: Any, k_ready: Any, v_ready: Any, k_free: Any, v_free: Any, **_: Any,
) -> None:  # fmt: skip
    """Streams the queries and key tiles of all jobs."""

    def load_job(index: Array, done: Array) -> Array:
        job = sm90.job_at(inputs.jobs, index)
        batch, head = sm90.divided(job.lane, heads)
        own = sm90.Owned([(lambda rows: inputs.q.at[batch, rows, head], q_smem)], q_ready, q_free)
        own.load(index, job.block, plan.rows, plan.buffers)
        kv_head = lax.div(head, jnp.int32(plan.group))
        key_loads = (
            (inputs.k.at[batch, :, kv_head], k_smem, k_ready),
            (inputs.col.at[job.lane], col_smem, k_ready),
        )
        rings = (
            sm90.Ring(k_free, key_loads),
            sm90.Ring(v_free, ((inputs.v.at[batch, :, kv_head], v_smem, v_ready),)),
        )
        return sm90.stream(rings, job.begin, job.end, done, plan.columns, plan.stages)

    sm90.produce_jobs(inputs.jobs, load_job, plan, own_free=q_free, ring_free=(k_free, v_free))


def _consume(
    inputs: _Inputs, out_ref: Any, lse_ref: Any, wg: Array, plan: Plan, heads: int, scratch: dict[str, Any]
) -> None:
    """One warpgroup's rows of all jobs."""
    consumers = plan.rows // WARPGROUP
    if plan.turns:
        pl.when(wg == consumers - 1)(lambda: plgpu.barrier_arrive(scratch["turn"].at[0]))

    def base_of(job: Job) -> tuple[Array, Array]:
        return inputs.row_base[0, job.lane, job.block], inputs.row_base[1, job.lane, job.block]

    def one_job(index: Array, carry: Any) -> Any:
        job, done, base = carry
        batch, head = sm90.divided(job.lane, heads)
        buffer = hopper.slot_of(index, plan.buffers)
        row0 = job.block * plan.rows + wg * WARPGROUP
        strip = _Strip(
            plan, job, done, row0, wg, base,
            col_bases=(inputs.col_base.at[0, job.lane], inputs.col_base.at[1, job.lane]),
            spans=sm90.Spans(inputs.first.at[job.lane], inputs.last.at[batch]),
            q_smem=scratch["q_smem"].at[buffer, wg],
            scratch=scratch,
        )  # fmt: skip
        plgpu.barrier_wait(scratch["q_ready"].at[buffer])
        acc, top, total = strip.attend()
        following = sm90.job_at(inputs.jobs, index + 1)
        _store(acc, top, total, strip.q_smem, scratch["lse_smem"].at[buffer, wg])
        rows = pl.ds(row0, WARPGROUP)
        plgpu.copy_smem_to_gmem(strip.q_smem, out_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(scratch["lse_smem"].at[buffer, wg], lse_ref.at[job.lane, rows])
        next_base = base_of(following)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(scratch["q_free"].at[buffer])
        return following, done + job.steps, next_base

    sm90.consume_jobs(inputs.jobs, one_job, base_of)


def _store(acc: Array, top: Array, total: Array, out_smem: Any, lse_smem: Any) -> None:
    """Normalises the output; rows without a key give 0 and -inf."""
    seen = total > 0
    scale = jnp.where(seen, 1 / total, 0.0)
    out_smem[...] = (acc * sm90.by_row(scale, acc.shape)).astype(out_smem.dtype)
    lse_smem[...] = jnp.where(seen, top + jnp.log(total) * LOG2E, -jnp.inf)
    plgpu.commit_smem()


@dataclasses.dataclass(frozen=True)
class _Strip:
    """The rows of one warpgroup in one job, and what they read.

    Attributes:
      done: tiles in the rings before this job's.
      row0: first row.
      base: hi and lo parts of the decay bias at the base of the block.
      col_bases: the same at the bases of the lane's column tiles.
    """

    plan: Plan
    job: Job
    done: Array
    row0: Array
    wg: Array
    base: tuple[Array, Array]
    col_bases: tuple[Any, Any]
    spans: sm90.Spans
    q_smem: Any
    scratch: dict[str, Any]

    def attend(self) -> tuple[Array, Array, Array]:
        """Accumulator, base-2 maximum and sum of weights."""
        begin = self.job.begin
        acc = sm90.accumulator((WARPGROUP, self.q_smem.shape[-1]))
        weights, top, total, _ = self._softmax(
            self._scores(begin),
            sm90.per_row(NOTHING_SEEN),
            sm90.per_row(0.0),
            self._offset(begin),
            begin,
            True,
        )
        carry = (acc, top, total, self._offset(begin + 1), weights.astype(self.q_smem.dtype))
        rest = self.job._replace(begin=begin + 1)
        acc, top, total, _, weights = sm90.over_tiles(
            rest, self._step, carry, before=self.plan.left_masks, after=True
        )
        slot = self._slot(self.job.end - 1)
        plgpu.barrier_wait(self.scratch["v_ready"].at[slot])
        acc = sm90.multiply(acc, weights, self.scratch["v_smem"].at[slot])
        plgpu.barrier_arrive(self.scratch["v_free"].at[slot])
        return acc, top, total

    def _step(self, tile: Array, carry: Any, masked: bool) -> Any:
        """Scores of this tile and output of the previous one go to the tensor cores together."""
        acc, top, total, shift, weights = carry
        slot, before, next_shift = self._slot(tile), self._slot(tile - 1), self._offset(tile + 1)
        bias = self._bias(slot)
        plgpu.barrier_wait(self.scratch["v_ready"].at[before])

        def both(refs: Any) -> None:
            s_ref, acc_ref, top_ref, total_ref, p_ref, rescale_ref = refs
            keys = self.scratch["k_smem"].at[slot].transpose((1, 0))
            values = self.scratch["v_smem"].at[before]
            self._take_turn()
            if self.plan.overlap:
                plgpu.wgmma(s_ref, self.q_smem, keys)
                plgpu.wgmma(acc_ref, weights, values)
            else:
                plgpu.wgmma(acc_ref, weights, values)
                plgpu.wgmma(s_ref, self.q_smem, keys)
            self._pass_turn()
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1 if self.plan.overlap else 0)
            plgpu.barrier_arrive(self.scratch["k_free"].at[slot])
            if not self.plan.overlap:
                plgpu.barrier_arrive(self.scratch["v_free"].at[before])
            p, top_ref[...], total_ref[...], rescale_ref[...] = self._softmax(
                s, top, total, shift, tile, masked
            )
            p_ref[...] = p if self.plan.overlap else p.astype(self.q_smem.dtype)

        # The product still reads the old weights: until it is done the new ones stay wide, beside them.
        p = bias if self.plan.overlap else weights
        state = (plgpu.ACC.init(bias), plgpu.ACC.init(acc), top, total, p, top)
        _, acc, top, total, p, rescale = pl.run_state(both)(state)
        if self.plan.overlap:
            plgpu.barrier_arrive(self.scratch["v_free"].at[before])
        weights = p.astype(self.q_smem.dtype)
        return acc * sm90.by_row(rescale, acc.shape), top, total, next_shift, weights

    def _softmax(self, s: Array, top: Array, total: Array, shift: Array, tile: Array, masked: bool) -> Any:
        """Weights of a tile, the new maximum and sum, and what the accumulator must be rescaled by."""
        plan = self.plan
        if masked:
            seen = sm90.visible(self.row0, tile * plan.columns, s.shape, self.spans, plan)
            s = jnp.where(seen, s, -jnp.inf)
        new_top = jnp.maximum(top, s.max(axis=1) * plan.exponent + shift)
        rescale = jnp.exp2(top - new_top)
        p = jnp.exp2(s * plan.exponent - sm90.by_row(new_top - shift, s.shape))
        return p, new_top, total * rescale + p.sum(axis=1), rescale

    def _scores(self, tile: Array) -> Array:
        slot = self._slot(tile)
        bias = self._bias(slot)
        s = sm90.multiply(bias, self.q_smem, self.scratch["k_smem"].at[slot].transpose((1, 0)))
        plgpu.barrier_arrive(self.scratch["k_free"].at[slot])
        return s

    def _bias(self, slot: Array) -> Array:
        """Where the accumulator of scores starts: the column part of the bias, once the tile is there."""
        plgpu.barrier_wait(self.scratch["k_ready"].at[slot])
        return hopper.by_column(self.scratch["col_smem"].at[slot], (WARPGROUP, self.plan.columns))

    def _offset(self, tile: Array) -> Array:
        return sm90.base_offset(self.col_bases, tile, self.base, LOG2E)

    def _slot(self, tile: Array) -> Array:
        return hopper.slot_of(self.done + (tile - self.job.begin), self.plan.stages)

    def _take_turn(self) -> None:
        """Waits for the warpgroup before this one to hand its products over, so that they stay out of
        step.
        """
        if self.plan.turns:
            plgpu.barrier_wait(self.scratch["turn"].at[self.wg])

    def _pass_turn(self) -> None:
        if self.plan.turns:
            consumers = self.plan.rows // WARPGROUP
            plgpu.barrier_arrive(self.scratch["turn"].at[lax.rem(self.wg + 1, jnp.int32(consumers))])
