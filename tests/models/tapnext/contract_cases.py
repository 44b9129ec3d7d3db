"""How the shared model contracts (tests/contracts) build and run TAPNext."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from models.tapnext import TAPNextConfig, TAPNextRuntime, apply, init_state, param_axes
from tests.models.tapnext.small_tapnext import RUNTIME, queries, random_params, small, video


class TrackerCase:
    """The same queries in every row, so that rows can be reordered.

    `close`: ways to run it that give the same up to rounding. `exact`, `slow_exact`: bit for bit.
    """

    def __init__(
        self,
        config: TAPNextConfig,
        close: dict[str, TAPNextRuntime] | None = None,
        slow_exact: dict[str, tuple[TAPNextRuntime, TAPNextRuntime]] | None = None,
    ):
        self.config = config
        self.axes = param_axes(config)
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

    def query_tyx(self, batch: int) -> jax.Array:
        return queries(batch)

    def init_state(self, batch: int, max_length: int) -> Any:
        """A stream has no longest length."""
        del max_length
        return init_state(self.config, self.query_tyx(batch))

    def run(
        self, params: Any, x: Any, state: Any = None, reset: Any = None, runtime: TAPNextRuntime = RUNTIME
    ) -> Any:
        """Logits of the last and of all layers, time first."""
        points = self.query_tyx(len(x)) if state is None else None
        output, state = apply(self.config, runtime, params, x, points, state, reset, layers=True)
        logits = [output.track_logits, output.visible_logits[..., None]]
        logits += [*output.layers.track_logits, *output.layers.visible_logits[..., None]]
        return jnp.swapaxes(jnp.concatenate(logits, axis=-1), 1, 2), state

    def loss(self, params: Any, x: jax.Array, run: Any = None) -> jax.Array:
        """Cross-entropy with one bin per track, logistic loss with one visibility per track."""
        logits, _ = (run or self.run)(params, x)
        target = jnp.arange(logits.shape[2])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), target[None, None, :, None], axis=-1)
        return jnp.mean(jax.nn.softplus(logits)) - chosen.mean()


class HintsCase(TrackerCase):
    """Two hints per track, in any order of time; some are padding in value (a frame that never comes)."""

    def query_tyx(self, batch: int) -> jax.Array:
        first = queries(batch)
        second = first.at[..., 0].set(jnp.array([5, 200, 1, 7])) + jnp.array([0, 0.4, -0.7])
        return jnp.stack([first, second], axis=2)


def cases() -> dict[str, Any]:
    ways = {
        "remat full, scan_layers": TAPNextRuntime(remat="full", scan_layers=True),
        "remat dots": TAPNextRuntime(remat="dots"),
    }
    scanned = {"scan_layers": (RUNTIME, TAPNextRuntime(scan_layers=True))}
    return {
        "jax": TrackerCase(small(depth=2), close=ways, slow_exact=scanned),
        "torch, hints": HintsCase(small(numerics="torch", coordinate_bins=(9, 7), conv_width=1)),
    }
