"""How XLA compiles the programs of models and tasks on the platform there is."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from kernels.common.dispatch import Target, target


def compiler_options() -> dict[str, Any]:
    """Options for `jax.jit` of a model's step, in training or inference.

    On GPUs no matmul goes to Triton: cuBLAS is as fast at a model's sizes, choosing among Triton's tiles
    takes minutes for layers that are not scanned, and what they might have absorbed is left unfused. Nor are
    matmuls of one input merged: the slices that take the result apart cost more than reading the input again.
    And what the program rounds to 16 bits is stored so, not in the float32 it came in and goes back to.
    """
    if target().platform != "gpu":
        return {}
    return {
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_dot_merger_threshold_mb": 0,
        "xla_allow_excess_precision": False,
    }


def jit_for_target(function: Callable[..., Any], **options: Any) -> Callable[[], Any]:
    """A function that gives `jax.jit(function, **options)` with `compiler_options`, the same at every call.

    For programs that belong to a module: which device there is, is not asked for at import.
    """

    @functools.cache
    def jitted(target: Target) -> Any:
        del target  # what the options depend on
        return jax.jit(function, compiler_options=compiler_options(), **options)

    return lambda: jitted(target())
