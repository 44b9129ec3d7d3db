"""Logical axis rules: which mesh axis each named array dimension is split over.

Models name dimensions by meaning ("embed", "heads"); one frozen dataclass says what that means on a mesh.
A new layout is a `dataclasses.replace` of `ShardingRules`, not an edit of a model.

The mesh has explicit axes (`jax.make_mesh`, `jax.set_mesh`), so array types carry their sharding and a
contraction over a split dimension is an error rather than a silent collective. Weights are stored split and
gathered right before use (`gathered`); its transpose is the reduce-scatter of the gradient (ZeRO-3).
Outside a mesh every function here is the identity, so models work as a plain library.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

logger = logging.getLogger(__name__)

MESH_AXES = ("data", "fsdp")
TIME_AXIS = "time"  # a mesh has it where long videos are split by their frames
AxisNames = tuple[str | None, ...]
MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axis (or axes, or None = replicated) of each logical axis name; what a mesh lacks is left out."""

    batch: MeshAxes = ("data", "fsdp")
    length: MeshAxes = TIME_AXIS
    embed: MeshAxes = "fsdp"
    heads: MeshAxes = None
    mlp: MeshAxes = None
    vocab: MeshAxes = None
    layers: MeshAxes = None
    norm: MeshAxes = None

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """Partition spec of an array whose dimensions carry these logical names.

        Raises:
          ValueError: an unknown logical name, or one mesh axis used for two dimensions of the same array.
        """
        known = {f.name for f in dataclasses.fields(self)}
        entries: list[MeshAxes] = []
        for name in axes:
            if name is not None and name not in known:
                raise ValueError(f"unknown logical axis {name!r}; known: {sorted(known)}")
            entries.append(None if name is None else getattr(self, name))
        used = [axis for entry in entries for axis in _as_tuple(entry)]
        if len(used) != len(set(used)):
            raise ValueError(f"logical axes {tuple(axes)} map one mesh axis twice: {entries}")
        return PartitionSpec(*entries)


def _as_tuple(entry: MeshAxes) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def fit_spec(spec: PartitionSpec, shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Drops the mesh axes that are not there, or do not divide the dimension they would split (logged)."""
    entries: list[MeshAxes] = []
    for size, entry in zip(shape, spec, strict=True):
        if any(axis not in mesh.shape for axis in _as_tuple(entry)):
            entry = None
        ways = 1
        for axis in _as_tuple(entry):
            ways *= mesh.shape[axis]
        if size % ways:
            logger.info("dimension of %d is not divisible by mesh axes %s: replicated", size, entry)
            entry = None
        entries.append(entry)
    return PartitionSpec(*entries)


def param_shardings(abstract: Any, axes: Any, mesh: Any, rules: ShardingRules) -> Any:
    """Tree of `NamedSharding`, one per parameter.

    Args:
      abstract: tree of arrays or `jax.ShapeDtypeStruct`.
      axes: tree of the same structure whose leaves are tuples of logical axis names.
      mesh: a `jax.sharding.Mesh`.
      rules: what the names mean.
    """

    def sharding(leaf: Any, names: AxisNames) -> NamedSharding:
        return NamedSharding(mesh, fit_spec(rules.spec(names), leaf.shape, mesh))

    # The tree of `abstract` decides what is a leaf, so the tuples of names stay whole.
    return jax.tree.map(sharding, abstract, axes)


def active_mesh() -> Any | None:
    """The mesh set by `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def constrain(x: jax.Array, axes: Sequence[str | None], rules: ShardingRules | None = None) -> jax.Array:
    """Gives `x` the sharding its logical axes mean under the active mesh; identity without one."""
    mesh = active_mesh()
    if mesh is None:
        return x
    spec = fit_spec((rules or ShardingRules()).spec(axes), x.shape, mesh)
    return jax.sharding.reshard(x, spec)


def gathered(w: jax.Array) -> jax.Array:
    """The whole weight on every device, for use in a matmul; identity without a mesh."""
    return w if active_mesh() is None else jax.sharding.reshard(w, PartitionSpec())


def time_axis(x: jax.Array) -> str | None:
    """The mesh axis that the frames of x [B, T, ...] are split over; None if they are not."""
    if active_mesh() is None or x.ndim < 2:
        return None
    spec = jax.typeof(x).sharding.spec
    return TIME_AXIS if spec[1] == TIME_AXIS else None


def per_shard[R](function: Callable[..., R]) -> Callable[..., R]:
    """Runs `function` on each device's own part of the batch; `function` itself without a mesh.

    For kernels, which see local arrays only. Every array argument and every result has the batch as its first
    axis and is split over it alone; `None` arguments are allowed. A batch that the mesh does not divide is
    computed whole on every device. Inside another `per_shard` the part is at hand: `function` itself.
    Arguments whose second axis is frames split over `TIME_AXIS` stay so; every result must then have frames
    as its second axis, too, and the function must treat each by itself.
    """

    def call(*args: Any) -> R:
        mesh = active_mesh()
        if mesh is None or mesh.are_all_axes_manual:
            return function(*args)
        batch = jax.tree.leaves(args)[0].shape[0]
        (rows,) = fit_spec(PartitionSpec(ShardingRules().batch), (batch,), mesh)
        specs = jax.tree.map(lambda x: PartitionSpec(*(rows, time_axis(x))[: x.ndim]), args)
        local = jax.tree.map(jax.sharding.reshard, args, specs)
        frames = next((axis for x in jax.tree.leaves(args) if (axis := time_axis(x))), None)
        out = PartitionSpec(rows) if frames is None else PartitionSpec(rows, frames)
        # Replication is not tracked: raw kernels cannot say how their results vary over the mesh.
        return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False)(*local)

    return call
