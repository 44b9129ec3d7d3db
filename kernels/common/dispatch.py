"""Which implementation of an op runs: automatic, named, or the first usable of an ordered list.

A named implementation never falls back: if it cannot take the call, the error says why. Automatic choice
goes through the implementations in order of preference and takes the first that gives no reason against
itself.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax


class Target(NamedTuple):
    """What programs are compiled for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      capability: compute capability of an NVIDIA GPU, such as "9.0"; None elsewhere.
      kind: name of the device, such as "NVIDIA H200".
      cores: its streaming multiprocessors, for kernels that keep one program on each.
    """

    platform: str
    capability: str | None
    kind: str
    cores: int


_assumed: contextvars.ContextVar[Target | None] = contextvars.ContextVar("assumed_target", default=None)


def target() -> Target:
    """The default device, or what `compiling_for` says."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    device = jax.devices()[0]
    capability, cores = (getattr(device, name, None) for name in ("compute_capability", "core_count"))
    return Target(jax.default_backend(), capability, device.device_kind, cores or 1)


@contextlib.contextmanager
def compiling_for(
    platform: str, capability: str | None = None, kind: str = "unknown", cores: int = 132
) -> Iterator[Target]:
    """Chooses implementations for another device than the default one.

    For exporting programs from a machine without it, and for running its kernels interpreted. The choice is
    made
    when a function is traced: trace inside the context.
    """
    assumed = Target(platform, capability, kind, cores)
    token = _assumed.set(assumed)
    try:
        yield assumed
    finally:
        _assumed.reset(token)


@runtime_checkable
class Implementation[RequestT](Protocol):
    """What dispatch needs to know of an implementation: whether it can take the call described by
    `request`.
    """

    @property
    def supports(self) -> Callable[[RequestT], str | None]:
        """None if the call can be taken, otherwise one sentence saying why not."""


class ImplementationError(ValueError):
    """No requested implementation can take the call."""


def choose[RequestT, ImplementationT: Implementation[Any]](
    op: str,
    implementations: Mapping[str, ImplementationT],
    request: RequestT,
    wanted: str | Sequence[str] | None,
    preference: Sequence[str],
) -> tuple[str, ImplementationT]:
    """Returns the name and the implementation that will run.

    Args:
      op: name of the op, for messages.
      implementations: all of them, by name.
      request: description of the call, handed to `supports`.
      wanted: None (try `preference` in order), one name (that one or an error), or names tried in order.
      preference: the automatic order, best first.

    Raises:
      ValueError: a name in `wanted` does not exist, or `wanted` is empty.
      ImplementationError: none of the candidates can take the call; the message gives each one's reason.
    """
    candidates = [wanted] if isinstance(wanted, str) else list(preference if wanted is None else wanted)
    if not candidates:
        raise ValueError(f"{op}: implementation is an empty list; pass None, a name, or at least one name.")
    for name in candidates:
        if name not in implementations:
            known = ", ".join(sorted(implementations))
            raise ValueError(f"{op}: implementation={name!r} does not exist; known ones are {known}.")
    refusals = []
    for name in candidates:
        reason = implementations[name].supports(request)
        if reason is None:
            return name, implementations[name]
        refusals.append(f"  {name}: {reason}")
    raise ImplementationError(
        f"{op}: no requested implementation can take this call:\n" + "\n".join(refusals)
    )


def check_sizes(op: str, sizes: Mapping[str, int], letters: str) -> None:
    """Raises ValueError if a letter of `sizes` is none of the op's, which `letters` lists in order."""
    if unknown := sorted(set(sizes) - set(letters)):
        raise ValueError(f"{op} has sizes {', '.join(letters)}; got {', '.join(unknown)}.")


def refuse_pruning(op: str, pruning: str | None) -> None:
    """Raises ValueError if pruning is asked for, of an op that has none."""
    if pruning is not None:
        raise ValueError(f"{op} has no pruning; got {pruning!r}.")


def explain_choice[RequestT, ImplementationT: Implementation[Any]](
    op: str,
    implementations: Mapping[str, ImplementationT],
    request: RequestT,
    wanted: str | Sequence[str] | None,
    preference: Sequence[str],
) -> str:
    """One line per implementation: whether it would run, could run, or why it cannot."""
    try:
        chosen: str | None = choose(op, implementations, request, wanted, preference)[0]
    except ImplementationError:
        chosen = None
    order = [*preference, *sorted(set(implementations) - set(preference))]
    lines = [f"{op}: {request}"]
    for name in order:
        reason = implementations[name].supports(request)
        state = "runs" if name == chosen else "could run" if reason is None else f"cannot run: {reason}"
        lines.append(f"  {name:<18} {state}")
    if chosen is None:
        lines.append("  none of the requested implementations can take this call")
    return "\n".join(lines)
