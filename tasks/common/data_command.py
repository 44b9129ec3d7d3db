"""What the data commands of all tasks share: how they end, what they say was left out, their progress."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

SHOWN = 10  # entries of a long list


def add_work_options(parser: argparse.ArgumentParser, on_error: str = "skip") -> None:
    """The options of every command that makes shards; `on_error` is that option's default."""
    parser.add_argument("--on-error", choices=("skip", "fail"), default=on_error, help="what cannot be read")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")


def run_command(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, Callable[[argparse.Namespace], None]],
    argv: Sequence[str] | None,
) -> int:
    """Runs the command that a line names. Returns the exit code: 0, or 2 after one line on what is wrong."""
    try:
        args = parser.parse_args(argv)
        commands[args.command](args)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def print_reasons(what: str, entries: Sequence[tuple[str, str]], note: str = "") -> None:
    """How many inputs were left out, say, and the first of them with the reason of each; nothing for none."""
    if not entries:
        return
    print(f"{what}: {len(entries)}{note}")
    for name, reason in entries[:SHOWN]:
        print(f"  {name}: {reason}")
    if len(entries) > SHOWN:
        print(f"  ... and {len(entries) - SHOWN} more")


@contextmanager
def progress_bar(what: str, unit: str = "clips") -> Iterator[Callable[[int, int, int], None]]:
    """A bar on standard error; yields a callback (units done, in all, done by an earlier run). Quiet where
    there is no terminal.

    Args:
      unit: what is counted; "bytes" are shown as such, with their speed.
    """
    count: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),)
    if unit == "bytes":
        count = (DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), *count, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def update(done: int, total: int, kept: int) -> None:
            if kept and not bar.tasks[0].total:
                console.print(f"{kept} of {total} {unit} were done by an earlier run")
            bar.update(task, completed=done, total=max(total, 1))

        yield update
