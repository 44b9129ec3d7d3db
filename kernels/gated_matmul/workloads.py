"""Named workloads of the gated product: what contract tests run.

Every op package has such a module; `tests/contracts/kernel_contract.py` says what is in it.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array

from kernels.gated_matmul.api import gated_matmul


@dataclasses.dataclass(frozen=True)
class Workload:
    """One shape; arrays are drawn from a seed by `make_call`.

    Attributes:
      batch: leading axes of x.
      width, features: D, F.
      dtypes: what a device tests.
    """

    batch: tuple[int, ...]
    width: int
    features: int
    dtypes: tuple[str, ...] = ("bfloat16",)


SHAPES: dict[str, Workload] = {
    "one_row": Workload((), 6, 5),
    "leading_axes": Workload((2, 1, 7), 24, 10),
}

DEVICE_IMPLEMENTATIONS = {"pallas_mosaic_gpu": "gpu"}
DEVICE_SHAPES: dict[str, Workload] = {
    # More tiles than an H100 takes at a time; the other order of tiles; rows beyond the last tile's, and a
    # whole tile of them; fewer steps than slots; as many rows as a stream of frames has.
    "persistent": Workload((2048,), 192, 1280, ("bfloat16", "float16")),
    "columns_first": Workload((2, 700), 320, 256),
    "ragged": Workload((3, 87), 448, 128, ("bfloat16", "float16")),
    "few_rows": Workload((5,), 64, 384),
    "frame": Workload((1, 1, 1274), 768, 640),
}
DEVICE_MAPPED = ("ragged",)
DEVICE_REMATERIALISED = ("few_rows",)

DIFFERENTIABLE = ("x", "kernel", "bias")


def make_call(work: Workload, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays (float64, to be cast by the caller) and the options of `run`: none."""
    rng = np.random.default_rng(seed)
    columns = 2 * work.features
    return {
        "x": rng.standard_normal((*work.batch, work.width)),
        "kernel": rng.standard_normal((work.width, columns)) * work.width**-0.5,
        "bias": rng.standard_normal(columns),
    }, {}


def own_tiles(arrays: dict[str, Array], options: dict[str, Any], name: str) -> dict[str, Any]:
    """The options: no tiles change what is computed."""
    return options


def run(arrays: dict[str, Array], options: dict[str, Any], implementation: str) -> tuple[Array, ...]:
    """The result."""
    return (gated_matmul(*(arrays[name] for name in DIFFERENTIABLE), implementation=implementation),)


def poisoned(arrays: dict[str, Array], options: dict[str, Any]) -> dict[str, Array] | None:
    """None: every number of the arrays is used."""
    return None
