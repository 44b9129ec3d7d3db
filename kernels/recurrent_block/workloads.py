"""Named workloads of recurrent blocks, frames and clips: what contract tests run.

Every op package has such a module; `tests/contracts/kernel_contract.py` says what is in it.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels.recurrent_block.api import recurrent_clip, recurrent_frame
from kernels.recurrent_block.config import BlockParams, Clip, Frame, Memory


@dataclasses.dataclass(frozen=True)
class Workload:
    """One shape; arrays are drawn from a seed by `make_call`.

    Attributes:
      rows, groups, block, taps: R, G, S, J; of a clip R is P.
      positions: of the rows, in turns; of a clip's streams, each counted on from its own.
      frames, batch: T and B of a clip; 0 frames: one frame, by `recurrent_frame`.
      memory: whether the clip has one of frames before it.
      dtypes: what a device tests.
    """

    rows: int
    groups: int
    block: int
    taps: int = 4
    positions: tuple[int, ...] = (9,)
    frames: int = 0
    batch: int = 1
    memory: bool = True
    dtypes: tuple[str, ...] = ("bfloat16",)


SHAPES: dict[str, Workload] = {
    "one_stream": Workload(5, 2, 3),
    "everything": Workload(9, 1, 4, taps=3, positions=(0, 1, 2, 3)),
    "clip": Workload(3, 2, 3, frames=5, batch=2, memory=False, positions=(0,)),
    "goes_on": Workload(2, 1, 4, taps=2, frames=3, batch=2, positions=(4, 0)),
}

DEVICE_IMPLEMENTATIONS = {"pallas_mosaic_gpu": "gpu"}
DEVICE_SHAPES: dict[str, Workload] = {
    # A frame of TAPNext-B; rows beyond the last tile, of several streams at all ages; groups of 128; fewer
    # rows than a tile.
    "frame": Workload(1280, 12, 64, dtypes=("bfloat16", "float16")),
    "ages": Workload(1288, 3, 64, positions=(0, 1, 2, 3, 4), dtypes=("bfloat16", "float16")),
    "wide_groups": Workload(200, 2, 128, taps=3, positions=(7, 0)),
    "few_rows": Workload(8, 1, 64, taps=2, positions=(1,)),
    # Clips of TRecViT-B and TAPNext-B; streams that go on, one at a start.
    "clips": Workload(200, 12, 128, frames=16, batch=2, memory=False, positions=(0,)),
    "points": Workload(1280, 12, 64, frames=9, memory=False, positions=(0,), dtypes=("bfloat16", "float16")),
    "clips_go_on": Workload(72, 4, 64, taps=3, frames=5, batch=2, positions=(7, 0)),
    "wide_clips_go_on": Workload(136, 2, 128, frames=6, batch=2, positions=(2, 0)),
}
DEVICE_MAPPED = ("few_rows",)
DEVICE_REMATERIALISED = ("few_rows",)

# Names with "gate" stay wide.
TAPS = tuple(f"tap{number}" for number in range(3))
DIFFERENTIABLE = (
    "branches", "tap0", "gate_h", "gate_conv", "gate_conv_bias", "blocks", "gate_bias", "gate_rate",
)  # fmt: skip


def make_call(work: Workload, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays (float64, to be cast by the caller) and the options of `run`."""
    rng = np.random.default_rng(seed)
    width, names = work.groups * work.block, ("branches", *TAPS[: work.taps - 1], "gate_h")
    columns = (2 * width, *[width] * (work.taps - 1), width)
    arrays, rows = {}, (work.batch, work.rows) if work.frames else (work.rows,)
    for name, size in zip(names, columns, strict=True):
        clip = work.frames and name == "branches"
        shape = (work.batch, work.frames, work.rows, size) if clip else (*rows, size)
        arrays[name] = rng.standard_normal(shape)
    arrays |= {
        "gate_conv": rng.standard_normal((work.taps, width)) * 0.5,
        "gate_conv_bias": rng.standard_normal(width),
        "blocks": rng.standard_normal((work.groups, work.block, 2 * work.block)) * work.block**-0.5,
        "gate_bias": rng.standard_normal(2 * width),
        "gate_rate": rng.uniform(0.01, 8.0, width),
    }
    positions: np.ndarray = np.resize(np.asarray(work.positions, np.int32), rows[0])
    if work.frames:
        positions = positions[:, None] + np.arange(work.frames, dtype=np.int32)
    return arrays, {"positions": jnp.asarray(positions), "remembers": work.memory}


def own_tiles(arrays: dict[str, Array], options: dict[str, Any], name: str) -> dict[str, Any]:
    """The options: no tiles change what is computed."""
    return options


def run(arrays: dict[str, Array], options: dict[str, Any], implementation: str) -> tuple[Array, ...]:
    """What enters the last map, and the state; of one frame the newest input, too."""
    taps = tuple(arrays[name] for name in TAPS if name in arrays)
    names = ("gate_conv", "gate_conv_bias", "blocks", "gate_bias", "gate_rate")
    params, positions = BlockParams(*(arrays[name] for name in names)), options["positions"]
    if positions.ndim == 1:
        frame = Frame(arrays["branches"], taps, arrays["gate_h"], positions)
        return tuple(recurrent_frame(frame, params, implementation=implementation))
    memory = Memory(taps, arrays["gate_h"]) if options["remembers"] else None
    clip = Clip(arrays["branches"], positions, memory)
    return tuple(recurrent_clip(clip, params, implementation=implementation))


def poisoned(arrays: dict[str, Array], options: dict[str, Any]) -> dict[str, Array] | None:
    """NaN in what starts do not look at: the state, and inputs from before."""
    positions = options["positions"].reshape(len(options["positions"]), -1)[:, 0]
    if not (positions == 0).any():
        return None
    before = [name for name in arrays if name.startswith(("tap", "gate_h"))]
    start = (positions == 0).reshape(-1, *[1] * (arrays["gate_h"].ndim - 1))
    return arrays | {name: jnp.where(start, jnp.nan, arrays[name]) for name in before}
