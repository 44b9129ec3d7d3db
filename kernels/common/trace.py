"""Where the device's time goes, from a profiler trace."""

import re
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

# "loop_add_fusion_12.remat.3" and "loop_add_fusion" are one kind of kernel.
_COUNTERS = re.compile(r"([._]?(clone|remat\d*|\d+))+$")


class OpTime(NamedTuple):
    """One group of device operations.

    Attributes:
      name: of the kernels, without what only numbers them.
      seconds: in all.
      calls: how many there were.
      share: of the time of all operations, in [0, 1].
      example: the HLO operation of the longest of them, "" if the trace does not say.
    """

    name: str
    seconds: float
    calls: int
    share: float
    example: str


class Trace(NamedTuple):
    """What ran on the first device.

    Attributes:
      groups: longest first.
      busy_s: seconds in which anything ran.
      window_s: from the start of the first operation to the end of the last.
    """

    groups: tuple[OpTime, ...]
    busy_s: float
    window_s: float


class _Event(NamedTuple):
    name: str
    begin: float
    seconds: float
    example: str


def trace(run: Callable[[], Any], folder: Path | None = None) -> Trace:
    """What the first device does while `run` runs, which waits for its results.

    Args:
      folder: keeps the trace, for other tools; None: it is dropped.

    Raises:
      ValueError: no operation of a device was traced.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as dropped:
        with jax.profiler.trace(str(folder or dropped), profiler_options=options):
            run()
        return read_trace(folder or Path(dropped))


def read_trace(folder: Path) -> Trace:
    """The newest trace below a folder that `jax.profiler.trace` wrote.

    Raises:
      ValueError: there is none, or no operation of a device in it.
    """
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"{folder} holds no profiler trace (*.xplane.pb)")
    with warnings.catch_warnings():
        # Iterating over statistics warns, in C++, of a type without a module: as an error that is fatal.
        warnings.simplefilter("ignore", DeprecationWarning)
        data = jax.profiler.ProfileData.from_file(str(files[-1]))
        events = sorted(_device_events(data), key=lambda event: event.begin)
    if not events:
        raise ValueError(f"{files[-1]}: no operation of a device was traced")
    end = max(event.begin + event.seconds for event in events)
    return Trace(tuple(_groups(events)), _busy(events), end - events[0].begin)


def _device_events(data: Any) -> Iterator[_Event]:
    """Kernels of the first GPU or TPU; on a CPU what the client's threads ran."""
    planes = {plane.name: plane for plane in data.planes}
    devices = sorted(name for name in planes if name.startswith("/device:") and ":0" in name)
    plane = planes[devices[0]] if devices else planes.get("/host:CPU")
    for line in () if plane is None else plane.lines:
        wanted = line.name.startswith(("Stream", "XLA Ops")) if devices else line.name.startswith("tf_XLA")
        if wanted:
            yield from (
                _event(event, is_host=not devices) for event in line.events if _counts(event, devices)
            )


def _counts(event: Any, devices: list[str]) -> bool:
    """On a CPU only operations have the HLO they come from; all else there is the runtime's own."""
    return bool(devices) or any(name == "hlo_op" for name, _ in event.stats)


def _event(event: Any, *, is_host: bool) -> _Event:
    stats = dict(event.stats)
    example = str(stats.get("tf_op") or stats.get("hlo_op") or "")
    return _Event(str(event.name), event.start_ns * 1e-9, event.duration_ns * 1e-9, example)


def _groups(events: Iterable[_Event]) -> list[OpTime]:
    found: dict[str, list[_Event]] = defaultdict(list)
    for event in events:
        found[_COUNTERS.sub("", event.name) or event.name].append(event)
    total = sum(event.seconds for group in found.values() for event in group)
    groups = []
    for name, group in found.items():
        seconds = sum(event.seconds for event in group)
        longest = max(group, key=lambda event: event.seconds)
        groups.append(OpTime(name, seconds, len(group), seconds / total if total else 0.0, longest.example))
    return sorted(groups, key=lambda group: -group.seconds)


def _busy(events: Iterable[_Event]) -> float:
    """Length of the union of the events, which are sorted by their beginning."""
    busy, until = 0.0, float("-inf")
    for event in events:
        end = event.begin + event.seconds
        busy += max(end - max(event.begin, until), 0.0)
        until = max(until, end)
    return busy


def describe(trace: Trace, steps: int, top: int = 15) -> str:
    """The longest groups as lines: share, milliseconds a step, calls a step, name, example.

    Args:
      trace: from `read_trace`.
      steps: traced steps.
      top: groups shown.
    """
    idle = 1 - trace.busy_s / trace.window_s if trace.window_s else 0.0
    lines = [f"  busy {trace.busy_s / steps * 1e3:.2f} ms a step, {idle:.1%} of the window idle"]
    for group in trace.groups[:top]:
        calls = group.calls / steps
        milliseconds = group.seconds / steps * 1e3
        lines.append(
            f"  {group.share:6.1%} {milliseconds:9.3f} ms {calls:7.1f} x  {group.name}  {group.example}"
        )
    rest = sum(group.share for group in trace.groups[top:])
    return "\n".join([*lines, f"  {rest:6.1%} in {max(len(trace.groups) - top, 0)} other groups"])
