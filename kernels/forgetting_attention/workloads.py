"""Named workloads of forgetting attention: what contract tests and benchmarks run.

Every op package has such a module; `tests/contracts/kernel_contract.py` says what is in it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels.forgetting_attention.api import forgetting_attention
from kernels.forgetting_attention.config import TileConfig
from kernels.forgetting_attention.visits import own_tiles as tiles_of


@dataclasses.dataclass(frozen=True)
class Workload:
    """One shape with its options; arrays are drawn from a seed by `make_call`.

    Without `tiles` a call gets those of the implementation that runs it. `dtypes`: what a device tests.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    gates: str = "mixed"
    kv_length: tuple[int, ...] | None = None
    seq_start: tuple[int, ...] | None = None
    segments: tuple[int, ...] | None = None
    pruning: float | str | None = None
    sm_scale: float | None = None
    tiles: TileConfig | None = None
    dtypes: tuple[str, ...] = ("bfloat16",)


SMALL_TILES = TileConfig((16, 32), (32, 16), (16, 16))
JOINT_TILES = TileConfig((16, 16), (16, 16), (32, 16), heads_per_step=64)

SHAPES: dict[str, Workload] = {
    "square": Workload(2, 64, 64, 2, 2, 16, tiles=SMALL_TILES),
    "odd_63": Workload(1, 63, 63, 3, 3, 24, tiles=SMALL_TILES),
    "odd_111_default_tiles": Workload(1, 111, 111, 2, 2, 32),
    "rectangle": Workload(2, 40, 111, 2, 2, 16, tiles=SMALL_TILES),
    "one_query": Workload(2, 1, 37, 4, 2, 16, tiles=SMALL_TILES),
    "buffer": Workload(3, 24, 80, 2, 2, 16, kv_length=(80, 53, 24), tiles=SMALL_TILES),
    "buffer_shorter_than_queries": Workload(3, 40, 64, 2, 1, 16, kv_length=(64, 17, 0), tiles=SMALL_TILES),
    "left_padding": Workload(3, 63, 63, 2, 2, 16, seq_start=(0, 17, 50), tiles=SMALL_TILES),
    "left_padding_rectangle": Workload(
        2, 33, 50, 2, 2, 16, seq_start=(3, 30), sm_scale=0.5, tiles=SMALL_TILES
    ),
    "packed": Workload(2, 111, 111, 2, 2, 16, segments=(20, 1, 33, 40, 17), tiles=SMALL_TILES),
    "packed_rectangle_grouped": Workload(1, 60, 90, 4, 2, 16, segments=(25, 30, 35), tiles=SMALL_TILES),
    "everything": Workload(
        2, 48, 96, 4, 2, 16, kv_length=(96, 70), seq_start=(5, 30), segments=(40, 20, 36), tiles=SMALL_TILES
    ),
    "grouped_heads_together": Workload(2, 63, 63, 4, 2, 16, seq_start=(0, 9), tiles=JOINT_TILES),
    "one_kv_head": Workload(1, 48, 48, 4, 1, 16, tiles=SMALL_TILES),
    "pruned_threshold": Workload(1, 111, 111, 4, 2, 16, pruning=-3.0, tiles=SMALL_TILES),
    "pruned_heads_together": Workload(2, 111, 111, 4, 2, 16, pruning=-3.0, tiles=JOINT_TILES),
    "pruned_packed_buffer": Workload(
        2, 64, 96, 2, 2, 16, pruning=-3.0, kv_length=(96, 75), segments=(50, 46), tiles=SMALL_TILES
    ),
    "pruned_auto": Workload(1, 111, 111, 4, 4, 16, gates="fast", pruning="auto", tiles=SMALL_TILES),
    "pruned_tight": Workload(1, 111, 111, 4, 2, 16, gates="fast", pruning="tight", tiles=SMALL_TILES),
}

# Kernels of one kind of device want tiles of their own, and lengths of several of them.
DEVICE_IMPLEMENTATIONS = {"pallas_mosaic_gpu": "gpu"}
BOTH = ("bfloat16", "float16")
OTHER_TILES = TileConfig((192, 64), (128, 128), (192, 64))
DEVICE_SHAPES: dict[str, Workload] = {
    "odd_511": Workload(1, 511, 511, 3, 3, 64, dtypes=BOTH),
    "one_tile_in_part": Workload(2, 37, 37, 2, 2, 64),
    "other_tiles": Workload(1, 450, 450, 2, 2, 64, tiles=OTHER_TILES),
    "head_dim_24": Workload(1, 200, 200, 2, 2, 24),
    "head_dim_80": Workload(1, 333, 333, 2, 1, 80),
    "head_dim_128": Workload(1, 391, 420, 2, 2, 128, dtypes=BOTH),
    "head_dim_256": Workload(1, 263, 300, 4, 2, 256, dtypes=BOTH),
    "rectangle": Workload(2, 150, 613, 2, 2, 64),
    "one_query": Workload(2, 1, 300, 4, 2, 64),
    "buffer": Workload(3, 200, 500, 2, 2, 64, kv_length=(500, 333, 200)),
    "buffer_shorter_than_queries": Workload(3, 300, 400, 2, 1, 64, kv_length=(400, 130, 0)),
    "left_padding": Workload(3, 333, 333, 2, 2, 64, seq_start=(0, 170, 333)),
    "left_padding_rectangle": Workload(2, 270, 400, 2, 2, 64, seq_start=(3, 230), sm_scale=0.5),
    "packed": Workload(2, 630, 630, 2, 2, 64, segments=(100, 1, 300, 29, 200)),
    "packed_rectangle_grouped": Workload(1, 300, 450, 4, 2, 64, segments=(125, 150, 175)),
    "everything": Workload(
        2, 300, 600, 4, 2, 64, kv_length=(600, 430), seq_start=(40, 190), segments=(250, 130, 220),
        dtypes=BOTH,
    ),
    "everything_head_dim_128": Workload(
        2, 300, 600, 4, 2, 128, kv_length=(600, 430), seq_start=(40, 190), segments=(250, 130, 220)
    ),
    "one_kv_head": Workload(1, 256, 256, 4, 1, 64, sm_scale=-0.1),
    "pruned_threshold": Workload(1, 699, 699, 4, 2, 64, pruning=-3.0, dtypes=BOTH),
    "pruned_rectangle": Workload(2, 400, 650, 4, 4, 128, pruning=-3.0),
    "pruned_packed_buffer": Workload(
        2, 500, 700, 4, 2, 64, pruning=-3.0, kv_length=(700, 530), segments=(390, 310)
    ),
    "pruned_auto": Workload(1, 640, 640, 4, 4, 64, pruning="auto"),
    "pruned_tight": Workload(1, 640, 640, 4, 2, 64, pruning="tight", dtypes=BOTH),
    "pruned_tight_everything": Workload(
        2, 500, 700, 4, 2, 64, pruning="tight", kv_length=(700, 530), seq_start=(0, 90), segments=(600, 100)
    ),
}  # fmt: skip

