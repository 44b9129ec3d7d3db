"""Named workloads of one frame of a recurrent block: what contract tests run.

Every op package has such a module; `tests/contracts/kernel_contract.py` says what is in it.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels.recurrent_frame.api import recurrent_frame
from kernels.recurrent_frame.config import Frame, FrameParams


@dataclasses.dataclass(frozen=True)
class Workload:
    """One shape; arrays are drawn from a seed by `make_call`.

    Attributes:
      rows, groups, block, taps: R, G, S, J.
      positions: of the rows, in turns.
      dtypes: what a device tests.
    """

    rows: int
    groups: int
    block: int
    taps: int = 4
    positions: tuple[int, ...] = (9,)
    dtypes: tuple[str, ...] = ("bfloat16",)


SHAPES: dict[str, Workload] = {
    "one_stream": Workload(5, 2, 3),
    "everything": Workload(9, 1, 4, taps=3, positions=(0, 1, 2, 3)),
}

DEVICE_IMPLEMENTATIONS = {"pallas_mosaic_gpu": "gpu"}
DEVICE_SHAPES: dict[str, Workload] = {
    # A frame of TAPNext-B; rows beyond the last tile, of several streams at all ages; groups of 128; fewer
    # rows than a tile.
    "frame": Workload(1280, 12, 64, dtypes=("bfloat16", "float16")),
    "ages": Workload(1288, 3, 64, positions=(0, 1, 2, 3, 4), dtypes=("bfloat16", "float16")),
    "wide_groups": Workload(200, 2, 128, taps=3, positions=(7, 0)),
    "few_rows": Workload(8, 1, 64, taps=2, positions=(1,)),
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
    width = work.groups * work.block
    names = ("branches", *TAPS[: work.taps - 1], "gate_h")
    columns = (2 * width, *[width] * (work.taps - 1), width)
    arrays = {name: rng.standard_normal((work.rows, size)) for name, size in zip(names, columns, strict=True)}
    arrays |= {
        "gate_conv": rng.standard_normal((work.taps, width)) * 0.5,
        "gate_conv_bias": rng.standard_normal(width),
        "blocks": rng.standard_normal((work.groups, work.block, 2 * work.block)) * work.block**-0.5,
        "gate_bias": rng.standard_normal(2 * width),
        "gate_rate": rng.uniform(0.01, 8.0, width),
    }
    positions = np.resize(np.asarray(work.positions, np.int32), work.rows)
    return arrays, {"positions": jnp.asarray(positions)}


def own_tiles(arrays: dict[str, Array], options: dict[str, Any], name: str) -> dict[str, Any]:
    """The options: no tiles change what is computed."""
    return options


def run(arrays: dict[str, Array], options: dict[str, Any], implementation: str) -> tuple[Array, ...]:
    """What enters the last map, the state, the newest input."""
    taps = tuple(arrays[name] for name in TAPS if name in arrays)
    frame = Frame(arrays["branches"], taps, arrays["gate_h"], options["positions"])
    names = ("gate_conv", "gate_conv_bias", "blocks", "gate_bias", "gate_rate")
    params = FrameParams(*(arrays[name] for name in names))
    return tuple(recurrent_frame(frame, params, implementation=implementation))


def poisoned(arrays: dict[str, Array], options: dict[str, Any]) -> dict[str, Array] | None:
    """NaN in what starts do not look at: the state, and inputs from before."""
    if not any(position == 0 for position in np.asarray(options["positions"])):
        return None
    start = (options["positions"] == 0)[:, None]
    return arrays | {
        name: jnp.where(start, jnp.nan, arrays[name]) for name in arrays if name.startswith(("tap", "gate_h"))
    }
