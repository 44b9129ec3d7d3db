"""Kernel of the gated product for Hopper (sm_90a), written with Pallas Mosaic GPU.

A tile of the result needs the same columns of both halves of the matrix: x is read once for the two, both
accumulators start from the bias, and what leaves registers is gelu(gate) * value only. Warpgroups own 64 rows
of a tile each. CTAs are persistent; two next to each other form a cluster, take tiles below (or beside) each
other and share what they read of the matrix (or of x): each loads half of it into both.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.common import hopper
from kernels.common.hopper import WARPGROUP
from kernels.common.tiling import ceil_div

DEPTH = 64  # of a step: channels of x that a slot holds, 128 bytes of each row
HALVES = 2  # gate, value
MAX_STAGES = 6
SHARED_BYTES = hopper.SHARED_LIMIT - 1024  # less some for barriers and alignment: four slots of the default
# Of gelu(x) = x sigmoid(x (LINEAR + CUBIC x^2)), exponents in base 2: by the tanh formula, 1 + tanh(u) is
# twice sigmoid(2 u), which keeps its digits where the tanh is near -1.
LINEAR = 2 * math.sqrt(2 / math.pi) * math.log2(math.e)
CUBIC = 0.044715 * LINEAR

Shared = Literal["matrix", "x", "nothing"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a CTA computes at a time.

    Attributes:
      rows: 128 or 192, 64 per warpgroup.
      columns: of each half, 64 or 128.
      shared: what the two CTAs of a cluster share: the matrix's tile, if theirs lie below each other; x's, if
        they lie beside each other; or nothing, and there are no clusters.
      staggered: whether each warpgroup starts some steps after the one before it: then the tensor cores have
        the other's products to do while one computes its GELUs.
    """

    rows: int = 128
    columns: int = 128
    shared: Shared = "matrix"
    staggered: bool = False

    @property
    def cluster(self) -> int:
        """CTAs that share."""
        return 1 if self.shared == "nothing" else 2

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.columns}", f"{self.shared} shared", "staggered" * self.staggered]
        return ", ".join(filter(None, words))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static shape of one kernel.

    Attributes:
      tile: see `Tile`.
      steps: of DEPTH channels, in a tile.
      stages: steps whose operands are in shared memory at a time.
      row_tiles, column_tiles: of the result; a cluster's two count as one.
      rows_first: whether clusters that run together take tiles below each other rather than beside.
      clusters: how many there are.
    """

    tile: Tile
    steps: int
    stages: int
    row_tiles: int
    column_tiles: int
    rows_first: bool
    clusters: int

    @property
    def consumers(self) -> int:
        """Warpgroups that compute."""
        return self.tile.rows // WARPGROUP

    @property
    def lead(self) -> int:
        """Steps that a staggered warpgroup is ahead of the next: as slots allow."""
        return self.stages // self.consumers

    @property
    def jobs(self) -> int:
        """Tiles of clusters in all."""
        return self.row_tiles * self.column_tiles

    @property
    def cost(self) -> tuple[int, int]:
        """What plans are judged by: tiles of the busiest CTA; tiles in all, with those beyond the rows."""
        return ceil_div(self.jobs, self.clusters), self.jobs * self.tile.cluster


def make_plan(rows: int, width: int, features: int, cores: int, tile: Tile | None = None) -> Plan:
    """The plan for x [rows, width] and a matrix [width, 2 features].

    Tiles that run together use all of the smaller operand and step through the larger one: so the smaller
    one stays in the L2 cache, and the larger one is read from memory once.

    Args:
      rows: at least a tile's.
      width, features: multiples of DEPTH and of the tile's columns (two tiles' if they share x).
      cores: multiprocessors.
      tile: None: the default, sharing what leaves the CTAs least to do, the first of `Shared` if in doubt.

    Raises:
      ValueError: features that are no whole tiles.
    """
    if tile is None:
        able = [Tile(shared=s) for s in get_args(Shared) if s != "x" or features % (2 * Tile.columns) == 0]
        plans = [make_plan(rows, width, features, cores, tile) for tile in able]
        return min(plans, key=lambda plan: plan.cost)
    whole = tile.columns * (2 if tile.shared == "x" else 1)
    if features % whole:
        raise ValueError(f"gated_matmul: tiles of {tile} take a multiple of {whole} features, not {features}")
    steps = width // DEPTH
    slot = (tile.rows + HALVES * tile.columns) * DEPTH * 2
    other = (tile.rows + HALVES * 2) * tile.columns * 2  # the result's buffers, and the bias in float32
    stages = min((SHARED_BYTES - other) // slot, MAX_STAGES, steps)
    row_tiles, column_tiles = ceil_div(rows, tile.rows), features // tile.columns
    if tile.shared == "matrix":
        row_tiles = ceil_div(row_tiles, 2)
    elif tile.shared == "x":
        column_tiles //= 2
    clusters = min(max(cores // tile.cluster, 1), row_tiles * column_tiles)
    return Plan(tile, steps, stages, row_tiles, column_tiles, rows <= HALVES * features, clusters)


@functools.partial(jax.jit, static_argnames="plan")  # traced once for all layers of a model
def forward(
    x: Float[Array, "R D"], kernel: Float[Array, "D F2"], bias: Float[Array, " F2"], *, plan: Plan
) -> Float[Array, "R F"]:
    """gelu(x W_g + b_g) * (x W_v + b_v), rounded once.

    Args:
      x: 16 bits; R a multiple of 8 and no less than a tile's rows.
      kernel: of x's dtype, [W_g | W_v].
      bias: [b_g | b_v], of 16 or 32 bits.
      plan: for these sizes.
    """
    tile, features = plan.tile, kernel.shape[1] // HALVES
    free: dict[str, Any] = {"num_arrivals": plan.consumers, "num_barriers": plan.stages}
    names = ("pair",) if tile.cluster > 1 else ()
    scratch = {
        "x_smem": hopper.tiles((plan.stages, tile.rows, DEPTH), x.dtype),
        "w_smem": hopper.tiles((plan.stages, HALVES, DEPTH, tile.columns), kernel.dtype),
        "bias_smem": plgpu.SMEM((HALVES, tile.columns), bias.dtype),
        "out_smem": hopper.tiles((plan.consumers, WARPGROUP, tile.columns), x.dtype),
        "ready": plgpu.Barrier(num_arrivals=1 + HALVES, num_barriers=plan.stages),
        "bias_ready": plgpu.Barrier(num_arrivals=HALVES),
        "go": plgpu.Barrier(num_barriers=plan.consumers),
        # A slot is filled by both CTAs of a cluster: both wait until it is free in both.
        "free": plgpu.ClusterBarrier(collective_axes=names, **free) if names else plgpu.Barrier(**free),
    }
    return plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=jax.ShapeDtypeStruct((x.shape[0], features), x.dtype),
        scratch_types=scratch,
        grid=(plan.clusters,),
        grid_names=("cluster",),
        cluster=(tile.cluster,) * len(names),
        cluster_names=names,
        num_threads=plan.consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="gated_matmul",
    )(x, kernel, bias)


def _kernel(x_ref: Any, w_ref: Any, bias_ref: Any, out_ref: Any, *, plan: Plan, **scratch: Any) -> None:
    hopper.warpgroups(
        plan.consumers,
        lambda: _produce(x_ref, w_ref, bias_ref, plan, **scratch),
        lambda wg: _consume(out_ref, wg, plan, **scratch),
    )


def _job_count(plan: Plan) -> Array:
    """Jobs of this cluster."""
    return lax.div(plan.jobs - 1 - lax.axis_index("cluster"), jnp.int32(plan.clusters)) + 1


def _place(plan: Plan, index: Array) -> tuple[Array, Array]:
    """First row and column of this CTA's tile in the cluster's job number `index`; maybe beyond the rows."""
    tile, job = plan.tile, lax.axis_index("cluster") + index * plan.clusters
    beside = jnp.int32(plan.row_tiles if plan.rows_first else plan.column_tiles)
    outer, inner = lax.div(job, beside), lax.rem(job, beside)
    row, column = (inner, outer) if plan.rows_first else (outer, inner)
    if tile.shared == "matrix":
        row = row * 2 + lax.axis_index("pair")
    elif tile.shared == "x":
        column = column * 2 + lax.axis_index("pair")
    return row * tile.rows, column * tile.columns


def _produce(
    x_ref: Any, w_ref: Any, bias_ref: Any, plan: Plan, *, x_smem: Any, w_smem: Any, bias_smem: Any,
    ready: Any, bias_ready: Any, free: Any, **others: Any,
) -> None:  # fmt: skip
    """Streams the operands of all tiles."""
    del others
    tile, features = plan.tile, w_ref.shape[1] // HALVES
    across_x, across_w = ("pair" if tile.shared == which else None for which in ("x", "matrix"))

    @pl.loop(0, _job_count(plan))
    def _(index: Array) -> None:
        row, column = _place(plan, index)
        halves = [pl.ds(half * features + column, tile.columns) for half in range(HALVES)]

        @pl.loop(0, plan.steps)
        def _(step: Array) -> None:
            number = index * plan.steps + step
            slot, channels = hopper.slot_of(number, plan.stages), pl.ds(step * DEPTH, DEPTH)
            pl.when(number >= plan.stages)(lambda: plgpu.barrier_wait(free.at[slot]))

            # The tile before has as many steps as there are slots: one of them has been handed back, so its
            # bias has been read.
            @pl.when(step == 0)
            def _() -> None:
                for half, columns in enumerate(halves):
                    plgpu.copy_gmem_to_smem(bias_ref.at[columns], bias_smem.at[half], bias_ready)

            plgpu.copy_gmem_to_smem(
                x_ref.at[pl.ds(row, tile.rows), channels], x_smem.at[slot], ready.at[slot],
                collective_axes=across_x,
            )  # fmt: skip
            for half, columns in enumerate(halves):
                plgpu.copy_gmem_to_smem(
                    w_ref.at[channels, columns], w_smem.at[slot, half], ready.at[slot],
                    collective_axes=across_w,
                )  # fmt: skip

    hopper.drain(_job_count(plan) * plan.steps, plan.stages, free)


def _consume(
    out_ref: Any, wg: Array, plan: Plan, *, x_smem: Any, w_smem: Any, bias_smem: Any, out_smem: Any,
    ready: Any, bias_ready: Any, free: Any, go: Any,
) -> None:  # fmt: skip
    """One warpgroup's rows of all tiles."""
    shape = (WARPGROUP, plan.tile.columns)
    mine = pl.ds(wg * WARPGROUP, WARPGROUP)

    def products(first: Array, halves: Any) -> None:
        """Adds the tile's products to both accumulators; a slot is handed back a step later."""

        @pl.loop(0, plan.steps)
        def _(step: Array) -> None:
            number = first + step
            slot = hopper.slot_of(number, plan.stages)
            plgpu.barrier_wait(ready.at[slot])
            for half, accumulator in enumerate(halves):
                plgpu.wgmma(accumulator, x_smem.at[slot, mine], w_smem.at[slot, half])
            plgpu.wgmma_wait(HALVES)  # the step before is done

            @pl.when(step > 0)
            def _() -> None:
                plgpu.barrier_arrive(free.at[hopper.slot_of(number - 1, plan.stages)])

            if plan.tile.staggered:
                first_lead = (number == plan.lead) & (wg < plan.consumers - 1)
                pl.when(first_lead)(lambda: plgpu.barrier_arrive(go.at[wg + 1]))

        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free.at[hopper.slot_of(first + plan.steps - 1, plan.stages)])

    if plan.tile.staggered:
        pl.when(wg > 0)(lambda: plgpu.barrier_wait(go.at[wg]))

    @pl.loop(0, _job_count(plan))
    def _(index: Array) -> None:
        row, column = _place(plan, index)
        plgpu.barrier_wait(bias_ready)
        biases = [hopper.by_column(bias_smem.at[half], shape).astype(jnp.float32) for half in range(HALVES)]
        first = index * plan.steps
        run = pl.run_state(functools.partial(products, first))
        gate, value = run(tuple(plgpu.ACC.init(bias) for bias in biases))
        gated = gelu(gate) * value
        # The tile before has left the buffer.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem[wg] = gated.astype(out_smem.dtype)
        plgpu.commit_smem()
        rows = pl.ds(row + wg * WARPGROUP, WARPGROUP)
        plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[rows, pl.ds(column, plan.tile.columns)])

    plgpu.wait_smem_to_gmem(0)


def gelu(x: Array) -> Array:
    """By tanh, float32, with two special functions: the sigmoid is rsqrt(1 + exp2(-y))^2."""
    root = lax.rsqrt(1.0 + jnp.exp2(x * (x * x * -CUBIC - LINEAR)))
    return x * (root * root)
