"""Linear scans of sequences that are sharded over a mesh axis.

Every shard scans from a zero state, which gives its last state; those and the shards' total decays, [B, D]
each, are exchanged in one all-gather; every shard finds the state it starts from,

    state after shard k = last_k + decay_k (state before shard k)

and scans again from there. The backward pass does the same against time with the gradients. Results do not
depend on the number of shards beyond rounding, and nothing but h, a and the entering states is saved. Batch
and channels may be sharded over other axes: they need no exchange, and XLA takes care of them.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Inexact

from kernels.common.dispatch import choose
from kernels.common.manual import aligned_varying
from kernels.linear_scan import api, arguments
from kernels.linear_scan.differentiable import Passes, Saved
from kernels.linear_scan.products import carry_dtype, placed_state, product
from kernels.linear_scan.rglru import Gated, gates, total_log_decay, wide_dtype


class _Shards(NamedTuple):
    """Static description of a call."""

    passes: Passes
    axis: str
    size: int
    mesh: Any
    reverse: bool


def sharded_linear_scan(
    x: Inexact[Array, "B T D"],
    a: Inexact[Array, "B T D"],
    h0: Inexact[Array, "B D"] | None = None,
    *,
    axis: str,
    mesh: jax.sharding.Mesh | None = None,
    reverse: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
    """`linear_scan` with T sharded over a mesh axis; forward and backward exchange [B, D] arrays only.

    Args:
      x, a, h0, reverse: as in `linear_scan`; T must be a multiple of the axis' size.
      axis: name of the mesh axis that shards time.
      mesh: the mesh; that of `jax.set_mesh` if None.
      implementation: of the shards' own scans, as in `linear_scan`, but not `reference`.

    Returns:
      (h, h_last): h sharded as x, h_last replicated over `axis`.

    Raises:
      ValueError: as `linear_scan`; or the axis does not exist, or does not divide T.
    """
    op = "sharded_linear_scan"
    arguments.check_linear(op, x, a)
    wide = carry_dtype(x, a)
    arguments.check_state(op, h0, (x.shape[0], x.shape[2]), wide)
    call = api.request("linear_scan", x, a, reverse=reverse, has_state=True)
    shards = _shards(op, call, axis, mesh, implementation)
    return _linear(x, a, _state(x, h0, wide), shards)


def sharded_rglru_scan(
    x: Float[Array, "B T D"],
    gate_x: Float[Array, "B T D"],
    gate_a: Float[Array, "B T D"],
    a_param: Float[Array, " D"],
    h0: Float[Array, "B D"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    axis: str,
    mesh: jax.sharding.Mesh | None = None,
    reverse: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """`rglru_scan` with T sharded over a mesh axis.

    Args:
      x, gate_x, gate_a, a_param, h0, reset, reverse: as in `rglru_scan`.
      axis, mesh, implementation: as in `sharded_linear_scan`.

    Returns:
      (h, h_last): h sharded as x, h_last replicated over `axis`.

    Raises:
      ValueError: as `rglru_scan`; or the axis does not exist, or does not divide T.
    """
    op = "sharded_rglru_scan"
    arguments.check_gated(op, x, gate_x, gate_a, a_param, reset)
    wide = wide_dtype(x, gate_x, gate_a)
    arguments.check_state(op, h0, (x.shape[0], x.shape[2]), wide)
    call = api.request("rglru_scan", x, gate_a, reverse=reverse, has_state=True, has_reset=reset is not None)
    shards = _shards(op, call, axis, mesh, implementation)
    return _gated(Gated(x, gate_x, gate_a, a_param, reset), _state(x, h0, wide), shards)


def _shards(op: str, call: Any, axis: str, mesh: Any, implementation: Any) -> _Shards:
    names = dict((mesh or jax.sharding.get_abstract_mesh()).shape)
    if axis not in names:
        known = ", ".join(map(repr, names)) or "none: pass mesh, or call jax.set_mesh"
        raise ValueError(f"{op}: axis={axis!r} is not an axis of the mesh; its axes are {known}.")
    if call.length % names[axis]:
        raise ValueError(
            f"{op}: x has {call.length} steps, which {names[axis]} shards of axis {axis!r} do not divide; pad"
            " time at its end with x = 0, a = 1."
        )
    name, chosen = choose(op, api.IMPLEMENTATIONS, call, implementation, api.preference(call))
    if chosen.passes is None:
        raise ValueError(f"{op}: implementation={name!r} has no passes of its own; use another one.")
    return _Shards(chosen.passes, axis, names[axis], mesh, call.reverse)


def _state(x: Array, h0: Array | None, dtype: Any) -> Array | None:
    state = jnp.zeros((x.shape[0], x.shape[2]), dtype) if h0 is None else h0
    return placed_state(x, state)


def _entering(last: Array, decay: Array, start: Array, shards: _Shards, reverse: bool) -> Array:
    """The state [B, D] that this shard starts from, out of the last states and decays of all of them."""
    # Tiled: without that, jax 0.11.2 gives the new axis the sharding of the batch on an explicit mesh.
    both = jax.lax.all_gather(jnp.stack([last, decay])[None], shards.axis, tiled=True)
    lasts, decays = both[:, 0], both[:, 1]
    order = range(shards.size)[:: -1 if reverse else 1]
    states = [start] * shards.size
    for before, here in itertools.pairwise(order):
        states[here] = lasts[before] + product(decays[before], states[before])
    return jnp.stack(states)[jax.lax.axis_index(shards.axis)]


def _on_shards(
    function: Callable[..., Any], shards: _Shards, sequences: Any, states: Any, shared: Any
) -> Any:
    """function(sequences, states, shared) on every shard; it returns three such groups of arrays.

    sequences: [B, T, ...], sharded in time.
    states: with a leading axis of shards, of which a shard gets its entry.
    shared: the same on all shards; results must come from `psum` or `_last`.
    """
    over_time, stacked = PartitionSpec(None, shards.axis), PartitionSpec(shards.axis)

    def local(sequences: Any, states: Any, shared: Any) -> tuple[Any, Any, Any]:
        own = jax.tree.map(lambda x: x[0], states)
        sequences, own, shared = function(*aligned_varying((sequences, own, shared)))
        return sequences, jax.tree.map(lambda x: x[None], own), shared

    mapped = jax.shard_map(
        local, mesh=shards.mesh, axis_names={shards.axis},
        in_specs=(over_time, stacked, PartitionSpec()), out_specs=(over_time, stacked, PartitionSpec()),
    )  # fmt: skip
    return jax.jit(mapped)(sequences, states, shared)


def _last(x: Array, shards: _Shards, reverse: bool) -> Array:
    """x of the shard that is last in the order of a pass."""
    shard = 0 if reverse else shards.size - 1
    return jax.lax.psum(jnp.where(jax.lax.axis_index(shards.axis) == shard, x, 0), shards.axis)


def _total_decay(a: Array, dtype: Any) -> Array:
    """Product of a over time; 0 if any is, even next to NaN."""
    return jnp.where(jnp.any(a == 0, axis=1), 0, jnp.prod(a.astype(dtype), axis=1))


def _entering_gradient(a: Array, dh: Array, dh_last: Array, shards: _Shards) -> Array:
    """What the later shards hand back to this one, c of `differentiable`; dh_last at the last one."""
    against, wide = not shards.reverse, dh_last.dtype
    a = a.astype(wide)
    _, last = shards.passes.forward(product(a, dh.astype(wide)), a, None, against)
    return _entering(last, _total_decay(a, wide), dh_last, shards, against)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(x: Array, a: Array, h0: Array, shards: _Shards) -> tuple[Array, Array]:
    return _linear_fwd(x, a, h0, shards)[0]


def _linear_fwd(x: Array, a: Array, h0: Array, shards: _Shards) -> tuple[tuple[Array, Array], Any]:
    def local(sequences: tuple[Array, Array], nothing: None, h0: Array) -> tuple[Array, Array, Array]:
        _, last = shards.passes.forward(*sequences, None, shards.reverse)
        decay = _total_decay(sequences[1], h0.dtype)
        state = _entering(last, decay, h0, shards, shards.reverse)
        h, h_last = shards.passes.forward(*sequences, state, shards.reverse)
        return h, state, _last(h_last, shards, shards.reverse)

    h, states, h_last = _on_shards(local, shards, (x, a), None, h0)
    return (h, h_last), (h, a, states)


def _linear_bwd(shards: _Shards, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    h, a, states = saved

    def local(sequences: Any, state: Array, dh_last: Array) -> tuple[tuple[Array, Array], None, Array]:
        h, a, dh = sequences
        c = _entering_gradient(a, dh, dh_last, shards)
        dx, da, dh0 = shards.passes.backward(Saved(h, a, state), dh, c, shards.reverse)
        assert dh0 is not None  # a state was given
        return (dx, da), None, _last(dh0, shards, not shards.reverse)

    (dx, da), _, dh0 = _on_shards(local, shards, (h, a, cotangents[0]), states, cotangents[1])
    return dx, da, dh0


_linear.defvjp(_linear_fwd, _linear_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gated(gated: Gated, h0: Array, shards: _Shards) -> tuple[Array, Array]:
    return _gated_fwd(gated, h0, shards)[0]


def _split(gated: Gated) -> tuple[Any, Array]:
    """(what is sharded in time, a_param)."""
    return (gated.x, gated.gate_x, gated.gate_a, gated.reset), gated.a_param


def _joined(sequences: Any, a_param: Array) -> Gated:
    x, gate_x, gate_a, reset = sequences
    return Gated(x, gate_x, gate_a, a_param, reset)


def _gated_fwd(gated: Gated, h0: Array, shards: _Shards) -> tuple[tuple[Array, Array], Any]:
    def local(sequences: Any, nothing: None, shared: Any) -> tuple[Array, Array, Array]:
        a_param, h0 = shared
        own = _joined(sequences, a_param)
        _, last = shards.passes.gated_forward(own, None, shards.reverse)
        decay = jnp.exp(total_log_decay(own))
        state = _entering(last, decay, h0, shards, shards.reverse)
        h, h_last = shards.passes.gated_forward(own, state, shards.reverse)
        return h, state, _last(h_last, shards, shards.reverse)

    sequences, a_param = _split(gated)
    h, states, h_last = _on_shards(local, shards, sequences, None, (a_param, h0))
    return (h, h_last), (gated, h, states)


def _gated_bwd(shards: _Shards, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Gated, Array]:
    gated, h, states = saved

    def local(sequences: Any, state: Array, shared: Any) -> tuple[Any, None, tuple[Array, Array]]:
        (inputs, h, dh), (a_param, dh_last) = sequences, shared
        own = _joined(inputs, a_param)
        c = _entering_gradient(gates(own)[1], dh, dh_last, shards)
        grads, dh0 = shards.passes.gated_backward(own, state, h, dh, c, shards.reverse)
        assert dh0 is not None  # a state was given
        total = jax.lax.psum(grads.a_param, shards.axis)
        return grads[:3], None, (total, _last(dh0, shards, not shards.reverse))

    sequences, a_param = _split(gated)
    (dx, dgate_x, dgate_a), _, (da_param, dh0) = _on_shards(
        local, shards, (sequences, h, cotangents[0]), states, (a_param, cotangents[1])
    )
    return Gated(dx, dgate_x, dgate_a, da_param, None), dh0


_gated.defvjp(_gated_fwd, _gated_bwd)
