"""Backward kernel of forgetting attention for Hopper (sm_90a): gradients of k and v, and column sums of dS.

Works on transposed tiles (keys x queries). Scores and weights are recomputed from q, k and the saved
log-normaliser: score accumulators start from the row part of the decay bias less the log-normaliser and those
of dP = v dO from -delta, so neither costs arithmetic: p = exp2(c s + offset), dS = p dP.
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


def backward_kv(inputs: BackwardInputs, *, plan: Plan) -> list[Array]:
    """Gradients of k and v (those that `plan` asks for), and with dk the column sums of dS [G, Sp].

    Args:
      inputs: with jobs of column blocks.
      plan: static choices.
    """
    k, q = inputs.k, inputs.q
    head_dim, consumers = k.shape[3], plan.columns // WARPGROUP
    own = hopper.tiles((plan.buffers, consumers, WARPGROUP, head_dim), k.dtype)
    ring = hopper.tiles((plan.stages, plan.rows, head_dim), q.dtype)
    vectors = plgpu.SMEM((plan.stages, plan.rows), jnp.float32)
    outputs = [jax.ShapeDtypeStruct(k.shape, k.dtype)] * (plan.dk + plan.dv)
    if plan.dk:
        outputs.append(jax.ShapeDtypeStruct(inputs.col.shape, jnp.float32))
    kernel = sm90.launch(
        functools.partial(_kernel, plan=plan, heads=q.shape[2]),
        "backward_kv",
        inputs.jobs.shape[0],
        consumers,
        outputs,
        {
            "k_smem": own, "v_smem": own, "q_smem": ring, "do_smem": ring,
            "row_smem": vectors, "delta_smem": vectors,
            "sum_smem": plgpu.SMEM((consumers, WARPGROUP), jnp.float32),
            "own_ready": plgpu.Barrier(num_arrivals=2 * consumers, num_barriers=plan.buffers),
            "own_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=plan.buffers),
            "q_ready": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
            "do_ready": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
            "free": plgpu.Barrier(num_arrivals=consumers, num_barriers=plan.stages),
        },
    )  # fmt: skip
    return list(kernel(*inputs))


def _kernel(*refs: Any, plan: Plan, heads: int, **scratch: Any) -> None:
    fields = len(BackwardInputs._fields)
    inputs, outputs = BackwardInputs(*refs[:fields]), refs[fields:]

    hopper.warpgroups(
        plan.columns // WARPGROUP,
        lambda: _produce(inputs, plan, heads, **scratch),
        lambda wg: _consume(inputs, outputs, wg, plan, heads, scratch),
    )


def _produce(
    inputs: BackwardInputs, plan: Plan, heads: int, *, k_smem: Any, v_smem: Any, q_smem: Any,
    do_smem: Any, row_smem: Any, delta_smem: Any, own_ready: Any, own_free: Any, q_ready: Any,
    do_ready: Any, free: Any, **_: Any,
) -> None:  # fmt: skip
    """Streams the keys and values of all jobs and their tiles of rows, head by head of the group."""

    def load_own(index: Array, job: Job) -> None:
        batch, head = sm90.divided(job.lane, heads)
        kv_head = lax.div(head, jnp.int32(plan.group))
        owned = (
            (lambda keys: inputs.k.at[batch, keys, kv_head], k_smem),
            (lambda keys: inputs.v.at[batch, keys, kv_head], v_smem),
        )
        sm90.Owned(owned, own_ready, own_free).load(index, job.block, plan.columns, plan.buffers)

    def load_job(index: Array, done: Array) -> Array:
        load_own(index, sm90.job_at(inputs.jobs, index * plan.group))

        def load_head(member: Array, done: Array) -> Array:
            job = sm90.job_at(inputs.jobs, index * plan.group + member)
            batch, head = sm90.divided(job.lane, heads)
            loads = (
                (inputs.q.at[batch, :, head], q_smem, q_ready),
                (inputs.row.at[job.lane], row_smem, q_ready),
                (inputs.d_out.at[batch, :, head], do_smem, do_ready),
                (inputs.minus_delta.at[job.lane], delta_smem, do_ready),
            )
            return sm90.stream((sm90.Ring(free, loads),), job.begin, job.end, done, plan.rows, plan.stages)

        return lax.fori_loop(0, plan.group, load_head, done)

    sm90.produce_jobs(inputs.jobs, load_job, plan, own_free=own_free, ring_free=(free,))


def _consume(
    inputs: BackwardInputs,
    outputs: tuple[Any, ...],
    wg: Array,
    plan: Plan,
    heads: int,
    scratch: dict[str, Any],
) -> None:
    """One warpgroup's keys of all jobs."""

    def first_key(job: Job) -> Array:
        return job.block * plan.columns + wg * WARPGROUP

    def start_of(job: Job) -> Ahead:
        bases = inputs.col_base, inputs.row_base
        return ahead(inputs.col, *bases, job, first_key(job), plan.column_span, plan)

    def one_job(index: Array, carry: Any) -> Any:
        job, done, start = carry
        batch, head = sm90.divided(job.lane, heads)
        kv_head = lax.div(head, jnp.int32(plan.group))
        buffer = hopper.slot_of(index, plan.buffers)
        keys = pl.ds(first_key(job), WARPGROUP)
        own = {name: scratch[name].at[buffer, wg] for name in ("k_smem", "v_smem")}
        plgpu.barrier_wait(scratch["own_ready"].at[buffer])

        def one_head(member: Array, carry: Any) -> Any:
            job, done, start, dk, dv = carry
            strip = _Strip(
                plan, job, done, first_key(job), start,
                row_bases=(inputs.row_base.at[0, job.lane], inputs.row_base.at[1, job.lane]),
                spans=sm90.Spans(inputs.first.at[job.lane], inputs.last.at[batch]),
                smem=scratch | own,
            )  # fmt: skip
            dk, dv, sums = strip.gradients(dk, dv)
            # Each read is under way while results leave. Earlier ones would cost registers in the loop.
            following = sm90.job_at(inputs.jobs, index * plan.group + member + 1)
            if plan.dk:
                sums_smem = scratch["sum_smem"].at[wg]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                sums_smem[...] = sums
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(sums_smem, outputs[-1].at[job.lane, keys])
            return following, done + job.steps, start_of(following), dk, dv

        zeros = sm90.accumulator((WARPGROUP, inputs.k.shape[-1]))
        carry = (job, done, start, zeros if plan.dk else None, zeros if plan.dv else None)
        *following, dk, dv = lax.fori_loop(0, plan.group, one_head, carry)
        results = [(own["k_smem"], dk * plan.sm_scale)] if plan.dk else []
        results += [(own["v_smem"], dv)] if plan.dv else []
        for smem, value in results:
            smem[...] = value.astype(inputs.k.dtype)
        plgpu.commit_smem()
        for (smem, _), target in zip(results, outputs, strict=False):
            plgpu.copy_smem_to_gmem(smem, target.at[batch, keys, kv_head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(scratch["own_free"].at[buffer])
        return tuple(following)

    sm90.consume_jobs(inputs.jobs, one_job, start_of)


@dataclasses.dataclass(frozen=True)
class _Strip:
    """The keys of one warpgroup for one query head, and what they read.

    Attributes:
      done: tiles in the ring before this head's.
      key0: first key.
      start: with the column part of the decay bias, in units of scores.
      row_bases: hi and lo parts of the bias at the bases of the lane's row tiles.
    """

    plan: Plan
    job: Job
    done: Array
    key0: Array
    start: Ahead
    row_bases: tuple[Any, Any]
    spans: sm90.Spans
    smem: dict[str, Any]

    def gradients(self, dk: Array | None, dv: Array | None) -> tuple[Any, Any, Array]:
        """Adds to dk (unscaled) and dv; and the column sums of dS."""
        carry = (dk, dv, sm90.per_row(0.0), self.start.shift)
        dk, dv, sums, _ = sm90.over_tiles(
            self.job, self._step, carry, before=True, after=self.plan.left_masks
        )
        return dk, dv, sums

    def _step(self, tile: Array, carry: Any, masked: bool) -> Any:
        dk, dv, sums, shift = carry
        plan, smem, dtype = self.plan, self.smem, self.smem["k_smem"].dtype
        slot = hopper.slot_of(self.done + (tile - self.job.begin), plan.stages)
        next_shift = self._offset(tile + 1)
        p, dp = self._weights(tile, slot, shift, masked)
        if plan.dk:
            ds = p * dp
            sums += ds.sum(axis=1)
            ds16 = ds.astype(dtype)
        p16 = p.astype(dtype)

        def products(refs: Any) -> None:
            dk_ref, dv_ref = refs
            if plan.dv:
                plgpu.wgmma(dv_ref, p16, smem["do_smem"].at[slot])
            if plan.dk:
                plgpu.wgmma(dk_ref, ds16, smem["q_smem"].at[slot])

        dk, dv = pl.run_state(products)(tuple(None if x is None else plgpu.ACC.init(x) for x in (dk, dv)))
        plgpu.barrier_arrive(smem["free"].at[slot])
        return dk, dv, sums, next_shift

    def _weights(self, tile: Array, slot: Array, shift: Array, masked: bool) -> tuple[Array, Any]:
        """p, and dP - delta if dk is wanted; the exponentials run while the tensor cores compute dP."""
        plan, smem = self.plan, self.smem
        shape = (WARPGROUP, plan.rows)
        col = self.start.own + shift
        plgpu.barrier_wait(smem["q_ready"].at[slot])
        start = hopper.by_column(smem["row_smem"].at[slot], shape)
        if masked:
            # The same sums as in `backward_q`.
            start += sm90.by_row(col, shape)
        plgpu.barrier_wait(smem["do_ready"].at[slot])
        delta = hopper.by_column(smem["delta_smem"].at[slot], shape) if plan.dk else None

        def products(refs: Any) -> None:
            s_ref, dp_ref, p_ref = refs
            plgpu.wgmma(s_ref, smem["k_smem"], smem["q_smem"].at[slot].transpose((1, 0)))
            if plan.dk:
                plgpu.wgmma(dp_ref, smem["v_smem"], smem["do_smem"].at[slot].transpose((1, 0)))
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1 if plan.dk else 0)
            if masked:
                row0 = tile * plan.rows
                seen = sm90.visible(row0, self.key0, shape, self.spans, plan, transposed=True)
                p_ref[...] = jnp.where(seen, jnp.exp2(s * plan.exponent), 0.0)
            else:
                p_ref[...] = jnp.exp2(s * plan.exponent + sm90.by_row(col * plan.exponent, shape))

        state = (plgpu.ACC.init(start), None if delta is None else plgpu.ACC.init(delta), start)
        _, dp, p = pl.run_state(products)(state)
        return p, dp

    def _offset(self, tile: Array) -> Array:
        return sm90.base_offset(self.row_bases, tile, self.start.base, 1 / self.plan.sm_scale)
