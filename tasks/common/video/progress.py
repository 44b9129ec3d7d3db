"""The progress bar of a video's way through a model."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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
