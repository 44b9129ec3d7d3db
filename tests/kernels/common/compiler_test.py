"""Programs of a module: compiled with the options of the device they are called for."""

import jax.numpy as jnp

from kernels.common.compiler import compiler_options, jit_for_target
from kernels.common.dispatch import compiling_for


def test_a_program_is_made_once_per_target_and_not_before_it_is_asked_for():
    program = jit_for_target(lambda n, x: n * x, static_argnums=0)
    assert program() is program()
    assert float(program()(3, jnp.float32(2))) == 6
    with compiling_for("gpu", "9.0"):
        assert compiler_options()
        assert program() is not jit_for_target(lambda x: x)()
        there = program()
    assert there is not program()
