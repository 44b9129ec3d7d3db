"""A small TRecViT for the tests of this folder: parameters where every term matters, inputs, jitted calls."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.params import ONES, unflatten_names
from models.trecvit import (
    MAEConfig,
    TRecViTConfig,
    apply,
    apply_mae,
    draw_kept_tubes,
    mae_param_specs,
    param_specs,
)

QUICK_COMPILE = {"xla_backend_optimization_level": 0}
run = jax.jit(apply, static_argnums=(0, 1), static_argnames=("output",), compiler_options=QUICK_COMPILE)
run_mae = jax.jit(apply_mae, static_argnums=(0, 1), compiler_options=QUICK_COMPILE)


def small(**options: Any) -> TRecViTConfig:
    """Frames of 8 x 12 pixels in patches of 4, one layer of width 16, three taps."""
    sizes = {"image_size": (8, 12), "patch_size": (4, 4), "width": 16, "depth": 1, "mlp_size": 24}
    sizes |= {"num_heads": 2, "conv_width": 3, "rep_size": 12, "num_classes": 5, "frames_per_clip": 4}
    return TRecViTConfig(**sizes | options)


def small_mae(**options: Any) -> MAEConfig:
    """A third of the six tubes kept, decoder of width 8."""
    encoder = small(head="none", **options)
    return MAEConfig(encoder=encoder, mask_ratio=0.67, decoder_width=8, decoder_depth=1)


@functools.cache
def random_params(config: Any) -> Any:
    """Of the size of initial values, none constant. Drawn by NumPy: compiling `init_params` takes longer."""
    specs = mae_param_specs(config) if isinstance(config, MAEConfig) else param_specs(config)
    draw = np.random.default_rng(0)

    def value(name: str, spec: Any) -> jax.Array:
        noise = draw.normal(size=spec.shape)
        if name.endswith("a_param"):
            return jnp.asarray(noise - 1, jnp.float32)
        if name.endswith("kernel"):
            return jnp.asarray(noise * spec.shape[-2] ** -0.5, jnp.float32)
        return jnp.asarray(0.2 * noise + (spec.init == ONES), jnp.float32)

    return unflatten_names({name: value(name, spec) for name, spec in specs.items()})


def video(batch: int, frames: int, size: tuple[int, int] = (8, 12)) -> jax.Array:
    return jax.random.uniform(jax.random.key(2), (batch, frames, *size, 3))


def kept_tubes(config: MAEConfig, batch: int) -> jax.Array:
    return draw_kept_tubes(config, jax.random.key(5), batch)
