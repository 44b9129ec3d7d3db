"""Named workloads of the linear scans: what contract tests and benchmarks run.

Every op package has such a module; `tests/contracts/kernel_contract.py` says what is in it. A call runs
`linear_scan` and `rglru_scan` on the same x, so that each shape tests both.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels.linear_scan.api import linear_scan, rglru_scan


@dataclasses.dataclass(frozen=True)
class Workload:
    """One shape with its options; arrays are drawn from a seed by `make_call`.

    Attributes:
      batch, length, width: sizes of x [B, T, D].
      reverse: time runs backwards.
      state: h0 is given.
      resets: steps at which the state is dropped, in all rows.
      first_segment_unused: outputs before the first reset do not count, so inputs there may hold anything.
      dtypes: what a device tests.
    """

    batch: int
    length: int
    width: int
    reverse: bool = False
    state: bool = False
    resets: tuple[int, ...] = ()
    first_segment_unused: bool = False
    dtypes: tuple[str, ...] = ("bfloat16",)


SHAPES: dict[str, Workload] = {
    "odd_21": Workload(3, 21, 20),
    "short_rows": Workload(40, 8, 8, state=True, resets=(0, 5)),
    "reverse_resets": Workload(2, 13, 6, reverse=True, state=True, resets=(12, 7)),
    "one_step": Workload(3, 1, 7, state=True),
    "everything": Workload(2, 23, 10, state=True, resets=(9, 10, 17), first_segment_unused=True),
}

DEVICE_IMPLEMENTATIONS = {"pallas_mosaic_gpu": "gpu", "pallas_mosaic_tpu": "tpu"}
BOTH = ("bfloat16", "float32")
_UNUSED = Workload(2, 600, 256, state=True, resets=(100, 300, 301), first_segment_unused=True, dtypes=BOTH)
DEVICE_SHAPES: dict[str, Workload] = {
    "odd_511": Workload(3, 511, 200, dtypes=BOTH),
    "clips": Workload(197, 32, 768, state=True),
    "one_step": Workload(3, 1, 128, state=True),
    "reverse": Workload(2, 1040, 640, reverse=True, state=True, resets=(1039, 512)),
    "everything": _UNUSED,
    "odd_width": Workload(1, 300, 130, resets=(7,)),
    "resets": Workload(2, 260, 384, state=True, resets=(50, 200)),
}
DEVICE_MAPPED = ("everything", "odd_width")
DEVICE_REMATERIALISED = ("resets",)

DIFFERENTIABLE = ("x", "a", "gate_x", "gate_a", "a_param", "h0")


def make_call(work: Workload, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays (float64, to be cast by the caller) and the options of `run`."""
    rng = np.random.default_rng(seed)
    shape = (work.batch, work.length, work.width)
    arrays = {
        "x": rng.standard_normal(shape),
        "a": rng.uniform(0.3, 1, shape) * np.where(rng.random(shape) < 0.2, -1, 1),
        "gate_x": rng.standard_normal(shape),
        "gate_a": rng.standard_normal(shape) - 1,
        "a_param": rng.uniform(-6, 0, work.width),
        "h0": rng.standard_normal((work.batch, work.width)),
    }
    return arrays, {"work": work}


def own_tiles(arrays: dict[str, Array], options: dict[str, Any], name: str) -> dict[str, Any]:
    """The options: scans have no tiles that change what they compute."""
    return options


def run(arrays: dict[str, Array], options: dict[str, Any], implementation: str) -> tuple[Array, ...]:
    """h, h_last and log_decay of both ops."""
    work: Workload = options["work"]
    x, a, gate_x, gate_a, a_param, h0 = (arrays[name] for name in DIFFERENTIABLE)
    state = h0.astype(jnp.promote_types(x.dtype, jnp.float32)) if work.state else None
    shared: dict[str, Any] = {
        "reverse": work.reverse, "return_decay": True, "implementation": implementation
    }  # fmt: skip
    reset = None
    if work.resets:
        reset = jnp.zeros(x.shape[:2], bool).at[:, list(work.resets)].set(True)
        # Constants: the gradient of an a that is 0 is the state before it, wherever that comes from.
        a = jnp.where(reset[..., None], 0, a)
    plain = linear_scan(x, a, state, **shared)
    gated = rglru_scan(x, gate_x, gate_a, a_param, state, reset, **shared)
    if not work.first_segment_unused:
        return (*plain, *gated)
    used = ~_first_segment(work)[None, :, None]
    return jnp.where(used, plain[0], 0), *plain[1:], jnp.where(used, gated[0], 0), *gated[1:]


def poisoned(arrays: dict[str, Array], options: dict[str, Any]) -> dict[str, Array] | None:
    """The arrays with NaN where `run` must not look; None if there is no such place."""
    work: Workload = options["work"]
    if not work.first_segment_unused:
        return None
    x = jnp.where(_first_segment(work)[None, :, None], jnp.nan, arrays["x"])
    return {**arrays, "x": x, "h0": jnp.full_like(arrays["h0"], jnp.nan)}


def _first_segment(work: Workload) -> np.ndarray:
    """Steps before the first reset, in the order of time."""
    steps = np.arange(work.length)
    return steps > max(work.resets) if work.reverse else steps < min(work.resets)
