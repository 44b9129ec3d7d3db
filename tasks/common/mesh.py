"""The device mesh of a run and how a batch lies on it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.common.sharding import MESH_AXES, TIME_AXIS
from tasks.common.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 for at most one of them means "all the rest".

    data: replicas that split the batch only.
    fsdp: devices that split the batch and the weights.
    """

    data: int = -1
    fsdp: int = 1

    def __post_init__(self) -> None:
        for name in MESH_AXES:
            size = getattr(self, name)
            if size != -1 and size < 1:
                raise ConfigError(f"mesh.{name} = {size}: use a positive number, or -1 for the rest")
        if self.data == self.fsdp == -1:
            raise ConfigError("mesh.data and mesh.fsdp are both -1: only one of them can be the rest")


@dataclasses.dataclass(frozen=True)
class LongVideoMeshConfig(MeshConfig):
    """Devices for models that can split a video by its frames.

    time: devices that share the frames of every clip: recurrent states travel between them, frames do not
      (TAPNext++). It must divide the frames of a clip.
    """

    time: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time < 1:
            raise ConfigError(f"mesh.time = {self.time}: must be at least 1 (1: frames are not split)")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with explicit axes ("data", "fsdp") and perhaps "time" over `devices` (default: all of them).

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {name: getattr(config, name) for name in MESH_AXES}
    if isinstance(config, LongVideoMeshConfig) and config.time > 1:
        sizes[TIME_AXIS] = config.time
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        asked = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        raise ConfigError(
            f"{asked} does not fit {len(devices)} {devices[0].platform} device(s): {' x '.join(sizes)} must "
            f"be {len(devices)} (-1 means the rest)"
        )
    shape = tuple(len(devices) // fixed if size == -1 else size for size in sizes.values())
    axis_types = (AxisType.Explicit,) * len(shape)
    return jax.make_mesh(shape, tuple(sizes), axis_types=axis_types, devices=devices)


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split: the devices, but for those that share frames."""
    return math.prod(mesh.shape[axis] for axis in MESH_AXES)


def batch_sharding(mesh: Mesh, *, micro_batches: bool = False) -> NamedSharding:
    """Rows split over the devices; with `micro_batches`, of arrays [accum, B / accum, ...]."""
    rows = PartitionSpec(None, MESH_AXES) if micro_batches else PartitionSpec(MESH_AXES)
    return NamedSharding(mesh, rows)


def put_whole_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """`put_batch` of a batch that every process holds whole: each gives its share of the rows."""

    def own(rows: Any) -> Any:
        share = len(rows) // jax.process_count()
        return rows[jax.process_index() * share : (jax.process_index() + 1) * share]

    return put_batch({name: own(rows) for name, rows in batch.items()}, mesh)


def put_batch(batch: Mapping[str, Any], mesh: Mesh, *, micro_batches: int | None = None) -> dict[str, Any]:
    """A batch of host arrays, this process's rows of it, as global arrays on the mesh.

    Args:
      batch: arrays with leading axis: rows.
      mesh: whose devices share the rows.
      micro_batches: None: arrays [B, ...]; else [micro_batches, B / micro_batches, ...].

    Raises:
      ValueError: the rows cannot be shared out equally.
    """
    sharding = batch_sharding(mesh, micro_batches=micro_batches is not None)
    parts = micro_batches or 1
    placed = {}
    for name, rows in batch.items():
        array = np.asarray(rows)
        share = batch_ways(mesh.local_mesh) * parts
        if array.ndim == 0 or array.shape[0] % share:
            raise ValueError(
                f"batch[{name!r}] has shape {array.shape}: its rows must be a multiple of {share}"
            )
        if micro_batches is not None:
            array = array.reshape(parts, array.shape[0] // parts, *array.shape[1:])
        placed[name] = jax.make_array_from_process_local_data(sharding, array)
    return placed
