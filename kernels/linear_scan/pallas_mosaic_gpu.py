"""Linear scans on Hopper GPUs: Pallas Mosaic GPU kernels, one pass over memory in either direction.

This module turns calls into what the raw kernels of `_mosaic_gpu_*` want: sequences TMA can address, initial
states and rates in whole strips of channels, resets as numbers. Results are the same bits in every run.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.common.dispatch import target
from kernels.common.hopper import not_hopper
from kernels.common.hopper_math import LOG2E
from kernels.common.manual import aligned_varying
from kernels.common.tiling import pad_axis_to
from kernels.linear_scan import _mosaic_gpu_rglru, _mosaic_gpu_scan, differentiable
from kernels.linear_scan._mosaic_gpu_stream import CHANNELS, SHORT, UNROLL, Plan, make_plan
from kernels.linear_scan.config import DECAY_SCALE, Request
from kernels.linear_scan.differentiable import Passes, Saved
from kernels.linear_scan.rglru import Gated, decay_rate

DTYPES = ("bfloat16", "float16", "float32")
# TMA addresses rows whose length in bytes is a multiple of 16.
WIDTH_MULTIPLE = 8


def supports(request: Request) -> str | None:
    """Hopper, real inputs of 16 or 32 bits."""
    if refusal := not_hopper(request.platform, request.capability):
        return refusal
    for dtype in (request.dtype, request.decay_dtype):
        if dtype not in DTYPES:
            return f"takes bfloat16, float16 and float32, not {dtype}"
    return None


def _forward(x: Array, a: Array, h0: Array | None, reverse: bool) -> tuple[Array, Array]:
    call = _Call(_mosaic_gpu_scan.forward, x.shape, (x, a), (x,), descending=reverse)
    h, h_last = call.run(_long(x, a), _in_strips(h0))
    return call.short(h), h_last[:, : x.shape[2]]


def _backward(
    saved: Saved, dh: Array, dh_last: Array | None, reverse: bool
) -> tuple[Array, Array, Array | None]:
    h, a, h0 = saved
    call = _Call(_mosaic_gpu_scan.backward, h.shape, (a, dh, h), (dh, a), descending=not reverse)
    dx, da, dh0 = call.run(_long(a, h, dh), _in_strips(h0), _in_strips(dh_last))
    return call.short(dx), call.short(da), _of_width(dh0, h.shape[2])


def _gated_forward(gated: Gated, h0: Array | None, reverse: bool) -> tuple[Array, Array]:
    x = gated.x
    call = _Call(_mosaic_gpu_rglru.forward, x.shape, gated[:3], (x,), descending=reverse)
    h, h_last = call.run(_long(*gated[:3]), _in_strips(h0), _rate(gated), _flags(gated))
    return call.short(h), h_last[:, : x.shape[2]]


def _gated_backward(
    gated: Gated, h0: Array | None, h: Array, dh: Array, dh_last: Array | None, reverse: bool
) -> tuple[Gated, Array | None]:
    width, loads = h.shape[2], (*gated[:3], dh, h)
    call = _Call(_mosaic_gpu_rglru.backward, h.shape, loads, gated[:3], descending=not reverse)
    states = _in_strips(h0), _in_strips(dh_last)
    *grads, dh0, sums = call.run(_long(*gated[:3], h, dh), *states, _rate(gated), _flags(gated))
    a_param = gated.a_param.astype(jnp.float32)
    d_a_param = -DECAY_SCALE * jax.nn.sigmoid(a_param) * sums[:, :width].sum(axis=0)
    dx, d_gate_x, d_gate_a = (call.short(grad) for grad in grads)
    return Gated(dx, d_gate_x, d_gate_a, d_a_param.astype(gated.a_param.dtype), None), _of_width(dh0, width)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A raw kernel and what its plan depends on.

    Attributes:
      kernel: takes operands, and `plan`.
      shape: B, T, D of the call.
      loads, stores: the arrays [B, T, D] that it reads and writes, for their dtypes.
      descending: see `Plan`.
    """

    kernel: Callable[..., Any]
    shape: tuple[int, ...]
    loads: Sequence[Array]
    stores: Sequence[Array]
    descending: bool

    def plan(self, batch: int) -> Plan:
        """For a batch that vmap may have made larger."""
        read, written = (sum(x.dtype.itemsize for x in arrays) for arrays in (self.loads, self.stores))
        shape = (batch, *self.shape[1:])
        return make_plan(shape, read, written, target().cores, descending=self.descending)

    def short(self, x: Array) -> Array:
        """Less what `_long` added."""
        return x[:, : self.shape[1], : self.shape[2]]

    def run(self, *operands: Any) -> Any:
        """The kernel's results, with a vmap rule that folds the mapped axis into the batch.

        All operands and results have the batch first; it is 1 where all entries share one.
        """

        @jax.custom_batching.custom_vmap
        def call(operands: Any) -> Any:
            plan = self.plan(operands[0][0].shape[0])
            # What a Pallas kernel returns has forgotten over which manual mesh axes its operands vary.
            return aligned_varying((self.kernel(*operands, plan=plan), operands))[0]

        @call.def_vmap
        def rule(axis_size: int, in_batched: list[Any], operands: Any) -> tuple[Any, Any]:
            batch = operands[0][0].shape[1 if in_batched[0][0][0] else 0]

            def fold(x: Any, batched: bool) -> Array:
                x = jnp.asarray(x)
                if not batched and x.shape[0] != batch:
                    return x
                x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
                x = jnp.broadcast_to(x, (axis_size, batch, *x.shape[2:]))
                return x.reshape(axis_size * batch, *x.shape[2:])

            results = call(jax.tree.map(fold, operands, in_batched[0]))
            unfolded = jax.tree.map(lambda x: x.reshape(axis_size, batch, *x.shape[1:]), results)
            return unfolded, jax.tree.map(lambda _: True, results)

        return call(operands)


def _long(*arrays: Array) -> tuple[Array, ...]:
    """[B, T, D] of what TMA can address: whole groups of steps if there are few, rows of whole 16 bytes."""
    _, length, width = arrays[0].shape
    steps = -length % UNROLL if length < SHORT else 0
    missing = ((0, 0), (0, steps), (0, -width % WIDTH_MULTIPLE))
    return tuple(jnp.pad(x, missing) if missing[1][1] or missing[2][1] else x for x in arrays)


def _in_strips(x: Array | None) -> Array | None:
    """States [B, D] with the last axis in whole strips, float32."""
    return None if x is None else pad_axis_to(x.astype(jnp.float32), 1, CHANNELS)


def _of_width(x: Array | None, width: int) -> Array | None:
    """States [B, D] less what `_in_strips` added."""
    return None if x is None else x[:, :width]


def _rate(gated: Gated) -> Array:
    """[1, Dp]."""
    rate = decay_rate(gated.a_param.astype(jnp.float32))
    return pad_axis_to(rate * LOG2E, 0, CHANNELS)[None]


def _flags(gated: Gated) -> Array | None:
    """Resets as numbers, in rows that TMA can address."""
    return None if gated.reset is None else pad_axis_to(gated.reset.astype(jnp.float32), 1, UNROLL)


PASSES = Passes(_forward, _backward, _gated_forward, _gated_backward)
linear_scan = functools.partial(differentiable.linear_scan, passes=PASSES)
rglru_scan = functools.partial(differentiable.rglru_scan, passes=PASSES)
