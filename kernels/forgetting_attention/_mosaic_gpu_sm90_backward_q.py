"""Backward kernel of forgetting attention for Hopper (sm_90a): the gradient of q, and row sums of dS.

Scores and weights are recomputed as in `backward_kv`; here score accumulators start from the column part of
the decay bias and those of dP = dO v from -delta. It runs first, and forms delta from dO, which it holds, and
O.
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

from kernels.common import hopper
from kernels.common.hopper import WARPGROUP
from kernels.forgetting_attention import _mosaic_gpu_sm90 as sm90
from kernels.forgetting_attention._mosaic_gpu_sm90 import Job, Plan
from kernels.forgetting_attention._mosaic_gpu_sm90_backward import Ahead, BackwardInputs, ahead


def forms_delta(plan: Plan, head_dim: int) -> bool:
    """Whether shared memory has room for a block of the output, so that the kernel can form delta."""
    tiles = plan.rows * (2 * plan.buffers + 1) + 2 * plan.stages * plan.columns
    vectors = plan.stages * plan.columns + 2 * plan.buffers * plan.rows
    return 2 * head_dim * tiles + 4 * vectors <= hopper.SHARED_BYTES


def backward_q(inputs: BackwardInputs, out: Array | None, *, plan: Plan) -> list[Array]:
    """Gradient of q [B, T, N, H], the row sums of dS [G, Tp], and if `plan.delta` -delta [G, Tp] of all
    blocks.

    Args:
      inputs: with jobs of row blocks.
      out: output of the forward pass, like q, if `plan.delta`.
      plan: static choices.
    """
    q, k = inputs.q, inputs.k
    head_dim, consumers = q.shape[3], plan.rows // WARPGROUP
    own = hopper.tiles((plan.buffers, consumers, WARPGROUP, head_dim), q.dtype)
    ring = hopper.tiles((plan.stages, plan.columns, head_dim), k.dtype)
    vector = plgpu.SMEM((plan.buffers, consumers, WARPGROUP), jnp.float32)
    per_row = jax.ShapeDtypeStruct(inputs.row.shape, jnp.float32)
    if plan.delta:
        for_delta = {
            "o_smem": hopper.tiles((1, consumers, WARPGROUP, head_dim), q.dtype),
            "delta_smem": vector,
            "o_ready": plgpu.Barrier(num_arrivals=consumers, num_barriers=1),
            "o_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=1),
        }
    kernel = sm90.launch(
        functools.partial(_kernel, plan=plan, heads=q.shape[2]),
        "backward_q",
        inputs.jobs.shape[0],
        consumers,
        [jax.ShapeDtypeStruct(q.shape, q.dtype)] + [per_row] * (2 if plan.delta else 1),
        {
            "q_smem": own, "do_smem": own, "k_smem": ring, "v_smem": ring,
            "col_smem": plgpu.SMEM((plan.stages, plan.columns), jnp.float32),
            "sum_smem": vector,
            "own_ready": plgpu.Barrier(num_arrivals=2 * consumers, num_barriers=plan.buffers),
            "own_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=plan.buffers),
            "k_ready": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
            "v_ready": plgpu.Barrier(num_barriers=plan.stages),
            "free": plgpu.Barrier(num_arrivals=consumers, num_barriers=plan.stages),
            **(for_delta if plan.delta else {}),
        },
    )  # fmt: skip
    return list(kernel(*inputs, *([out] if plan.delta else [])))


def _kernel(*refs: Any, plan: Plan, heads: int, **scratch: Any) -> None:
    fields = len(BackwardInputs._fields)
    inputs, rest = BackwardInputs(*refs[:fields]), refs[fields:]
    out, outputs = (rest[0], rest[1:]) if plan.delta else (None, rest)

    hopper.warpgroups(
        plan.rows // WARPGROUP,
        lambda: _produce(inputs, out, plan, heads, **scratch),
        lambda wg: _consume(inputs, outputs, wg, plan, heads, scratch),
    )


def _produce(
    inputs: BackwardInputs, out: Any, plan: Plan, heads: int, *, q_smem: Any, do_smem: Any, k_smem: Any,
    v_smem: Any, col_smem: Any, own_ready: Any, own_free: Any, k_ready: Any, v_ready: Any, free: Any,
    **others: Any,
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
        if plan.delta:
            # Read at the start of a job, so one buffer is free early enough for the next.
            outs = [(lambda rows: out.at[batch, rows, head], others["o_smem"])]
            sm90.Owned(outs, others["o_ready"], others["o_free"]).load(index, job.block, plan.rows, 1)
        kv_head = lax.div(head, jnp.int32(plan.group))
        loads = (
            (inputs.k.at[batch, :, kv_head], k_smem, k_ready),
            (inputs.col.at[job.lane], col_smem, k_ready),
            (inputs.v.at[batch, :, kv_head], v_smem, v_ready),
        )
        return sm90.stream((sm90.Ring(free, loads),), job.begin, job.end, done, plan.columns, plan.stages)

    sm90.produce_jobs(inputs.jobs, load_job, plan, own_free=own_free, ring_free=(free,))
    if plan.delta:
        hopper.drain(sm90.job_count(inputs.jobs), 1, others["o_free"])


def _consume(
    inputs: BackwardInputs,
    outputs: tuple[Any, ...],
    wg: Array,
    plan: Plan,
    heads: int,
    scratch: dict[str, Any],
) -> None:
    """One warpgroup's rows of all jobs."""

    def first_row(job: Job) -> Array:
        return job.block * plan.rows + wg * WARPGROUP

    def start_of(job: Job) -> tuple[Ahead, Array]:
        start = first_row(job)
        delta = inputs.minus_delta.at[job.lane, pl.ds(start, WARPGROUP)]
        return (
            ahead(inputs.row, inputs.row_base, inputs.col_base, job, start, plan.row_span, plan),
            plgpu.load(delta, layout=hopper.BY_ROW, optimized=False),
        )

    def one_job(index: Array, carry: Any) -> Any:
        job, done, (start, delta) = carry
        following = sm90.job_at(inputs.jobs, index + 1)
        batch, head = sm90.divided(job.lane, heads)
        buffer = hopper.slot_of(index, plan.buffers)
        rows = pl.ds(first_row(job), WARPGROUP)
        own = {name: scratch[name].at[buffer, wg] for name in ("q_smem", "do_smem", "sum_smem")}
        plgpu.barrier_wait(scratch["own_ready"].at[buffer])
        if plan.delta:
            plgpu.barrier_wait(scratch["o_ready"].at[0])
            delta -= _row_sums(own["do_smem"], scratch["o_smem"].at[0, wg])
            plgpu.barrier_arrive(scratch["o_free"].at[0])
        strip = _Strip(
            plan, job, done, first_row(job), start, delta,
            col_bases=(inputs.col_base.at[0, job.lane], inputs.col_base.at[1, job.lane]),
            spans=sm90.Spans(inputs.first.at[job.lane], inputs.last.at[batch]),
            smem=scratch | own,
        )  # fmt: skip
        dq, sums = strip.gradients()
        own["q_smem"][...] = (dq * plan.sm_scale).astype(inputs.q.dtype)
        results = [(own["q_smem"], outputs[0].at[batch, rows, head])]
        for ref, value, name in zip(outputs[1:], (sums, delta), ("sum_smem", "delta_smem"), strict=False):
            scratch[name].at[buffer, wg][...] = value
            results.append((scratch[name].at[buffer, wg], ref.at[job.lane, rows]))
        plgpu.commit_smem()
        for smem, target in results:
            plgpu.copy_smem_to_gmem(smem, target)
        next_start = start_of(following)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(scratch["own_free"].at[buffer])
        return following, done + job.steps, next_start

    sm90.consume_jobs(inputs.jobs, one_job, start_of)


