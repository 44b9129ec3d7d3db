"""Progress bars: of long preparations, and of a video's way through a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int, int], None]]:
    """A bar on standard error; yields a callback (clips done, in all, done by an earlier run). Quiet where
    there is no terminal."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def update(done: int, total: int, kept: int) -> None:
            if kept and not bar.tasks[0].total:
                console.print(f"{kept} of {total} clips were done by an earlier run")
            bar.update(task, completed=done, total=max(total, 1))

        yield update


def frames_bar(console: Console) -> Progress:
    """A bar for frames of one video, with the time left and the task field `note` at its end; quiet where
    there is no terminal, and gone when it is done."""
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
