"""The Hopper kernels at real sizes, lowered for CUDA without one: shared memory, swizzles, shapes and dtypes.

Lowering stops before ptxas, so registers and spills are not seen here. Also who is chosen where, and why not.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export

from kernels.common.dispatch import ImplementationError, compiling_for
from kernels.forgetting_attention import TileConfig, explain, forgetting_attention

NAME = "pallas_mosaic_gpu"
HOPPER = functools.partial(compiling_for, "gpu", "9.0", "NVIDIA H200", 132)


def call(batch: int, length: int, heads: int, head_dim: int, dtype: str = "bfloat16") -> list[Any]:
    """Shapes of q, k, v and the log gates."""
    qkv = jax.ShapeDtypeStruct((batch, length, heads, head_dim), dtype)
    return [qkv, qkv, qkv, jax.ShapeDtypeStruct((batch, length, heads), jnp.float32)]


def kernels_of(function: Any, args: list[Any]) -> str:
    """The program lowered for CUDA."""
    with HOPPER():
        return export.export(jax.jit(function), platforms=["cuda"])(*args).mlir_module()


def both_passes(**options: Any) -> Any:
    def loss(*args: jax.Array) -> jax.Array:
        return forgetting_attention(*args, **options).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))


SIZES = {
    "head_dim_64": (2, 16384, 16, 64), "head_dim_128": (2, 16384, 8, 128), "head_dim_256": (1, 1000, 2, 256),
    "head_dim_80": (1, 777, 2, 80),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_both_passes_lower_by_automatic_choice(size: str, dtype: str) -> None:
    program = kernels_of(both_passes(adaptive_threshold="auto"), call(*SIZES[size], dtype))
    # Forward, dk and dv (two kernels at head dim 256), dq.
    kernels = 4 if size == "head_dim_256" else 3
    assert program.count("custom_call @mosaic_gpu") == kernels


@pytest.mark.parametrize("pruning", [None, -3.0, "tight"])
def test_every_option_lowers(pruning: float | str | None) -> None:
    def packed(ids: jax.Array, start: jax.Array, filled: jax.Array, *args: jax.Array) -> Any:
        options = {"segment_ids": ids, "seq_start": start, "kv_length": filled}
        return both_passes(adaptive_threshold=pruning, implementation=NAME, **options)(*args)

    each = jax.ShapeDtypeStruct((2,), jnp.int32)
    ids = jax.ShapeDtypeStruct((2, 3000), jnp.int32)
    assert "mosaic_gpu" in kernels_of(packed, [ids, each, each, *call(2, 3000, 4, 64)])


@pytest.mark.parametrize(
    "tiles",
    [
        TileConfig((192, 64), (64, 128), (192, 64)),
        TileConfig((128, 192), (128, 128), (128, 128)),
        TileConfig((192, 128), (64, 192), (192, 64)),
    ],
)
def test_other_tiles_lower(tiles: TileConfig) -> None:
    options = {"tiles": tiles, "implementation": NAME}
    assert "mosaic_gpu" in kernels_of(both_passes(**options), call(1, 4096, 2, 64))


SHARDED = """
import jax, jax.numpy as jnp
from jax import export
from kernels.common.dispatch import compiling_for
from kernels.forgetting_attention import forgetting_attention

jax.set_mesh(jax.make_mesh((4, 2), ("data", "tensor")))
spec = jax.P("data", None, "tensor")

def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.NamedSharding(jax.sharding.get_mesh(), spec))

@jax.shard_map(in_specs=(spec,) * 4, out_specs=spec, check_vma=CHECKED)
def attend(*args):
    return forgetting_attention(*args, adaptive_threshold=MODE, implementation="pallas_mosaic_gpu")

def loss(*args):
    return attend(*args).astype(jnp.float32).sum()

qkv = shape(8, 2048, 8, 64)
args = (qkv, qkv, qkv, shape(8, 2048, 8, dtype=jnp.float32))
with compiling_for("gpu", "9.0"):
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    program = export.export(step, platforms=["cuda"])(*args)
assert program.nr_devices == 8
assert program.mlir_module().count("custom_call @mosaic_gpu") == 3
print("lowered for", program.nr_devices, "devices")
"""


@pytest.mark.parametrize(
    ("mode", "checked"),
    [
        ("'auto'", "True"),
        pytest.param("None", "True", marks=pytest.mark.slow),
        pytest.param("'auto'", "False", marks=pytest.mark.slow),
    ],
)
def test_lowers_inside_shard_map_over_batch_and_heads(run_python: Any, mode: str, checked: str) -> None:
    """As models call it, and with checks of what varies over the mesh."""
    program = SHARDED.replace("MODE", mode).replace("CHECKED", checked)
    done = run_python("-c", program, devices=8, timeout=300)
    assert "lowered for 8 devices" in done.stdout


def lines_of(text: str) -> dict[str, str]:
    """Implementation -> what `explain` says of it."""
    return dict(line.strip().split(maxsplit=1) for line in text.splitlines()[1:])


@pytest.mark.parametrize(
    ("platform", "capability", "reason"),
    [
        ("gpu", "8.0", "this GPU has 8.0"),
        ("gpu", "8.9", "this GPU has 8.9"),
        ("gpu", "10.0", "this GPU has 10.0"),
        ("gpu", None, "needs an NVIDIA Hopper GPU"),
        ("cpu", None, "needs an NVIDIA Hopper GPU"),
        ("tpu", None, "needs an NVIDIA Hopper GPU"),
    ],
)
def test_other_devices_are_told_why_not(platform: str, capability: str | None, reason: str) -> None:
    args = call(1, 256, 2, 64)
    with compiling_for(platform, capability):
        said = lines_of(explain(*args[:2]))
        assert reason in said[NAME]
        assert said[NAME].startswith("cannot run:")
        assert said["xla_chunked"] == "runs"
        with pytest.raises(ImplementationError, match=f"{NAME}: needs"):
            jax.eval_shape(lambda *a: forgetting_attention(*a, implementation=NAME), *args)


REFUSED: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "float32": (call(1, 256, 2, 64, "float32"), {}, "takes bfloat16 and float16, not float32"),
    "head dim": (call(1, 256, 2, 264), {}, "takes head dims up to 256, not 264"),
    "tiles": (
        call(1, 256, 2, 64),
        {"tiles": TileConfig((64, 64), (64, 128), (128, 64))},
        r"tiles.forward=\(64, 64\)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_named_implementation_never_falls_back(what: str) -> None:
    args, options, message = REFUSED[what]

    def run(implementation: Any) -> Any:
        return jax.eval_shape(
            lambda *a: forgetting_attention(*a, implementation=implementation, **options), *args
        )

    with HOPPER():
        with pytest.raises(ImplementationError, match=message):
            run(NAME)
        assert run([NAME, "xla_chunked"]).shape == args[0].shape
        assert lines_of(explain(*args[:2], **options))["xla_chunked"] == "runs"
        assert lines_of(explain(*call(1, 256, 2, 64)[:2]))[NAME] == "runs"
