"""Forgetting attention and its pruning against results of the official kernels
(tests/golden/fox/README.md).
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.forgetting_attention import (
    TileConfig,
    acp_threshold,
    forgetting_attention,
    prune_bounds,
    visited_fraction,
)

IMPLEMENTATIONS = ("reference", "xla_chunked")
# Those of one kind of device, with its marker.
ON_DEVICE = [pytest.param("pallas_mosaic_gpu", marks=pytest.mark.gpu)]
GRADIENTS = {"q": "dq", "k": "dk", "v": "dv", "log_fgate": "dlog_fgate"}
# The columns of the golden README, absolute. The arrays of a file are exact in 16 bits.
TOLERANCES = {
    "float32": {"out": 3e-5, "log_normalizer": 3e-5, "dq": 5e-5, "dk": 5e-5, "dv": 5e-5, "dlog_fgate": 1e-4},
    "float16": {"out": 2e-3, "log_normalizer": 2e-3, "dq": 5e-3, "dk": 5e-3, "dv": 5e-3, "dlog_fgate": 1e-2},
    "bfloat16": {"out": 2e-2, "log_normalizer": 2e-2, "dq": 4e-2, "dk": 4e-2, "dv": 4e-2, "dlog_fgate": 0.1},
}
THRESHOLD_TOLERANCE = 1e-4
HALF = ("bfloat16", "float16")


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def results(
    golden: dict[str, np.ndarray], implementation: str, dtype: str = "float32", **options: Any
) -> dict[str, np.ndarray]:
    """Outputs and gradients of sum(out * dout), by their golden names, for q, k, v and dout in `dtype`."""
    if "sm_scale" in golden:
        options["sm_scale"] = float(golden["sm_scale"])
    if "seq_start" in golden:
        options["seq_start"] = jnp.asarray(golden["seq_start"])

    @jax.jit
    def run(arrays: dict[str, jax.Array], cotangent: jax.Array) -> tuple[Any, Any]:
        def loss(arrays: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
            out, lse = forgetting_attention(
                **arrays, **options, return_lse=True, implementation=implementation
            )
            return jnp.sum((out * cotangent).astype(jnp.float32)), (out, lse)

        return jax.grad(loss, has_aux=True)(arrays)

    wide = {name: jnp.asarray(golden[name]) for name in (*GRADIENTS, "dout")}
    arrays = {name: x if "gate" in name else x.astype(dtype) for name, x in wide.items()}
    cotangent = arrays.pop("dout")
    with jax.default_matmul_precision("highest"):
        grads, (out, lse) = run(arrays, cotangent)
    return {"out": out, "log_normalizer": lse, **{GRADIENTS[name]: grads[name] for name in GRADIENTS}}


def assert_matches(
    actual: dict[str, np.ndarray], golden: dict[str, np.ndarray], prefix: str = "", dtype: str = "float32"
) -> None:
    for name, value in actual.items():
        tolerance = TOLERANCES[dtype][name]
        np.testing.assert_allclose(
            np.asarray(value, np.float32), golden[prefix + name], rtol=0, atol=tolerance, err_msg=name
        )


def tile(golden: dict[str, np.ndarray], name: str) -> tuple[int, int]:
    rows, columns = (int(size) for size in golden[name])
    return rows, columns


@pytest.mark.golden("op_*.npz", room="fox")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_op(golden_file: Path, implementation: str) -> None:
    golden = load(golden_file)
    assert_matches(results(golden, implementation), golden)


@pytest.mark.golden("op_*.npz", room="fox")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("implementation", [pytest.param("xla_chunked", marks=pytest.mark.slow), *ON_DEVICE])
def test_op_in_16_bits(golden_file: Path, implementation: str, dtype: str) -> None:
    golden = load(golden_file)
    assert_matches(results(golden, implementation, dtype), golden, dtype=dtype)


@pytest.mark.golden("acp_*_safe*.npz", room="fox")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("implementation", ON_DEVICE)
def test_safe_pruning_in_16_bits(golden_file: Path, implementation: str, dtype: str) -> None:
    """Safe thresholds change nothing, whatever the tiles; the other files fix tiles too small for devices."""
    golden = load(golden_file)
    assert "acp_out" not in golden
    threshold: Any = "auto" if bool(golden["threshold_is_auto"]) else jnp.asarray(golden["acp_threshold"])
    assert_matches(results(golden, implementation, dtype, adaptive_threshold=threshold), golden, dtype=dtype)


@pytest.mark.golden("acp_d*.npz", room="fox")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pruned(golden_file: Path, implementation: str) -> None:
    golden = load(golden_file)
    tiles = TileConfig(*(tile(golden, f"block_{name}") for name in ("fwd", "bwd_kv", "bwd_q")))
    threshold: Any = "auto" if bool(golden["threshold_is_auto"]) else jnp.asarray(golden["acp_threshold"])
    actual = results(golden, implementation, adaptive_threshold=threshold, tiles=tiles)
    # Files with weak thresholds carry the pruned results; the others the exact ones, which pruning must not
    # change.
    assert_matches(actual, golden, "acp_" if "acp_out" in golden else "")


@pytest.mark.golden("acp_d*.npz", room="fox")
def test_threshold_and_start_index(golden_file: Path) -> None:
    golden = load(golden_file)
    q, k, log_fgate = (jnp.asarray(golden[name]) for name in ("q", "k", "log_fgate"))
    if bool(golden["threshold_is_auto"]):
        scale = float(golden["sm_scale"]) if "sm_scale" in golden else q.shape[3] ** -0.5
        threshold = acp_threshold(q, k, sm_scale=scale, num_keys=k.shape[1])
        np.testing.assert_allclose(threshold, golden["acp_threshold"], rtol=0, atol=THRESHOLD_TOLERANCE)
    start, _ = prune_bounds(
        log_fgate, jnp.asarray(golden["acp_threshold"]), q_length=q.shape[1], tile=tile(golden, "block_fwd")
    )
    np.testing.assert_array_equal(start, golden["acp_start_index"])


@pytest.mark.golden("acp_index_*.npz", room="fox")
def test_index_search(golden_file: Path) -> None:
    golden = load(golden_file)
    log_fgate, threshold = jnp.asarray(golden["log_fgate"]), jnp.asarray(golden["threshold"])
    queries = int(golden["q_len"])
    for rows, columns in golden["combos"]:
        name, size = f"{rows}x{columns}", (int(rows), int(columns))
        start, end = prune_bounds(log_fgate, threshold, q_length=queries, tile=size)
        np.testing.assert_array_equal(start, golden[f"start_{name}"], err_msg=f"start {name}")
        # Ours is the exact end; the official search ignores the query offset and so ends later when M < N.
        np.testing.assert_array_equal(end, golden[f"end_exact_{name}"], err_msg=f"end {name}")
        assert (np.asarray(end) <= golden[f"end_{name}"]).all()
        kept = visited_fraction(log_fgate, threshold, q_length=queries, tile=size) * int(
            golden[f"blocks_total_{name}"]
        )
        np.testing.assert_allclose(kept, golden[f"blocks_kept_{name}"], rtol=1e-6, err_msg=f"kept {name}")
