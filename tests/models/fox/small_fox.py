"""A small FoX for the tests of this folder: parameters where every term matters, inputs, a jitted `apply`."""

import functools
from typing import Any

import jax

from models.fox import FoxConfig, FoxRuntime, apply, init_params

VOCAB = 19
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
run = jax.jit(apply, static_argnums=(0, 1), static_argnames=("output",), compiler_options=QUICK_COMPILE)


def perturbed(params: Any, scale: float = 0.3) -> Any:
    """Initial values are nearly linear and many are constants; noise brings every term into play."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return treedef.unflatten(
        [x + scale * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    )


@functools.cache
def random_params(config: FoxConfig) -> Any:
    return perturbed(init_params(config, jax.random.key(0)))


def runtime(**options: Any) -> FoxRuntime:
    """The definition of attention compiles fastest; golden and contract tests run the default one."""
    return FoxRuntime(attention_implementation="reference", **options)


def tokens(batch: int, length: int) -> jax.Array:
    return jax.random.randint(jax.random.key(2), (batch, length), 0, VOCAB)
