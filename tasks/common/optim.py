"""AdamW with warm-up and decay counted in units seen, a decay mask and frozen parameters.

The learning rate is a plain float64 function of the units (tokens, steps, clips) seen BEFORE the step,
evaluated on the host and handed to the jitted step as a scalar: 48e9 tokens fit no int32, and a schedule
computed in float32 would lose the golden values.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from models.common.sharding import gathered
from tasks.common.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule. Lengths are in `unit`s: "tokens", or "steps" (updates).

    peak_lr: learning rate at the end of the warm-up.
    total: units at which the schedule ends; past it the rate stays at the final one.
    warmup: units of linear warm-up from 0.
    schedule: after the warm-up: "cosine" or "linear" to the final rate at `total`, "constant", or "wsd"
      (constant, then linear over the last `decay` units).
    final_lr_fraction: final rate as a share of the peak.
    weight_decay: decoupled (AdamW), times the learning rate, on the leaves of the decay mask.
    clip_norm: largest global gradient norm; None does not clip.
    """

    peak_lr: float
    total: int
    warmup: int = 0
    unit: Literal["tokens", "steps"] = "tokens"
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    final_lr_fraction: float = 0.0
    decay: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        checks = {
            "peak_lr": (self.peak_lr >= 0, "at least 0"),
            "total": (self.total > 0, "positive"),
            "warmup": (0 <= self.warmup <= self.total, f"between 0 and total = {self.total}"),
            "decay": (0 <= self.decay <= self.total - self.warmup, "between 0 and total - warmup"),
            "final_lr_fraction": (0 <= self.final_lr_fraction <= 1, "between 0 and 1"),
            "b1": (0 <= self.b1 < 1, "in [0, 1)"),
            "b2": (0 <= self.b2 < 1, "in [0, 1)"),
            "eps": (self.eps > 0, "positive"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "positive, or none"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ConfigError(f"optim.{name} = {getattr(self, name)}: must be {wanted}")


def learning_rate(config: OptimConfig, units_seen: int) -> float:
    """Learning rate (float64) of a step before which `units_seen` units were seen.

    Warm-up is peak * units / warmup, so the first step of a run with warm-up has rate 0; the cosine spans
    total - warmup (FoX, arXiv:2503.02130, appendix on training details; pinned by tests/golden).

    Raises:
      ValueError: negative `units_seen`.
    """
    if units_seen < 0:
        raise ValueError(f"units_seen = {units_seen}: a run cannot have seen less than nothing")
    if units_seen < config.warmup:
        return config.peak_lr * units_seen / config.warmup
    final = config.final_lr_fraction
    if config.schedule == "constant":
        share = 1.0
    elif config.schedule == "wsd":
        left = config.total - units_seen
        share = 1.0 if config.decay == 0 else final + (1 - final) * min(max(left / config.decay, 0.0), 1.0)
    else:
        span = config.total - config.warmup
        progress = 1.0 if span == 0 else min((units_seen - config.warmup) / span, 1.0)
        falling = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
        share = final + (1 - final) * falling
    return config.peak_lr * share


def make_optimizer(config: OptimConfig, decay_mask: Any = None) -> optax.GradientTransformation:
    """Clip, Adam, decoupled weight decay: an optax chain WITHOUT the learning rate (see `apply_updates`).

    Args:
      config: hyper-parameters.
      decay_mask: tree of bool over the trained parameters (None where frozen); True is decayed. None: all
        are.
    """
    steps = [] if config.clip_norm is None else [clip_by_global_norm(config.clip_norm)]
    steps.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.weight_decay:
        steps.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    return optax.chain(*steps)


class Norms(NamedTuple):
    """Global L2 norms: of the gradients before clipping, of the update, of the parameters after it."""

    grad: Float[Array, ""]
    update: Float[Array, ""]
    param: Float[Array, ""]


def apply_updates(
    optimizer: optax.GradientTransformation, lr: Float[Array, ""], grads: Any, opt_state: Any, params: Any
) -> tuple[Any, Any, Norms]:
    """One optimiser step: params - lr * direction.

    Args:
      optimizer: from `make_optimizer`.
      lr: learning rate, scalar float32.
      grads, opt_state, params: trees of one structure (frozen leaves absent).

    Returns:
      (new params, new optimiser state, norms).
    """
    direction, opt_state = optimizer.update(grads, opt_state, params)
    updates = jax.tree.map(lambda d: -lr * d, direction)
    params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
    # Without the barrier XLA for GPU fuses the norms with the update, cannot do that in place any more, and
    # copies parameters and moments: 5 ms of a step with 760M parameters.
    params, opt_state = jax.lax.optimization_barrier((params, opt_state))
    return params, opt_state, Norms(*(global_norm(tree) for tree in (grads, updates, params)))


def global_norm(tree: Any) -> Float[Array, ""]:
    """L2 norm over all leaves, float32; 0 for an empty tree.

    A matrix that is whole on every device is summed along its last axis, and all those sums together: one
    kernel instead of two. Of a leaf that is split, each device adds up its part.
    """

    def squares(x: Array) -> Array:
        square = jnp.square(x.astype(jnp.float32))
        if not jax.typeof(x).sharding.is_fully_replicated:
            square = jnp.sum(square)
        elif x.ndim > 1:
            square = jnp.sum(square, axis=-1)
        return gathered(square).ravel()

    parts = [squares(x) for x in jax.tree.leaves(tree)]
    if not parts:
        return jnp.zeros((), jnp.float32)
    # Behind the barrier XLA cannot make of the sum of all a sum for every leaf again.
    return jnp.sqrt(jnp.sum(jax.lax.optimization_barrier(jnp.concatenate(parts))))


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """Scales updates down to the norm `largest` if theirs is larger; as optax's, by `global_norm`."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        norm = global_norm(updates)
        scale = jnp.where(norm < largest, 1.0, largest / norm)
        return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
