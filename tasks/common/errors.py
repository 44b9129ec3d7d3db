"""Errors a user can act on, and the exit code of each.

    0   the run is finished
    2   bad input: a config key, a path, a mesh that does not fit, data of the wrong kind
    3   training diverged; the offending batch is saved in the workdir
    4   a checkpoint could not be written, or none could be read
    75  stopped by a signal after saving; the same command resumes

`run_main` turns them into one line on stderr. Anything else is a bug and keeps its traceback.
"""

import contextlib
import errno
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class RunError(Exception):
    """An expected way for a run to end early; `exit_code` is what the process returns."""

    exit_code = 2


class ConfigError(RunError, ValueError):
    """A config, or another input of the command line, is wrong."""


class Diverged(RunError):
    """Loss or gradients are not finite, or jumped; nothing of the bad state was saved."""

    exit_code = 3


class CheckpointError(RunError):
    """A checkpoint could not be written, or no good one could be read."""

    exit_code = 4


class Stopped(RunError):
    """A signal asked the run to stop; the state was saved and the same command resumes."""

    exit_code = 75


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("no space left", "disk quota exceeded", "file too large", "resource_exhausted")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that nothing more can be written."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in _FULL:
            return True
        if any(words in str(current).lower() for words in _FULL_WORDS):
            return True
        current = current.__cause__ or current.__context__
    return False


def describe_write_failure(error: BaseException, folder: Path, what: str) -> str:
    """One sentence: what could not be written, where, why, and how much room is left there."""
    try:
        free = f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB free"
    except OSError:
        free = "free space unknown"
    reason = "the disk is full" if is_disk_full(error) else f"{type(error).__name__}: {error}"
    return f"could not write {what} in workdir {folder}: {reason} ({free})"


@contextlib.contextmanager
def writing(folder: Path, what: str) -> Iterator[None]:
    """Turns an OSError while writing into a CheckpointError that names the workdir."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(describe_write_failure(error, folder, what)) from error


@contextlib.contextmanager
def bad_input(what: str = "") -> Iterator[None]:
    """Turns an error about an input (a value, a file, a missing package) into a ConfigError; `what` leads."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(f"{what}: {error}" if what else str(error)) from error


def run_main(main: Callable[..., Any], *args: Any) -> None:
    """Calls `main(*args)` and exits: 0, or an error's one line on stderr and its exit code."""
    try:
        main(*args)
    except RunError as error:
        print(f"error: {error}" if error.exit_code != Stopped.exit_code else str(error), file=sys.stderr)
        sys.exit(error.exit_code)