# The gradients of pruned passes depend on the tiles, which `reference` is given too.
DEVICE_MAPPED = ("everything", "pruned_threshold")
DEVICE_REMATERIALISED = ("packed_rectangle_grouped",)

DIFFERENTIABLE = ("q", "k", "v", "log_fgate")


def make_call(work: Workload, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Float64 arrays to differentiate, and the other arguments."""
    rng = np.random.default_rng(seed)

    def normal(length: int, heads: int) -> np.ndarray:
        return rng.standard_normal((work.batch, length, heads, work.head_dim))

    arrays = {
        "q": normal(work.queries, work.heads),
        "k": normal(work.keys, work.kv_heads),
        "v": normal(work.keys, work.kv_heads),
        "log_fgate": gates(work.gates, rng, (work.batch, work.keys, work.heads)),
    }
    options: dict[str, Any] = {
        "sm_scale": work.sm_scale, "adaptive_threshold": work.pruning, "tiles": work.tiles,
    }  # fmt: skip
    for name in ("kv_length", "seq_start"):
        value = getattr(work, name)
        options[name] = None if value is None else jnp.asarray(value, jnp.int32)
    if work.segments is not None:
        # Ids repeat and are not sorted: only adjacency counts.
        ids = np.repeat(np.arange(len(work.segments)) % 2, work.segments)
        options["segment_ids"] = jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (work.batch, work.keys))
    return arrays, options


def own_tiles(arrays: dict[str, Array], options: dict[str, Any], name: str) -> dict[str, Any]:
    """The options with the tiles that an implementation takes here if it is given none.

    Raises:
      ImplementationError: it cannot run here.
    """
    return {**options, "tiles": options["tiles"] or tiles_of(arrays["q"], arrays["k"], name)[1]}


def gates(kind: str, rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Log gates [B, S, N]: "global" (-1e-6), "fast" (mean decay time 16 tokens), "mix" (per head,
    log-spaced from 1 to 16384 tokens), each -2 u / tau with u uniform in (0, 1); "mixed" (log-sigmoid of
    logits around -1 ... 6 per head)."""
    heads = shape[2]
    if kind == "global":
        return np.full(shape, -1e-6)
    if kind == "mixed":
        logits = np.linspace(-1, 6, heads) + rng.standard_normal(shape)
        return -np.logaddexp(0, -logits)
    tau = {"fast": np.full(heads, 16.0), "mix": np.geomspace(1, 16384, heads)}[kind]
    return -2 * rng.random(shape) / tau


def run(
    arrays: dict[str, Any], options: dict[str, Any], implementation: str | Sequence[str] | None
) -> tuple[Array, Array]:
    """The public function on such a call; returns all its outputs."""
    out, lse = forgetting_attention(**arrays, **options, return_lse=True, implementation=implementation)
    return out, lse


def poisoned(arrays: dict[str, Array], options: dict[str, Any]) -> dict[str, Array] | None:
    """The same call with NaN wherever the contract says nothing is read; None if it reads everything."""
    length, start = options.get("kv_length"), options.get("seq_start")
    if length is None and start is None:
        return None
    keys, queries = arrays["k"].shape[1], arrays["q"].shape[1]
    at = jnp.arange(keys)
    end = jnp.full((arrays["k"].shape[0], 1), keys) if length is None else length[:, None]
    begin = jnp.zeros_like(end) if start is None else start[:, None]
    row_at = end - queries + jnp.arange(queries)
    dead_key = ((at < begin) | (at >= end))[:, :, None]
    dead_row = (row_at < begin)[:, :, None, None]
    return {
        "q": jnp.where(dead_row, jnp.nan, arrays["q"]),
        "k": jnp.where(dead_key[..., None], jnp.nan, arrays["k"]),
        "v": jnp.where(dead_key[..., None], jnp.nan, arrays["v"]),
        "log_fgate": jnp.where(dead_key, jnp.nan, arrays["log_fgate"]),
    }
