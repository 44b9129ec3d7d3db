"""Building the jitted training step and the state it works on."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.common.compiler import compiler_options
from kernels.common.dispatch import target
from models.common.sharding import ShardingRules, param_shardings
from tasks.common.errors import ConfigError
from tasks.common.metrics import add_sums, divide_sums
from tasks.common.optim import apply_updates, global_norm
from tasks.common.state import TrainState, leaf_names, merge_trainable, split_trainable

# (params, batch, rng), or with a teacher (params, batch, rng, averaged params) -> (loss, aux).
LossFn = Callable[..., tuple[Any, dict[str, Any]]]
TrainStep = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Any]]]

# Keeps the initialiser's random stream apart from the steps', which are fold_in(key(seed), step).
_INIT_STREAM = 0x696E6974


def abstract_state(
    init_params: Callable[[Any], Any],
    param_axes: Any,
    mesh: Mesh,
    rules: ShardingRules,
    optimizer: optax.GradientTransformation,
    trainable_mask: Any = None,
    ema: bool = False,
) -> TrainState:
    """The state's shapes, dtypes and shardings, without any array. Call it under `jax.set_mesh(mesh)`.

    Optimiser moments take the shardings of their parameters, because explicit axes carry them through `init`.
    """
    shapes = jax.eval_shape(init_params, jax.random.key(0))
    shardings = param_shardings(shapes, param_axes, mesh, rules)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    trained, _ = split_trainable(params, trainable_mask)

    def on_mesh(leaf: Any) -> Any:
        spec = getattr(leaf.sharding, "spec", PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    opt_state = jax.tree.map(on_mesh, jax.eval_shape(optimizer.init, trained))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return TrainState(step=step, params=params, opt_state=opt_state, ema=trained if ema else None)


def _place(initial: Any, abstract: Any) -> Any:
    """Copies given parameters onto the mesh, after checking every name and shape."""
    found = dict(zip(leaf_names(initial), jax.tree.leaves(initial), strict=True))
    wanted = dict(zip(leaf_names(abstract), jax.tree.leaves(abstract), strict=True))
    for name in sorted(found.keys() | wanted.keys()):
        have, need = found.get(name), wanted.get(name)
        if have is None or need is None:
            side = "is missing from" if have is None else "is unknown to the model but in"
            raise ConfigError(f"parameter {name} {side} the initial parameters")
        if tuple(have.shape) != tuple(need.shape):
            raise ConfigError(f"initial parameter {name} has shape {have.shape}, the model has {need.shape}")
    # A copy, because the state is donated and must not take the caller's arrays with it.
    return jax.tree.map(
        lambda x, a: jax.device_put(np.array(jax.device_get(x), dtype=a.dtype, copy=True), a.sharding),
        initial,
        abstract,
    )


def fresh_state(
    abstract: TrainState,
    init_params: Callable[[Any], Any],
    optimizer: optax.GradientTransformation,
    seed: int,
    trainable_mask: Any = None,
    initial_params: Any = None,
) -> TrainState:
    """The state before step 0, each device holding only its share.

    Raises:
      ConfigError: `initial_params` have other names or shapes than the model's.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if initial_params is None:
        key = jax.random.fold_in(jax.random.key(seed), _INIT_STREAM)
        params = jax.jit(init_params, out_shardings=shardings.params)(key)
    else:
        params = _place(initial_params, abstract.params)
    trained, _ = split_trainable(params, trainable_mask)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trained)
    step = jax.device_put(np.int32(0), shardings.step)
    # A copy: the step takes both buffers.
    ema = None if abstract.ema is None else jax.tree.map(jnp.copy, trained)
    return TrainState(step=step, params=params, opt_state=opt_state, ema=ema)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    accum: int = 1,
    ema: float = 0.0,
    trainable_mask: Any = None,
    teacher: bool = False,
) -> TrainStep:
    """The jitted step (state, batch, lr) -> (state, metrics). The state is donated.

    The batch is a dict of arrays [accum, B / accum, ...], `lr` a float32 scalar. Metrics are scalars: loss,
    grad_norm (before clipping), update_norm, param_norm (after the step), and the means of the task's aux
    pairs. With `teacher` the loss takes the averaged parameters, as they were before the step, as well.
    """

    def step(state: TrainState, batch: Any, lr: Any) -> tuple[TrainState, dict[str, Any]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        trained, frozen = split_trainable(state.params, trainable_mask)

        taught_by = (merge_trainable(state.ema, frozen),) if teacher else ()

        def loss_of(trained: Any, micro: Any, rng: Any) -> tuple[Any, dict[str, Any]]:
            return loss_fn(merge_trainable(trained, frozen), micro, rng, *taught_by)

        loss, means, grads = _loss_and_grads(loss_of, trained, batch, rng, accum)
        if target().platform != "gpu":
            # Sums of gradients come out alike whatever computed them, layers in a scan or unrolled: they are
            # not fused with what comes before. A GPU would write and read all gradients once more.
            grads = jax.lax.optimization_barrier(grads)
        trained, opt_state, norms = apply_updates(optimizer, lr, grads, state.opt_state, trained)
        metrics = {
            **means,
            "loss": loss,
            "grad_norm": norms.grad,
            "update_norm": norms.update,
            "param_norm": global_norm(merge_trainable(trained, frozen)),
        }
        params = merge_trainable(trained, frozen)
        average = _averaged(ema, state.step, state.ema, trained) if ema else None
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=average), metrics

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options())


