"""What the two backward kernels for Hopper (sm_90a) share: what they read, and what starts a job."""

from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels.common import hopper
from kernels.common.hopper import WARPGROUP
from kernels.forgetting_attention import _mosaic_gpu_sm90 as sm90
from kernels.forgetting_attention._mosaic_gpu_sm90 import Job, Plan


class BackwardInputs(NamedTuple):
    """What both backward kernels read: arrays outside of them, references to global memory inside.

    G = B * N lanes; Tp and Sp are whole tiles of either kernel. Both read the same parts of the bias, and
    start masked tiles from the same sums of them: what rounding does to dS is then alike in both, see
    README.md.

    Attributes:
      q, k, v, d_out: 16-bit [B, T or S, N or K, H]; T and S multiples of 8 and no less than a tile; d_out is
        0 on dead rows.
      row: row part of the decay bias from the base of its `Plan.row_span` on, minus the log-normaliser,
        divided by sm_scale, [G, Tp].
      col: column part of the decay bias from the base of its `Plan.column_span` on, divided by sm_scale,
        [G, Sp].
      minus_delta: -(rowsum(dO O) - dlse), [G, Tp]; for `backward_q` just dlse if `plan.delta`.
      row_base, col_base: hi and lo parts of the bias at the bases of spans, [2, G, Mr] and [2, G, Mc].
      jobs: see `work_lists`.
      first, last: visible keys of every row, [G, Tp] and [B, Tp]; read only if `plan.causal_offset` is None.
    """

    q: Any
    k: Any
    v: Any
    d_out: Any
    row: Any
    col: Any
    minus_delta: Any
    row_base: Any
    col_base: Any
    jobs: Any
    first: Any
    last: Any


class Ahead(NamedTuple):
    """What a warpgroup of a backward kernel needs to start a job, read from global memory while the results
    of the job before leave.

    Attributes:
      own: parts of the bias of its rows or keys.
      base: hi and lo parts of the bias at the base of their span.
      shift: bias between the bases of the job's first tile and that, in units of scores.
    """

    own: Array
    base: tuple[Array, Array]
    shift: Array


def ahead(own: Any, own_bases: Any, bases: Any, job: Job, start: Array, span: int, plan: Plan) -> Ahead:
    """Reads what starts a job.

    Args:
      own: parts of the bias on the job's own side, [G, padded length].
      own_bases, bases: hi and lo parts at the bases of spans, [2, G, M], of the own and of the other side.
      job: which one.
      start: first row or key of the warpgroup.
      span: rows or keys of a span of the own side.
      plan: static choices.
    """
    at = lax.div(start, jnp.int32(span))
    base = own_bases[0, job.lane, at], own_bases[1, job.lane, at]
    others = bases.at[0, job.lane], bases.at[1, job.lane]
    shift = sm90.base_offset(others, job.begin, base, 1 / plan.sm_scale)
    values = plgpu.load(own.at[job.lane, pl.ds(start, WARPGROUP)], layout=hopper.BY_ROW, optimized=False)
    return Ahead(values, base, shift)
