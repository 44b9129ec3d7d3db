"""A small TAPNext for the tests of this folder: parameters where every term matters, inputs, jitted calls."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.params import ONES, unflatten_names
from models.tapnext import TAPNextConfig, TAPNextRuntime, apply, param_specs

QUICK_COMPILE = {"xla_backend_optimization_level": 0}
RUNTIME = TAPNextRuntime()
run = jax.jit(apply, static_argnums=(0, 1), static_argnames=("layers",), compiler_options=QUICK_COMPILE)


def small(**options: Any) -> TAPNextConfig:
    """Frames of 8 x 12 pixels in patches of 4, one layer of width 16, recurrence 24 wide, three taps."""
    sizes = {"image_size": (8, 12), "patch_size": (4, 4), "width": 16, "depth": 1, "mlp_size": 24}
    sizes |= {"num_heads": 2, "lru_width": 24, "conv_width": 3, "head_width": 12, "decode_radius": 2}
    return TAPNextConfig(**sizes | options)


@functools.cache
def random_params(config: TAPNextConfig) -> Any:
    """Of the size of initial values, none constant. Drawn by NumPy: compiling `init_params` takes longer."""
    draw = np.random.default_rng(0)

    def value(name: str, spec: Any) -> jax.Array:
        noise = draw.normal(size=spec.shape)
        if name.endswith("a_param"):
            return jnp.asarray(noise - 1, jnp.float32)
        if name.endswith("kernel"):
            return jnp.asarray(noise * spec.shape[-2] ** -0.5, jnp.float32)
        return jnp.asarray(0.2 * noise + (spec.init == ONES), jnp.float32)

    return unflatten_names({name: value(name, spec) for name, spec in param_specs(config).items()})


def video(batch: int, frames: int, size: tuple[int, int] = (8, 12)) -> jax.Array:
    return jax.random.uniform(jax.random.key(2), (batch, frames, *size, 3), minval=-1)


# Frames 0, middle, late, past the end of any test's clip; no whole pixels.
QUERIES = np.array([[0, 2.3, 7.1], [0, 6.6, 1.2], [4, 3.4, 10.9], [90, 5.2, 4.8]], np.float32)


def queries(batch: int) -> jax.Array:
    """[B, 4, 3], the same for every row."""
    return jnp.tile(jnp.asarray(QUERIES), (batch, 1, 1))
