"""A matrix product as Hopper kernels (sm_90a) of several ops compute it, written with Pallas Mosaic GPU.

A CTA computes a tile of rows x columns at a time, of one or of several groups of the matrix's columns: x is
read once for them all. Accumulators start from the bias; what becomes of them is the op's. Warpgroups own 64
rows of a tile each. CTAs are persistent; two next to each other form a cluster, take tiles below (or beside)
each other and share what they read of the matrix (or of x): each loads half of it into both.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
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
MAX_STAGES = 6
SHARED_BYTES = hopper.SHARED_LIMIT - 1024  # less some for barriers and alignment

Shared = Literal["matrix", "x", "nothing"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a CTA computes at a time.

    Attributes:
      rows: 128 or 192, 64 per warpgroup.
      columns: of each group, a multiple of 64, at most 256.
      shared: what the two CTAs of a cluster share: the matrix's tile, if theirs lie below each other; x's, if
        they lie beside each other; or nothing, and there are no clusters.
      staggered: whether each warpgroup starts some steps after the one before it: then the tensor cores have
        the other's products to do while one computes what becomes of its own.
    """

    rows: int = 128
    columns: int = 128
    shared: Shared = "matrix"
    staggered: bool = False

    @property
    def cluster(self) -> int:
        """CTAs that share."""
        return 1 if self.shared == "nothing" else 2

    @property
    def whole(self) -> int:
        """What features must be a multiple of: a cluster's columns."""
        return self.columns * (2 if self.shared == "x" else 1)

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.columns}", f"{self.shared} shared", "staggered" * self.staggered]
        return ", ".join(filter(None, words))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static shape of one kernel.

    Attributes:
      tile: see `Tile`.
      groups: of the matrix's columns, of which a tile has the same ones.
      steps: of DEPTH channels, in a tile.
      stages: steps whose operands are in shared memory at a time.
      row_tiles, column_tiles: of a group; a cluster's two count as one.
      rows_first: whether clusters that run together take tiles below each other rather than beside.
      clusters: how many there are.
    """

    tile: Tile
    groups: int
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
        """What plans are judged by: results of the busiest CTA; of all, with those beyond the rows."""
        results = self.tile.rows * self.tile.columns
        return ceil_div(self.jobs, self.clusters) * results, self.jobs * self.tile.cluster * results


def make_plan(rows: int, width: int, features: int, cores: int, tile: Tile, groups: int) -> Plan:
    """The plan for x [rows, width] and a matrix [width, groups features].

    Tiles that run together use all of the smaller operand and step through the larger one: so the smaller
    one stays in the L2 cache, and the larger one is read from memory once.

    Args:
      rows: at least a tile's.
      width: a multiple of DEPTH.
      features: columns of a group, a multiple of the tile's `whole`.
      cores: multiprocessors.

    Raises:
      ValueError: features that are no whole tiles.
    """
    if features % tile.whole:
        raise ValueError(f"tiles of {tile} take a multiple of {tile.whole} features, not {features}")
    steps = width // DEPTH
    slot = (tile.rows + groups * tile.columns) * DEPTH * 2
    other = (tile.rows + groups * 2) * tile.columns * 2  # the result's buffers, and the bias in float32
    stages = min((SHARED_BYTES - other) // slot, MAX_STAGES, steps)
    row_tiles, column_tiles = ceil_div(rows, tile.rows), features // tile.columns
    if tile.shared == "matrix":
        row_tiles = ceil_div(row_tiles, 2)
    elif tile.shared == "x":
        column_tiles //= 2
    clusters = min(max(cores // tile.cluster, 1), row_tiles * column_tiles)
    return Plan(tile, groups, steps, stages, row_tiles, column_tiles, rows <= groups * features, clusters)


def best_plan(
    rows: int, width: int, features: int, cores: int, sizes: Sequence[tuple[int, int]], groups: int
) -> Plan:
    """The plan that leaves the CTAs least to do, the first if in doubt.

    Args:
      rows, width, features, cores, groups: as in `make_plan`.
      sizes: rows and columns that a tile may have; of some, features are whole tiles.
    """
    tiles = [Tile(*size, shared=shared) for size in sizes for shared in get_args(Shared)]
    able = [tile for tile in tiles if features % tile.whole == 0]
    plans = [make_plan(rows, width, features, cores, tile, groups) for tile in able]
    return min(plans, key=lambda plan: plan.cost)


def call(
    x: Float[Array, "R D"],
    matrix: Float[Array, "D GF"],
    bias: Float[Array, " GF"],
    *,
    plan: Plan,
    finish: Callable[[Sequence[Array]], Array],
    parts: int,
    name: str,
) -> list[Float[Array, "R part"]]:
    """Runs a kernel whose results are `finish` of the tile's products, one per group.

    Args:
      x: 16 bits; R a multiple of 8 and no less than a tile's rows.
      matrix: of x's dtype.
      bias: of 16 or 32 bits.
      plan: for these sizes.
      finish: from the float32 products x W + b of the groups [64, columns] to the result's [64, columns].
      parts: arrays that the result's columns are divided among, whole tiles each.
      name: of the kernel.

    Returns:
      The parts of the result [R, F], in x's dtype.
    """
    tile, features = plan.tile, matrix.shape[1] // plan.groups
    free: dict[str, Any] = {"num_arrivals": plan.consumers, "num_barriers": plan.stages}
    names = ("pair",) if tile.cluster > 1 else ()
    scratch = {
        "x_smem": hopper.tiles((plan.stages, tile.rows, DEPTH), x.dtype),
        "w_smem": hopper.tiles((plan.stages, plan.groups, DEPTH, tile.columns), matrix.dtype),
        "bias_smem": plgpu.SMEM((plan.groups, tile.columns), bias.dtype),
        "out_smem": hopper.tiles((plan.consumers, WARPGROUP, tile.columns), x.dtype),
        "ready": plgpu.Barrier(num_arrivals=1 + plan.groups, num_barriers=plan.stages),
        "bias_ready": plgpu.Barrier(num_arrivals=plan.groups),
        "go": plgpu.Barrier(num_barriers=plan.consumers),
        # A slot is filled by both CTAs of a cluster: both wait until it is free in both.
        "free": plgpu.ClusterBarrier(collective_axes=names, **free) if names else plgpu.Barrier(**free),
    }
    return plgpu.kernel(
        functools.partial(_kernel, plan=plan, finish=finish),
        out_type=[jax.ShapeDtypeStruct((x.shape[0], features // parts), x.dtype)] * parts,
        scratch_types=scratch,
        grid=(plan.clusters,),
        grid_names=("cluster",),
        cluster=(tile.cluster,) * len(names),
        cluster_names=names,
        num_threads=plan.consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )(x, matrix, bias)


def _kernel(
    x_ref: Any, w_ref: Any, bias_ref: Any, *out_refs: Any, plan: Plan, finish: Any, **scratch: Any
) -> None:
    hopper.warpgroups(
        plan.consumers,
        lambda: _produce(x_ref, w_ref, bias_ref, plan, **scratch),
        lambda wg: _consume(out_refs, wg, plan, finish, **scratch),
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
    tile, features = plan.tile, w_ref.shape[1] // plan.groups
    across_x, across_w = ("pair" if tile.shared == which else None for which in ("x", "matrix"))

    @pl.loop(0, _job_count(plan))
    def _(index: Array) -> None:
        row, column = _place(plan, index)
        groups = [pl.ds(group * features + column, tile.columns) for group in range(plan.groups)]

        @pl.loop(0, plan.steps)
        def _(step: Array) -> None:
            number = index * plan.steps + step
            slot, channels = hopper.slot_of(number, plan.stages), pl.ds(step * DEPTH, DEPTH)
            pl.when(number >= plan.stages)(lambda: plgpu.barrier_wait(free.at[slot]))

            # The tile before has as many steps as there are slots: one of them has been handed back, so its
            # bias has been read.
            @pl.when(step == 0)
            def _() -> None:
                for group, columns in enumerate(groups):
                    plgpu.copy_gmem_to_smem(bias_ref.at[columns], bias_smem.at[group], bias_ready)

            plgpu.copy_gmem_to_smem(
                x_ref.at[pl.ds(row, tile.rows), channels], x_smem.at[slot], ready.at[slot],
                collective_axes=across_x,
            )  # fmt: skip
            for group, columns in enumerate(groups):
                plgpu.copy_gmem_to_smem(
                    w_ref.at[channels, columns], w_smem.at[slot, group], ready.at[slot],
                    collective_axes=across_w,
                )  # fmt: skip

    hopper.drain(_job_count(plan) * plan.steps, plan.stages, free)


def _consume(
    out_refs: Sequence[Any], wg: Array, plan: Plan, finish: Callable[[Sequence[Array]], Array], *,
    x_smem: Any, w_smem: Any, bias_smem: Any, out_smem: Any, ready: Any, bias_ready: Any, free: Any, go: Any,
) -> None:  # fmt: skip
    """One warpgroup's rows of all tiles."""
    tile, part = plan.tile, out_refs[0].shape[1]
    shape = (WARPGROUP, tile.columns)
    mine = pl.ds(wg * WARPGROUP, WARPGROUP)

    def products(first: Array, groups: Any) -> None:
        """Adds the tile's products to all accumulators; a slot is handed back a step later."""

        @pl.loop(0, plan.steps)
        def _(step: Array) -> None:
            number = first + step
            slot = hopper.slot_of(number, plan.stages)
            plgpu.barrier_wait(ready.at[slot])
            for group, accumulator in enumerate(groups):
                plgpu.wgmma(accumulator, x_smem.at[slot, mine], w_smem.at[slot, group])
            plgpu.wgmma_wait(plan.groups)  # the step before is done

            @pl.when(step > 0)
            def _() -> None:
                plgpu.barrier_arrive(free.at[hopper.slot_of(number - 1, plan.stages)])

            if tile.staggered:
                first_lead = (number == plan.lead) & (wg < plan.consumers - 1)
                pl.when(first_lead)(lambda: plgpu.barrier_arrive(go.at[wg + 1]))

        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free.at[hopper.slot_of(first + plan.steps - 1, plan.stages)])

    if tile.staggered:
        pl.when(wg > 0)(lambda: plgpu.barrier_wait(go.at[wg]))

    @pl.loop(0, _job_count(plan))
    def _(index: Array) -> None:
        row, column = _place(plan, index)
        plgpu.barrier_wait(bias_ready)
        biases = [hopper.by_column(bias_smem.at[g], shape).astype(jnp.float32) for g in range(plan.groups)]
        run = pl.run_state(functools.partial(products, index * plan.steps))
        result = finish(run(tuple(plgpu.ACC.init(bias) for bias in biases)))
        # The tile before has left the buffer.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem[wg] = result.astype(out_smem.dtype)
        plgpu.commit_smem()
        rows = pl.ds(row + wg * WARPGROUP, WARPGROUP)
        for number, ref in enumerate(out_refs):
            first = number * part
            columns = pl.ds(column - first, tile.columns)
            write = functools.partial(plgpu.copy_smem_to_gmem, out_smem.at[wg], ref.at[rows, columns])
            if len(out_refs) == 1:
                write()
            else:
                pl.when((column >= first) & (column < first + part))(write)

    plgpu.wait_smem_to_gmem(0)
