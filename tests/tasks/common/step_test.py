"""How a training step is compiled."""

import jax
import jax.numpy as jnp

from kernels.common.dispatch import compiling_for
from tasks.common.step import compiler_options


def test_a_gpu_has_options_of_its_own_and_xla_knows_them() -> None:
    assert compiler_options() == {}
    with compiling_for("gpu", "9.0"):
        options = compiler_options()
    assert options["xla_gpu_enable_triton_gemm"] is False
    # An option that XLA does not know is an error, on any platform.
    assert jax.jit(lambda x: 2 * x, compiler_options=options)(jnp.float32(3)) == 6
