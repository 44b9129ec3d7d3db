"""The Hopper kernels interpreted on the CPU, all passes, with detection of races and deadlocks.

Few and small shapes: an interpreted tile takes about a second. `tests/contracts/device_kernel_test.py` runs
more on a GPU; here every path through the kernels runs once, and `--slow` adds dtypes, head dims and options.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common.dispatch import compiling_for
from kernels.forgetting_attention import TileConfig, attend_partial
from kernels.forgetting_attention.workloads import DEVICE_SHAPES, Workload
from tests.contracts.kernel_contract import TOLERANCE, assert_close, compiled, expected, inputs
from tests.kernels.mosaic_gpu_interpreter import extended_interpreter

OP, NAME = "forgetting_attention", "pallas_mosaic_gpu"
SMALL_TILES = TileConfig((128, 64), (64, 128), (128, 64))
SHAPES = {
    "plain": Workload(1, 200, 200, 2, 2, 64),
    "everything": Workload(
        2, 140, 200, 2, 1, 64, kv_length=(200, 130), seq_start=(0, 20), segments=(80, 90, 30),
        tiles=SMALL_TILES,
    ),
    "pruned": Workload(1, 330, 330, 1, 1, 64, gates="fast", pruning=-3.0, tiles=SMALL_TILES),
    # The kv kernel reads tiles of rows beyond the last block for which the q kernel writes delta.
    "uneven": Workload(1, 150, 150, 1, 1, 64, tiles=TileConfig((128, 64), (128, 192), (192, 128))),
}  # fmt: skip
LATER = ("head_dim_24", "left_padding", "other_tiles", "pruned_tight", "pruned_packed_buffer", "one_kv_head")


def interpreted(work: Workload, dtype: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Outputs and gradients of the kernels, and those of `reference` in float64 with the same tiles."""
    with compiling_for("gpu", "9.0", cores=2):
        arrays, options = inputs(OP, work, dtype, name=NAME)
        with extended_interpreter(time_limit=300):
            found = [np.asarray(x, np.float64) for x in compiled(OP, options, NAME)(arrays)]
    return found, expected(OP, arrays, options)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_without_races(shape: str) -> None:
    found, wanted = interpreted(SHAPES[shape], "bfloat16")
    assert_close(found, wanted, TOLERANCE["bfloat16"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ("odd_511", "float16"),
        ("head_dim_128", "float16"),
        ("head_dim_256", "bfloat16"),
        *((shape, "bfloat16") for shape in LATER),
    ],
)
def test_shapes_of_the_device_equal_reference_without_races(shape: str, dtype: str) -> None:
    found, wanted = interpreted(DEVICE_SHAPES[shape], dtype)
    assert_close(found, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(SHAPES["pruned"], id="pruned"),
        *(
            pytest.param(DEVICE_SHAPES[shape], id=shape, marks=pytest.mark.slow)
            for shape in ("pruned_threshold", "pruned_rectangle", "pruned_packed_buffer")
        ),
    ],
)
def test_shapes_with_thresholds_prune(work: Workload) -> None:
    """Otherwise their comparison with `reference` would say nothing of pruning."""
    with compiling_for("gpu", "9.0"):
        arrays, options = inputs(OP, work, "bfloat16", name=NAME)
    exact: Any = expected(OP, arrays, {**options, "adaptive_threshold": None})
    pruned: Any = expected(OP, arrays, options)
    difference = max(np.abs(a - b).max() for a, b in zip(exact, pruned, strict=True))
    assert difference > 2 * TOLERANCE["bfloat16"]


@pytest.mark.slow
def test_both_backward_kernels_form_the_same_score_gradients() -> None:
    """A gate's gradient is a sum, to the end, of row sums of one kernel less column sums of the other."""
    rng = np.random.default_rng(0)
    length, tiles = 320, TileConfig((128, 64), (64, 192), (192, 64))
    log_fgate = -np.logaddexp(0, -rng.normal(-5, 1, (1, length, 1)))
    decay = jnp.asarray(np.cumsum(log_fgate, axis=1), jnp.float32)
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=(1, length, 1, 64)), jnp.bfloat16) for _ in range(4))

    def attend(row: jax.Array, col: jax.Array) -> jax.Array:
        return attend_partial(q, k, v, row, col, causal=True, tiles=tiles, implementation=NAME)[0]

    @jax.jit
    def gradients(row: jax.Array, col: jax.Array) -> Any:
        return jax.vjp(attend, row, col)[1](cotangent)

    with compiling_for("gpu", "9.0", cores=2), extended_interpreter(time_limit=300):
        by_row, by_column = (np.asarray(x, np.float64)[0, :, 0] for x in gradients(decay, -decay))
    # Left over is what sums of float32 numbers in another order leave: masked tiles start from the same bits.
    apart = np.cumsum((by_row - by_column)[::-1])[::-1]
    assert abs(apart[0]) < 2e-8 * np.sqrt(np.sum(by_column**2))
