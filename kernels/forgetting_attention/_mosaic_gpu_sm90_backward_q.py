"""Backward kernel of forgetting attention for Hopper (sm_90a): the gradient of q, and row sums of dS.

Scores and weights are recomputed as in `backward_kv`; here score accumulators start from the column part of
the decay bias and those of dP = dO v from -delta.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels.forgetting_attention import _mosaic_gpu_sm90 as sm90
from kernels.forgetting_attention._mosaic_gpu_sm90 import WARPGROUP, BackwardInputs, Job, Plan


def backward_q(inputs: BackwardInputs, *, plan: Plan) -> tuple[Array, Array]:
    """Gradient of q [B, T, N, H], and the row sums of dS [G, Tp].

    Args:
      inputs: with jobs of row blocks.
      plan: static choices.
    """
    q, k = inputs.q, inputs.k
    head_dim, consumers = q.shape[3], plan.rows // WARPGROUP
    own = sm90.tiles((plan.buffers, consumers, WARPGROUP, head_dim), q.dtype)
    ring = sm90.tiles((plan.stages, plan.columns, head_dim), k.dtype)
    kernel = sm90.launch(
        functools.partial(_kernel, plan=plan, heads=q.shape[2]),
        "backward_q",
        inputs.jobs.shape[0],
        consumers,
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(inputs.row.shape, jnp.float32)],
        {
            "q_smem": own, "do_smem": own, "k_smem": ring, "v_smem": ring,
            "col_smem": plgpu.SMEM((plan.stages, plan.columns), jnp.float32),
            "sum_smem": plgpu.SMEM((plan.buffers, consumers, WARPGROUP), jnp.float32),
            "own_ready": plgpu.Barrier(num_arrivals=2 * consumers, num_barriers=plan.buffers),
            "own_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=plan.buffers),
            "k_ready": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
            "v_ready": plgpu.Barrier(num_barriers=plan.stages),
            "free": plgpu.Barrier(num_arrivals=consumers, num_barriers=plan.stages),
        },
    )  # fmt: skip
    d_q, sums = kernel(*inputs)
    return d_q, sums


def _kernel(*refs: Any, plan: Plan, heads: int, **scratch: Any) -> None:
    inputs, dq_ref, sum_ref = BackwardInputs(*refs[:-2]), refs[-2], refs[-1]

    sm90.warpgroups(
        plan.rows // WARPGROUP,
        lambda: _produce(inputs, plan, heads, **scratch),
        lambda wg: _consume(inputs, dq_ref, sum_ref, wg, plan, heads, scratch),
    )


def _produce(
    inputs: BackwardInputs, plan: Plan, heads: int, *, q_smem: Any, do_smem: Any, k_smem: Any,
    v_smem: Any, col_smem: Any, own_ready: Any, own_free: Any, k_ready: Any, v_ready: Any, free: Any,
    **_: Any,
) -> None:  # fmt: skip
    """Streams the rows of all jobs and their key tiles."""

    def load_job(index: Array, done: Array) -> Array:
        job = sm90.job_at(inputs.jobs, index)
        batch, head = sm90.divided(job.lane, heads)
        owned = (
            (lambda rows: inputs.q.at[batch, rows, head], q_smem),
            (lambda rows: inputs.d_out.at[batch, rows, head], do_smem),
        )
        sm90.Owned(owned, own_ready, own_free).load(index, job.block, plan.rows, plan.buffers)
        kv_head = lax.div(head, jnp.int32(plan.group))
        loads = (
            (inputs.k.at[batch, :, kv_head], k_smem, k_ready),
            (inputs.col.at[job.lane], col_smem, k_ready),
            (inputs.v.at[batch, :, kv_head], v_smem, v_ready),
        )
        return sm90.stream((sm90.Ring(free, loads),), job.begin, job.end, done, plan.columns, plan.stages)

    sm90.produce_jobs(inputs.counts, load_job, plan, own_free=own_free, ring_free=(free,))


def _consume(
    inputs: BackwardInputs,
    dq_ref: Any,
    sum_ref: Any,
    wg: Array,
    plan: Plan,
    heads: int,
    scratch: dict[str, Any],
) -> None:
    """One warpgroup's rows of all jobs."""

    def one_job(index: Array, carry: tuple[Job, Array]) -> tuple[Job, Array]:
        job, done = carry
        batch, head = sm90.divided(job.lane, heads)
        buffer = sm90.slot_of(index, plan.buffers)
        row0 = job.block * plan.rows + wg * WARPGROUP
        rows = pl.ds(row0, WARPGROUP)
        own = {name: scratch[name].at[buffer, wg] for name in ("q_smem", "do_smem", "sum_smem")}
        row, delta = (
            plgpu.load(ref.at[job.lane, rows], layout=sm90.BY_ROW, optimized=False)
            for ref in (inputs.row, inputs.minus_delta)
        )
        strip = _Strip(
            plan, job, done, row0,
            row=row * plan.exponent,
            minus_delta=delta,
            base=(inputs.row_base[0, job.lane, job.block], inputs.row_base[1, job.lane, job.block]),
            col_bases=(inputs.col_base.at[0, job.lane], inputs.col_base.at[1, job.lane]),
            exact=(inputs.row_exact.at[:, job.lane], inputs.col_exact.at[:, job.lane]),
            spans=sm90.Spans(inputs.first.at[job.lane], inputs.last.at[batch]),
            smem=scratch | own,
        )  # fmt: skip
        plgpu.barrier_wait(scratch["own_ready"].at[buffer])
        dq, sums = strip.gradients()
        following = sm90.job_at(inputs.jobs, index + 1)
        own["q_smem"][...] = (dq * plan.sm_scale).astype(inputs.q.dtype)
        own["sum_smem"][...] = sums
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own["q_smem"], dq_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(own["sum_smem"], sum_ref.at[job.lane, rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(scratch["own_free"].at[buffer])
        return following, done + job.steps

    sm90.consume_jobs(inputs.counts, inputs.jobs, one_job)


@dataclasses.dataclass(frozen=True)
class _Strip:
    """The rows of one warpgroup in one job, and what they read.

    Attributes:
      done: tiles in the ring before this job's.
      row0: first row.
      row: row part of the decay bias less the log-normaliser, base 2.
      minus_delta: what the accumulators of dP start from.
      base: hi and lo parts of the bias at the base of the block.
      col_bases: the same at the bases of the lane's column tiles.
      exact: row and column parts of the lane's bias, see `exact_bias`.
    """

    plan: Plan
    job: Job
    done: Array
    row0: Array
    row: Array
    minus_delta: Array
    base: tuple[Array, Array]
    col_bases: tuple[Any, Any]
    exact: tuple[Any, Any]
    spans: sm90.Spans
    smem: dict[str, Any]

    def gradients(self) -> tuple[Array, Array]:
        """dq, unscaled, and the row sums of dS."""
        dq = sm90.accumulator((WARPGROUP, self.smem["q_smem"].shape[-1]))
        carry = (dq, sm90.per_row(0.0), self._offset(self.job.begin))
        dq, sums, _ = sm90.over_tiles(self.job, self._step, carry, before=self.plan.left_masks, after=True)
        return dq, sums

    def _step(self, tile: Array, carry: Any, masked: bool) -> Any:
        dq, sums, shift = carry
        slot = sm90.slot_of(self.done + (tile - self.job.begin), self.plan.stages)
        next_shift = self._offset(tile + 1)
        p, dp = self._weights(tile, slot, shift, masked)
        ds = p * dp
        sums += ds.sum(axis=1)
        k_smem = self.smem["k_smem"].at[slot]
        dq = sm90.multiply(dq, ds.astype(k_smem.dtype), k_smem)
        plgpu.barrier_arrive(self.smem["free"].at[slot])
        return dq, sums, next_shift

    def _weights(self, tile: Array, slot: Array, shift: Array, masked: bool) -> tuple[Array, Array]:
        """p and dP - delta; the exponentials run while the tensor cores compute dP."""
        plan, smem = self.plan, self.smem
        shape = (WARPGROUP, plan.columns)
        if masked:
            key0 = tile * plan.columns
            # Read while the tile is under way.
            start = sm90.exact_bias(*self.exact, self.row0, key0, shape, plan)
        plgpu.barrier_wait(smem["k_ready"].at[slot])
        if not masked:
            start = sm90.by_column(smem["col_smem"].at[slot], shape)
        plgpu.barrier_wait(smem["v_ready"].at[slot])

        def products(refs: Any) -> None:
            s_ref, dp_ref, p_ref = refs
            plgpu.wgmma(s_ref, smem["q_smem"], smem["k_smem"].at[slot].transpose((1, 0)))
            plgpu.wgmma(dp_ref, smem["do_smem"], smem["v_smem"].at[slot].transpose((1, 0)))
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
            if masked:
                seen = sm90.visible(self.row0, key0, shape, self.spans, plan)
                p_ref[...] = jnp.where(seen, jnp.exp2(s * plan.exponent), 0.0)
            else:
                p_ref[...] = jnp.exp2(s * plan.exponent + sm90.by_row(self.row + shift, shape))

        state = (plgpu.ACC.init(start), plgpu.ACC.init(sm90.by_row(self.minus_delta, shape)), start)
        _, dp, p = pl.run_state(products)(state)
        return p, dp

    def _offset(self, tile: Array) -> Array:
        return sm90.base_offset(self.col_bases, tile, self.base)
