"""How the Hopper kernels run a tile: stages, buffers, turns. Chosen by the tuner, per device and head dim.

`tuned/<device>.json` holds what was measured; `DEFAULTS` what shapes and devices without a measurement get.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from kernels.common.dispatch import target
from kernels.forgetting_attention.config import Tile, TileConfig


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One kernel's tile and how it runs it.

    Attributes:
      tile: (rows, columns).
      stages: tiles of the streamed operands in shared memory at a time.
      buffers: blocks of the owned operands in shared memory; 2 loads the next block early.
      turns: forward only: whether warpgroups take turns at the tensor cores.
      overlap: forward only: whether a warpgroup's softmax runs beside its output product of the tile before.
    """

    tile: Tile
    stages: int
    buffers: int = 2
    turns: bool = False
    overlap: bool = False


Schedules = Mapping[str, Schedule]  # "forward", "backward_kv", "backward_q"

DEFAULTS: Mapping[int, Schedules] = {
    64: {
        "forward": Schedule((192, 128), 2, turns=True, overlap=True),
        "backward_kv": Schedule((64, 192), 2),
        "backward_q": Schedule((192, 64), 3),
    },
    128: {
        "forward": Schedule((128, 128), 2),
        "backward_kv": Schedule((64, 128), 2),
        "backward_q": Schedule((128, 128), 2, buffers=1),
    },
    256: {
        "forward": Schedule((128, 64), 2, buffers=1),
        "backward_kv": Schedule((64, 128), 1, buffers=1),
        "backward_q": Schedule((128, 64), 1, buffers=1),
    },
}
TUNED = Path(__file__).parent / "tuned"
_forced: contextvars.ContextVar[Schedules | None] = contextvars.ContextVar("schedules", default=None)


@contextlib.contextmanager
def forced(schedules: Schedules) -> Iterator[None]:
    """Runs what is traced inside with these schedules: for the tuner."""
    token = _forced.set(schedules)
    try:
        yield
    finally:
        _forced.reset(token)


def default_tiles(device: str, head_dim: int) -> TileConfig:
    """The tiles of the schedules for a device."""
    return tiles_of(chosen(device, head_dim))


def tiles_of(schedules: Schedules) -> TileConfig:
    """What the kernels' schedules fix of a call's tiles."""
    tiles: dict[str, Any] = {name: schedule.tile for name, schedule in schedules.items()}
    return TileConfig(**tiles)


def chosen(device: str, head_dim: int) -> Schedules:
    """What runs on a device if the caller gives no tiles: what the tuner measured there, or `DEFAULTS`."""
    return _forced.get() or {**DEFAULTS[head_dim], **tuned(device).get(head_dim, {})}


class TunedFileError(ValueError):
    """A file of measured schedules cannot be read; it can be made anew with `launch.bench --tune`."""


def tuned_file(device: str) -> Path:
    """Where a device's measured schedules lie."""
    return TUNED / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


@functools.cache
def tuned(device: str) -> Mapping[int, Schedules]:
    """Measured schedules of a device by head dim and kernel; empty if it was never tuned.

    Raises:
      TunedFileError: its file is damaged.
    """
    path = tuned_file(device)
    if not path.is_file():
        return {}
    entries = read_tuned(path)["entries"]
    return {
        int(dim): {k: parsed(entry["schedule"], path) for k, entry in entries[dim].items()} for dim in entries
    }


def read_tuned(path: Path) -> dict[str, Any]:
    """A file {device, jax, commit, date, command, entries: {head dim: {kernel: {schedule, ms, ...}}}}.

    Raises:
      TunedFileError: it is not of this form.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TunedFileError(f"{path}: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("entries"), dict):
        raise TunedFileError(f"{path}: expected an object with entries")
    for head_dim, kernels in found["entries"].items():
        if head_dim not in map(str, DEFAULTS) or not isinstance(kernels, dict):
            raise TunedFileError(
                f"{path}: entries[{head_dim!r}]: the head dims are {', '.join(map(str, DEFAULTS))}"
            )
        for kernel, entry in kernels.items():
            if kernel not in DEFAULTS[int(head_dim)] or not isinstance(entry, dict):
                raise TunedFileError(f"{path}: {kernel!r} is no kernel, or its entry is no object")
            parsed(entry.get("schedule"), path)
    return found


def parsed(values: Any, path: Path) -> Schedule:
    """A schedule from JSON.

    Raises:
      TunedFileError: unknown or missing keys, or values of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(Schedule)}
    if not isinstance(values, dict) or set(values) - set(fields):
        raise TunedFileError(f"{path}: schedule {values!r} has other keys than {', '.join(fields)}")
    hints = get_type_hints(Schedule)
    checked: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in values:
            if field.default is dataclasses.MISSING:
                raise TunedFileError(f"{path}: schedule {values!r} lacks {name}")
            continue
        value = values[name]
        wanted = get_args(hints[name])
        items, types = (value, wanted) if wanted and isinstance(value, list) else ([value], [hints[name]])
        if len(items) != len(types) or any(type(x) is not t for x, t in zip(items, types, strict=True)):
            raise TunedFileError(f"{path}: schedule {name} = {value!r} is not of type {hints[name]}")
        checked[name] = tuple(items) if wanted else value
    return Schedule(**checked)


def schedule(kernel: str, head_dim: int, tile: Tile) -> Schedule:
    """The schedule of "forward", "backward_kv" or "backward_q" for a tile."""
    known = chosen(target().kind, head_dim)[kernel]
    if known.tile == tile:
        return known
    return Schedule(tile, 2 if head_dim < 256 else 1, buffers=1)


def refusal(head_dim: int, tiles: TileConfig) -> str | None:
    """Why the kernels cannot run with these tiles, or None."""
    owned = {"forward": tiles.forward, "backward_kv": tiles.backward_kv[::-1], "backward_q": tiles.backward_q}
    for name, (block, step) in owned.items():
        if block not in (128, 192) or step % 64 or not 64 <= step <= 256:
            return (
                f"tiles.{name}={getattr(tiles, name)}: a block must be 128 or 192 (two or three warpgroups"
                " of 64), and the other side a multiple of 64 up to 256"
            )
    return None
