"""Pieces of warp-specialised Hopper kernels (sm_90a), Pallas Mosaic GPU: shared memory, roles, rings.

Such a kernel is persistent: in each CTA one warpgroup loads tiles by TMA through rings of slots in shared
memory, and the others, which own 64 rows each, hand them to the tensor cores.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

WARPGROUP = 64  # rows of a wgmma
SHARED_LIMIT = 232448  # bytes of shared memory that a CTA may have
SHARED_BYTES = SHARED_LIMIT - 4096  # less some for barriers and alignment
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def not_hopper(platform: str, capability: str | None) -> str | None:
    """Why a kernel of sm_90a refuses what the program is compiled for; None: it does not."""
    if platform != "gpu" or capability is None:
        return "needs an NVIDIA Hopper GPU"
    if capability != "9.0":
        return f"is written for compute capability 9.0 (Hopper); this GPU has {capability}"
    return None


def tiles(shape: Sequence[int], dtype: Any) -> Any:
    """Shared memory for matrices that TMA fills and wgmma reads: the last two axes, swizzled by 128 bytes."""
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms: Any = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    return plgpu.SMEM(tuple(shape), dtype, transforms=transforms)


def warpgroups(consumers: int, produce: Callable[[], None], consume: Callable[[Array], None]) -> None:
    """Runs `produce()` on the last warpgroup and `consume(wg)` on the others, which get most of its
    registers.
    """
    wg = lax.axis_index("wg")
    few, many = (24, 240) if consumers == 2 else (32, 160)

    @pl.when(wg == consumers)
    def _() -> None:
        plgpu.set_max_registers(few, action="decrease")
        produce()

    @pl.when(wg < consumers)
    def _() -> None:
        plgpu.set_max_registers(many, action="increase")
        consume(wg)


def slot_of(step: Array, slots: int) -> Array:
    """Slot of the step-th tile of a ring."""
    return lax.rem(step, jnp.int32(slots))


def drain(done: Array, stages: int, *barriers: Any) -> None:
    """Waits for every slot to be handed back: none may be given up while a consumer still has to announce
    it.
    """

    @pl.loop(jnp.maximum(done - stages, 0), done)
    def _(step: Array) -> None:
        for free in barriers:
            plgpu.barrier_wait(free.at[slot_of(step, stages)])


def by_column(ref: Any, shape: tuple[int, ...]) -> Array:
    """One value per column of a tile, from shared memory, broadcast to the layout of an accumulator."""
    return lax.broadcast_in_dim(plgpu.load(ref, layout=BY_COLUMN), shape, [1])
