"""How the shared model contracts (tests/contracts) build and run FoX."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from models.fox import FoxConfig, FoxRuntime, apply, init_params, init_state, param_axes
from tests.models.fox.small_fox import perturbed

RuntimePair = tuple[FoxRuntime, FoxRuntime]
REMATS = ("full", "dots", "attention")


class FoxCase:
    """One configuration: parameters, a way to run it, and ways that must give the same loss and gradients.

    `close`: the same up to rounding as `run`. `exact`: pairs that agree bit for bit (`slow_exact`: checked in
    the long runs only).
    """

    def __init__(
        self,
        config: FoxConfig,
        runtime: FoxRuntime,
        close: dict[str, FoxRuntime] | None = None,
        exact: dict[str, RuntimePair] | None = None,
        slow_exact: dict[str, RuntimePair] | None = None,
    ):
        self.config, self.runtime = config, runtime
        self.axes = param_axes(config)
        self.close = {name: self.with_runtime(other) for name, other in (close or {}).items()}
        self.exact, self.slow_exact = (
            {name: tuple(map(self.with_runtime, pair)) for name, pair in (given or {}).items()}
            for given in (exact, slow_exact)
        )

    @functools.cached_property
    def params(self) -> Any:
        return perturbed(init_params(self.config, jax.random.key(0)))

    def with_runtime(self, runtime: FoxRuntime) -> Any:
        return functools.partial(self.run, runtime=runtime)

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
    recomputed = {f"remat {policy}": dataclasses.replace(pruned, remat=policy) for policy in REMATS}
    scanned = {
        f"scan_layers, {name}": (runtime, dataclasses.replace(runtime, scan_layers=True))
        for name, runtime in {"remat none": pruned, **recomputed}.items()
    }
    first = "scan_layers, remat none"
    one_layer_transformer = dataclasses.replace(transformer, num_layers=1)
    return {
        "llama": FoxCase(dataclasses.replace(llama, use_rope=True, num_layers=1), plain),
        "pro": FoxCase(pro, pruned, exact={first: scanned.pop(first)}, slow_exact=scanned),
        "pro, grouped heads": FoxCase(grouped, pruned, close=recomputed),
        "transformer": FoxCase(one_layer_transformer, plain),
    }
