"""How the shared model contracts (tests/contracts) build and run TRecViT, with every head."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from models.trecvit import (
    MAEConfig,
    TRecViTConfig,
    TRecViTRuntime,
    apply,
    apply_mae,
    init_mae_state,
    init_state,
    mae_param_axes,
    param_axes,
    pixel_targets,
)
from tests.models.trecvit.small_trecvit import kept_tubes, random_params, small, small_mae, video

RUNTIME = TRecViTRuntime()


class ClassesCase:
    """A model whose head says something of every frame.

    `close`: ways to run it that give the same up to rounding. `exact`, `slow_exact`: bit for bit.
    """

    axes_of, new_state = staticmethod(param_axes), staticmethod(init_state)

    def __init__(
        self,
        config: Any,
        close: dict[str, TRecViTRuntime] | None = None,
        slow_exact: dict[str, tuple[TRecViTRuntime, TRecViTRuntime]] | None = None,
    ):
        self.config = config
        self.axes = self.axes_of(config)
        self.close = {
            name: functools.partial(self.run, runtime=runtime) for name, runtime in (close or {}).items()
        }
        self.exact: dict[str, Any] = {}
        self.slow_exact = {
            name: [functools.partial(self.run, runtime=runtime) for runtime in pair]
            for name, pair in (slow_exact or {}).items()
        }

    @functools.cached_property
    def params(self) -> Any:
        return random_params(self.config)

    def inputs(self, batch: int, length: int) -> jax.Array:
        return video(batch, length)

    def init_state(self, batch: int, max_length: int) -> Any:
        """A stream has no longest length."""
        del max_length
        return self.new_state(self.config, batch)

    def run(
        self, params: Any, x: Any, state: Any = None, reset: Any = None, runtime: TRecViTRuntime = RUNTIME
    ) -> Any:
        return apply(self.config, runtime, params, x, state, reset)

    def loss(self, params: Any, x: jax.Array, run: Any = None) -> jax.Array:
        """Cross-entropy of every frame (and patch) with one class per video."""
        logits, _ = (run or self.run)(params, x)
        labels = jnp.arange(len(x)) % self.config.num_classes
        log_probs = jax.nn.log_softmax(logits).reshape(len(x), -1, self.config.num_classes)
        return -jnp.take_along_axis(log_probs, labels[:, None, None], axis=-1).mean()


class MAECase(ClassesCase):
    """The masked auto-encoder; the kept tubes are those of the case."""

    axes_of, new_state = staticmethod(mae_param_axes), staticmethod(init_mae_state)
    config: MAEConfig

    def run(
        self, params: Any, x: Any, state: Any = None, reset: Any = None, runtime: TRecViTRuntime = RUNTIME
    ) -> Any:
        kept = jnp.tile(
            kept_tubes(self.config, 1), (len(x), 1)
        )  # rows must stay alike when they are reordered
        return apply_mae(self.config, runtime, params, x, kept, state, reset)

    def loss(self, params: Any, x: jax.Array, run: Any = None) -> jax.Array:
        """Mean square of all patches."""
        pixels, _ = (run or self.run)(params, x)
        return jnp.mean((pixels - pixel_targets(x, self.config.encoder.patch_size)) ** 2)


def cases() -> dict[str, Any]:
    ways = {
        "remat full, scan_layers": TRecViTRuntime(remat="full", scan_layers=True),
        "remat dots": TRecViTRuntime(remat="dots"),
    }
    scanned = {"scan_layers": (RUNTIME, TRecViTRuntime(scan_layers=True))}
    classes: TRecViTConfig = small(depth=2)
    griffin = dataclasses.replace(
        classes, depth=1, state_multiplier=2, use_mlp=True, pool="gap", positions="sincos2d", conv_width=1
    )
    return {
        "classes": ClassesCase(classes, close=ways, slow_exact=scanned),
        "classes, channel MLP": ClassesCase(griffin),
        "readout": ClassesCase(small(head="readout")),
        "dense": ClassesCase(small(head="dense")),
        "mae": MAECase(small_mae()),
    }
