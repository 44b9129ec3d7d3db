"""Pallas kernels for TPUs: one pass over the data in each direction, gates included.

The grid is (batch, channels, sequence) blocks, the sequence innermost and in the order of the pass; the
bodies are in `_mosaic_tpu.py`. Time is padded to whole blocks with a = 1 and x = 0, through which a state
passes unchanged; batch rows and channels need no padding, as they do not touch each other.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kernels.common.manual import aligned_varying
from kernels.common.tiling import ceil_div
from kernels.linear_scan import _mosaic_tpu as bodies
from kernels.linear_scan import differentiable
from kernels.linear_scan.config import DECAY_SCALE, Request
from kernels.linear_scan.differentiable import Passes, Saved
from kernels.linear_scan.products import initial_state
from kernels.linear_scan.rglru import Gated, decay_rate

LANES = 128
# Largest block: nine float32 ones with two buffers each fit into the 16 MiB of VMEM that a kernel gets.
WIDEST, LONGEST = 512, 256
DTYPES = ("bfloat16", "float32")


def supports(request: Request) -> str | None:
    """TPUs; bfloat16 and float32."""
    if request.platform != "tpu":
        return "needs a TPU"
    for name, dtype in (("x", request.dtype), ("the decay", request.decay_dtype)):
        if dtype not in DTYPES:
            return f"takes {' and '.join(DTYPES)}, but {name} is {dtype}"
    return None


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a call is cut up.

    Attributes:
      batch, length, width: sizes of the arrays, `length` padded to whole blocks.
      tile: steps of a tile.
      rows, steps, channels: sizes of a block.
      reverse: direction of the pass.
    """

    batch: int
    length: int
    width: int
    tile: int
    rows: int
    steps: int
    channels: int
    reverse: bool

    @classmethod
    def of(cls, arrays: Sequence[Array | jax.ShapeDtypeStruct], reverse: bool) -> "Blocks":
        """Blocks for arrays [B, T, D], the narrowest of which decides on the tile."""
        batch, length, width = arrays[0].shape
        tile = 8 if min(x.dtype.itemsize for x in arrays) >= 4 else 16
        channels = width if width <= WIDEST else _even_part(width, WIDEST, LANES)
        steps = _even_part(length, LONGEST, tile)
        rows = max(1, min(batch, WIDEST * LONGEST // (steps * channels)))
        padded = ceil_div(length, steps) * steps
        return cls(batch, padded, width, tile, rows, steps, channels, reverse)

    @property
    def count(self) -> int:
        """Blocks along time."""
        return self.length // self.steps

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks by batch, channels and time."""
        return ceil_div(self.batch, self.rows), ceil_div(self.width, self.channels), self.count

    @property
    def walk(self) -> bodies.Steps:
        """The same for kernel bodies."""
        return bodies.Steps(self.tile, self.reverse, self.count)

    def at(self, t: Any) -> Any:
        """Index of the t-th sequence block of the pass."""
        return self.count - 1 - t if self.reverse else t

    def sequence(self) -> pl.BlockSpec:
        """Of an array [B, T, D]."""
        return pl.BlockSpec((self.rows, self.steps, self.channels), lambda b, d, t: (b, self.at(t), d))

    def flags(self) -> pl.BlockSpec:
        """Of an array [B, T, 1]."""
        return pl.BlockSpec((self.rows, self.steps, 1), lambda b, d, t: (b, self.at(t), 0))

    def edge(self) -> pl.BlockSpec:
        """The tile of an array [B, T, D] that comes after the block in the order of the pass."""
        per_block = self.steps // self.tile

        def index(b: Any, d: Any, t: Any) -> tuple[Any, Any, Any]:
            block = self.at(t)
            tile = block * per_block - 1 if self.reverse else (block + 1) * per_block
            return b, jnp.clip(tile, 0, self.length // self.tile - 1), d

        return pl.BlockSpec((self.rows, self.tile, self.channels), index)

    def state(self) -> pl.BlockSpec:
        """Of an array [B, 1, D]."""
        return pl.BlockSpec((self.rows, 1, self.channels), lambda b, d, t: (b, 0, d))

    def parameter(self) -> pl.BlockSpec:
        """Of an array [1, D]."""
        return pl.BlockSpec((1, self.channels), lambda b, d, t: (0, d))

    def padded(self, x: Array, value: float = 0) -> Array:
        """x with whole blocks of steps."""
        missing = self.length - x.shape[1]
        if missing == 0:
            return x
        return jnp.pad(x, ((0, 0), (0, missing), (0, 0)), constant_values=value)

    def shape(self, dtype: Any) -> jax.ShapeDtypeStruct:
        """Of a result [B, T, D]."""
        return jax.ShapeDtypeStruct((self.batch, self.length, self.width), dtype)

    @property
    def state_shape(self) -> jax.ShapeDtypeStruct:
        """Of a result [B, 1, D]."""
        return jax.ShapeDtypeStruct((self.batch, 1, self.width), jnp.float32)


def _call(
    blocks: Blocks,
    body: Callable[..., None],
    operands: Sequence[tuple[pl.BlockSpec, Array]],
    results: Sequence[tuple[pl.BlockSpec, jax.ShapeDtypeStruct]],
    name: str,
    carries: int = 1,
) -> list[Array]:
    """Runs a body over the grid; its scratch is `carries` float32 rows [rows, 1, channels]."""
    arrays = [array for _, array in operands]
    out = pl.pallas_call(
        functools.partial(body, blocks.walk),
        out_shape=[shape for _, shape in results],
        grid=blocks.grid,
        in_specs=[spec for spec, _ in operands],
        out_specs=[spec for spec, _ in results],
        scratch_shapes=[pltpu.VMEM((blocks.rows, 1, blocks.channels), jnp.float32)] * carries,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name=name,
    )(*arrays)
    # What a Pallas kernel returns has forgotten over which manual mesh axes its operands vary.
    return list(aligned_varying((out, arrays))[0])


def forward(x: Array, a: Array, h0: Array | None, reverse: bool) -> tuple[Array, Array]:
    """(h, h_last)."""
    blocks = Blocks.of((x, a), reverse)
    h, h_last = _call(
        blocks,
        bodies.forward_kernel,
        [
            (blocks.sequence(), blocks.padded(x)),
            (blocks.sequence(), blocks.padded(a, 1)),
            (blocks.state(), _start(x, h0)),
        ],
        [(blocks.sequence(), blocks.shape(x.dtype)), (blocks.state(), blocks.state_shape)],
        "linear_scan_forward",
    )
    return h[:, : x.shape[1]], h_last[:, 0]


def backward(saved: Saved, dh: Array, dh_last: Array | None, reverse: bool) -> tuple[Array, Array, Array]:
    """(dx, da, dh0)."""
    blocks = Blocks.of((dh, saved.a), not reverse)
    sequence, h = blocks.sequence(), _padded_states(blocks, saved.h, saved.h0)
    dx, da, dh0 = _call(
        blocks,
        bodies.backward_kernel,
        [
            (sequence, blocks.padded(dh)),
            (sequence, blocks.padded(saved.a, 1)),
            (sequence, h),
            (blocks.edge(), h),
            (blocks.state(), _start(dh, saved.h0)),
            (blocks.state(), _start(dh, dh_last)),
        ],
        [
            (sequence, blocks.shape(dh.dtype)),
            (sequence, blocks.shape(saved.a.dtype)),
            (blocks.state(), blocks.state_shape),
        ],
        "linear_scan_backward",
    )
    return dx[:, : dh.shape[1]], da[:, : dh.shape[1]], dh0[:, 0]


def gated_forward(gated: Gated, h0: Array | None, reverse: bool) -> tuple[Array, Array]:
    """(h, h_last)."""
    blocks = Blocks.of(gated[:3], reverse)
    h, h_last = _call(
        blocks,
        _without_reset(bodies.gated_forward_kernel, 4)
        if gated.reset is None
        else bodies.gated_forward_kernel,
        [*_gate_operands(blocks, gated), (blocks.state(), _start(gated.x, h0))],
        [(blocks.sequence(), blocks.shape(gated.x.dtype)), (blocks.state(), blocks.state_shape)],
        "rglru_scan_forward",
    )
    return h[:, : gated.x.shape[1]], h_last[:, 0]


def gated_backward(
    gated: Gated, h0: Array | None, h: Array, dh: Array, dh_last: Array | None, reverse: bool
) -> tuple[Gated, Array]:
    """(gradients of gated, dh0). That of a_param is summed over time in the kernel, over the batch here."""
    blocks = Blocks.of(gated[:3], not reverse)
    sequence, padded_h = blocks.sequence(), _padded_states(blocks, h, h0)
    body = bodies.gated_backward_kernel
    *grads, drate, dh0 = _call(
        blocks,
        _without_reset(body, 5) if gated.reset is None else body,
        [
            (sequence, blocks.padded(dh)),
            *_gate_operands(blocks, gated),
            (sequence, padded_h),
            (blocks.edge(), padded_h),
            (blocks.state(), _start(dh, h0)),
            (blocks.state(), _start(dh, dh_last)),
        ],
        [
            *((sequence, blocks.shape(part.dtype)) for part in gated[:3]),
            (blocks.state(), blocks.state_shape),
            (blocks.state(), blocks.state_shape),
        ],
        "rglru_scan_backward",
        carries=2,
    )
    dx, dgate_x, dgate_a = (grad[:, : dh.shape[1]] for grad in grads)
    slope = jax.nn.sigmoid(gated.a_param.astype(jnp.float32))
    da_param = -DECAY_SCALE * slope * jnp.sum(drate, axis=(0, 1))
    return Gated(dx, dgate_x, dgate_a, da_param.astype(gated.a_param.dtype), None), dh0[:, 0]


def _even_part(size: int, largest: int, unit: int) -> int:
    """The multiple of `unit` that cuts `size` into equal parts of at most `largest`."""
    parts = ceil_div(size, largest)
    return ceil_div(ceil_div(size, parts), unit) * unit


def _padded_states(blocks: Blocks, h: Array, h0: Array | None) -> Array:
    """h with whole blocks of steps. If time ran from the end, h0 had passed through the padding."""
    missing = blocks.length - h.shape[1]
    if missing == 0 or h0 is None or blocks.reverse:
        return blocks.padded(h)
    filled = jnp.broadcast_to(h0[:, None].astype(h.dtype), (h.shape[0], missing, h.shape[2]))
    return jnp.concatenate([h, filled], axis=1)


def _start(like: Array, h0: Array | None) -> Array:
    return initial_state(like, h0, jnp.float32)[:, None]


def _gate_operands(blocks: Blocks, gated: Gated) -> list[tuple[pl.BlockSpec, Array]]:
    """x, gates, -8 softplus(a_param) and reset. Padding: a gate of -inf gives a = 1."""
    rate = -decay_rate(gated.a_param.astype(jnp.float32))
    operands = [
        (blocks.sequence(), blocks.padded(gated.x)),
        (blocks.sequence(), blocks.padded(gated.gate_x)),
        (blocks.sequence(), blocks.padded(gated.gate_a, -jnp.inf)),
        (blocks.parameter(), rate[None]),
    ]
    if gated.reset is not None:
        flags = gated.reset[..., None].astype(jnp.float32)
        operands.append((blocks.flags(), blocks.padded(flags)))
    return operands


def _without_reset(body: Callable[..., None], position: int) -> Callable[..., None]:
    """The body with None for its reference to `reset`, its argument of this position (of `steps`: 0)."""

    def without(steps: bodies.Steps, *references: Any) -> None:
        body(steps, *references[:position], None, *references[position:])

    return without


PASSES = Passes(forward, backward, gated_forward, gated_backward)
linear_scan = functools.partial(differentiable.linear_scan, passes=PASSES)
rglru_scan = functools.partial(differentiable.rglru_scan, passes=PASSES)
