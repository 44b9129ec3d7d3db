"""How the shared model contracts (tests/contracts) build and run FoX."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from models.fox import FoxConfig, FoxRuntime, apply, init_params, init_state, param_axes

REMATS = ("full", "dots", "attention")


def perturbed(params: Any, scale: float = 0.3) -> Any:
    """Initial values are nearly linear and many are constants; noise brings every term into play."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return treedef.unflatten(
        [x + scale * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    )


class FoxCase:
    """One configuration: parameters, a way to run it, and runtimes that must not change a bit of its results.

    `variants` are checked in every run of the tests, `slow_variants` in the long ones.
    """

    def __init__(
        self,
        config: FoxConfig,
        runtime: FoxRuntime,
        variants: dict[str, FoxRuntime] | None = None,
        slow_variants: dict[str, FoxRuntime] | None = None,
    ):
        self.config, self.runtime = config, runtime
        self.params = perturbed(init_params(config, jax.random.key(0)))
        self.axes = param_axes(config)
        self.variants, self.slow_variants = (
            {name: functools.partial(self.run, runtime=other) for name, other in (given or {}).items()}
            for given in (variants, slow_variants)
        )

    def inputs(self, batch: int, length: int) -> jax.Array:
        return jax.random.randint(jax.random.key(2), (batch, length), 0, self.config.vocab_size)

    def init_state(self, batch: int, max_length: int) -> Any:
        return init_state(self.config, batch, max_length)

    def run(self, params: Any, x: Any, state: Any = None, reset: Any = None, runtime: Any = None) -> Any:
        return apply(self.config, runtime or self.runtime, params, x, state, reset)

    def loss(self, params: Any, x: jax.Array, run: Any = None) -> jax.Array:
        """Next-token cross-entropy."""
        logits, _ = (run or self.run)(params, x)
        log_probs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        return -jnp.take_along_axis(log_probs, x[:, 1:, None], axis=-1).mean()


def cases() -> dict[str, FoxCase]:
    pruned = FoxRuntime(log_pruning_tolerance=-10.0)
    plain = FoxRuntime(attention_implementation="reference")
    llama = FoxConfig.preset("fox_llama", "tiny", vocab_size=23)
    pro = FoxConfig.preset("fox_pro", "tiny", vocab_size=23)
    grouped = dataclasses.replace(pro, num_heads=4, num_kv_heads=2, num_layers=1, use_rope=True)
    transformer = FoxConfig.preset("transformer_pro", "tiny", vocab_size=23)
    scanned = {"scan_layers": dataclasses.replace(pruned, scan_layers=True)}
    recomputed = {f"remat {policy}": dataclasses.replace(pruned, remat=policy) for policy in REMATS}
    both = {
        f"scan_layers, {name}": dataclasses.replace(runtime, scan_layers=True)
        for name, runtime in recomputed.items()
    }
    return {
        "llama": FoxCase(dataclasses.replace(llama, use_rope=True, num_layers=1), plain),
        "pro": FoxCase(pro, pruned, scanned, recomputed | both),
        "pro, grouped heads": FoxCase(grouped, pruned, recomputed),
        "transformer": FoxCase(dataclasses.replace(transformer, num_layers=1), plain),
    }
