"""Named workloads of the product in parts: what contract tests run.

Every op package has such a module; `tests/contracts/kernel_contract.py` says what is in it.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array

from kernels.split_matmul.api import split_matmul


@dataclasses.dataclass(frozen=True)
class Workload:
    """One shape; arrays are drawn from a seed by `make_call`.

    Attributes:
      batch: leading axes of x.
      width, features, parts: D, F, P.
      dtypes: what a device tests.
    """

    batch: tuple[int, ...]
    width: int
    features: int
    parts: int
    dtypes: tuple[str, ...] = ("bfloat16",)


SHAPES: dict[str, Workload] = {
    "one_row": Workload((), 6, 5, 2),
    "leading_axes": Workload((2, 1, 7), 24, 5, 3),
    "one_part": Workload((4,), 3, 7, 1),
}

DEVICE_IMPLEMENTATIONS = {"pallas_mosaic_gpu": "gpu"}
DEVICE_SHAPES: dict[str, Workload] = {
    # A frame of TAPNext-B; more tiles than an H100 takes at a time; the other order of tiles; rows beyond the
    # last tile's, and a whole tile of them; fewer steps than slots; many parts of one tile each.
    "frame": Workload((1, 1, 1280), 768, 768, 3, ("bfloat16", "float16")),
    "persistent": Workload((2048,), 192, 1280, 2),
    "columns_first": Workload((2, 700), 320, 128, 2),
    "ragged": Workload((3, 87), 448, 192, 3, ("bfloat16", "float16")),
    "few_rows": Workload((5,), 64, 64, 5),
}
DEVICE_MAPPED = ("ragged",)
DEVICE_REMATERIALISED = ("few_rows",)

DIFFERENTIABLE = ("x", "kernel", "bias")


def make_call(work: Workload, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays (float64, to be cast by the caller) and the options of `run`."""
    rng = np.random.default_rng(seed)
    columns = work.parts * work.features
    return {
        "x": rng.standard_normal((*work.batch, work.width)),
        "kernel": rng.standard_normal((work.width, columns)) * work.width**-0.5,
        "bias": rng.standard_normal(columns),
    }, {"parts": work.parts}


def own_tiles(arrays: dict[str, Array], options: dict[str, Any], name: str) -> dict[str, Any]:
    """The options: no tiles change what is computed."""
    return options


def run(arrays: dict[str, Array], options: dict[str, Any], implementation: str) -> tuple[Array, ...]:
    """The results."""
    x, kernel, bias = (arrays[name] for name in DIFFERENTIABLE)
    return tuple(split_matmul(x, kernel, bias, options["parts"], implementation=implementation))


def poisoned(arrays: dict[str, Array], options: dict[str, Any]) -> dict[str, Array] | None:
    """None: every number of the arrays is used."""
    return None