def _row_sums(a: Any, b: Any) -> Array:
    """Row sums of the product of two blocks in shared memory, in float32."""
    a, b = (plgpu.load(x, layout=plgpu.Layout.WGMMA).astype(jnp.float32) for x in (a, b))
    return (a * b).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class _Strip:
    """The rows of one warpgroup in one job, and what they read.

    Attributes:
      done: tiles in the ring before this job's.
      row0: first row.
      start: with the row part of the decay bias less the log-normaliser, in units of scores.
      minus_delta: what the accumulators of dP start from.
      col_bases: hi and lo parts of the bias at the bases of the lane's column tiles.
    """

    plan: Plan
    job: Job
    done: Array
    row0: Array
    start: Ahead
    minus_delta: Array
    col_bases: tuple[Any, Any]
    spans: sm90.Spans
    smem: dict[str, Any]

    def gradients(self) -> tuple[Array, Array]:
        """dq, unscaled, and the row sums of dS."""
        dq = sm90.accumulator((WARPGROUP, self.smem["q_smem"].shape[-1]))
        carry = (dq, sm90.per_row(0.0), self.start.shift)
        dq, sums, _ = sm90.over_tiles(self.job, self._step, carry, before=self.plan.left_masks, after=True)
        return dq, sums

    def _step(self, tile: Array, carry: Any, masked: bool) -> Any:
        dq, sums, shift = carry
        slot = hopper.slot_of(self.done + (tile - self.job.begin), self.plan.stages)
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
        row = self.start.own
        plgpu.barrier_wait(smem["k_ready"].at[slot])
        start = plgpu.load(smem["col_smem"].at[slot], layout=hopper.BY_COLUMN)
        if masked:
            # The same sums as in `backward_kv`.
            start = sm90.by_row(row, shape) + lax.broadcast_in_dim(start + shift, shape, [1])
        else:
            start = lax.broadcast_in_dim(start, shape, [1])
        plgpu.barrier_wait(smem["v_ready"].at[slot])

        def products(refs: Any) -> None:
            s_ref, dp_ref, p_ref = refs
            plgpu.wgmma(s_ref, smem["q_smem"], smem["k_smem"].at[slot].transpose((1, 0)))
            plgpu.wgmma(dp_ref, smem["do_smem"], smem["v_smem"].at[slot].transpose((1, 0)))
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
            if masked:
                seen = sm90.visible(self.row0, tile * plan.columns, shape, self.spans, plan)
                p_ref[...] = jnp.where(seen, jnp.exp2(s * plan.exponent), 0.0)
            else:
                p_ref[...] = jnp.exp2(s * plan.exponent + sm90.by_row((row + shift) * plan.exponent, shape))

        state = (plgpu.ACC.init(start), plgpu.ACC.init(sm90.by_row(self.minus_delta, shape)), start)
        _, dp, p = pl.run_state(products)(state)
        return p, dp

    def _offset(self, tile: Array) -> Array:
        return sm90.base_offset(self.col_bases, tile, self.start.base, 1 / self.plan.sm_scale)