def _averaged(ema: float, step: Any, average: Any, trained: Any) -> Any:
    """The moving average after an update; early on it forgets faster, or it would be of initial values."""
    n = step.astype(jnp.float32) + 1
    rate = 1 - jnp.minimum(ema, (1 + n) / (10 + n))
    return jax.tree.map(lambda a, p: (a + rate * (p - a)).astype(a.dtype), average, trained)


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How to make a step; equal if its key is."""

    key: Hashable
    make: Callable[[], TrainStep] = dataclasses.field(compare=False)


def shared_step(key: Hashable, make: Callable[[], TrainStep]) -> TrainStep:
    """The step that `make` makes, or the one made for an equal key before; None is equal to nothing.

    Then the runs of a sweep compile once. The cache of compiled programs on disk does not see to that on a
    Hopper GPU: JAX numbers a process's Mosaic kernels, and the number is part of the program.
    """
    if key is None:
        return make()
    return _made(_Recipe((key, target()), make))


@functools.lru_cache(maxsize=4)
def _made(recipe: _Recipe) -> TrainStep:
    return recipe.make()


def _split_aux(aux: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    pairs = dict(aux)
    weight = pairs.pop("weight", None)
    for name, pair in pairs.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"aux[{name!r}] of the loss function must be a (sum, weight) pair, not {pair!r}")
    return jnp.asarray(1.0 if weight is None else weight, jnp.float32), pairs


def _loss_and_grads(
    loss_of: LossFn, trained: Any, batch: Any, rng: Any, accum: int
) -> tuple[Any, dict[str, Any], Any]:
    """Loss, means and gradients of a whole batch [accum, B / accum, ...].

    Micro-batches count by aux["weight"], the denominator of their loss, so that the result is that of one
    batch.
    """
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if accum == 1:
        (loss, aux), grads = value_and_grad(trained, jax.tree.map(lambda x: x[0], batch), rng)
        return jnp.asarray(loss, jnp.float32), divide_sums(_split_aux(aux)[1]), grads

    def run_micro(index: Any, micro: Any) -> Any:
        (loss, aux), grads = value_and_grad(trained, micro, jax.random.fold_in(rng, index))
        weight, pairs = _split_aux(aux)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) * weight, grads)
        return weight, weight * loss, pairs, grads

    def add(total: Any, part: Any) -> Any:
        weight, loss, pairs, grads = (a for a in total)
        return (
            weight + part[0],
            loss + part[1],
            add_sums(pairs, part[2]),
            jax.tree.map(jnp.add, grads, part[3]),
        )

    first = run_micro(jnp.int32(0), jax.tree.map(lambda x: x[0], batch))
    rest = (jnp.arange(1, accum), jax.tree.map(lambda x: x[1:], batch))
    (weight, loss, pairs, grads), _ = jax.lax.scan(lambda t, x: (add(t, run_micro(*x)), None), first, rest)
    scale = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)
    grads = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grads, trained)
    return loss * scale, divide_sums(pairs), grads
