"""Which videos were left out, and why: counted and named, across processes."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from tasks.common.video.errors import VideoDataError, VideoError

_MOST_REPLACED = 100

_log = logging.getLogger(__name__)


class SkipReport:
    """Which videos could not be read, and why. Several processes may add to one file.

    Args:
        path: a file of JSON lines, which processes append to; None: only this process's are known.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self._seen: dict[str, str] = {}

    def add(self, error: VideoError) -> None:
        """Notes a video, once."""
        if error.name in self._seen:
            return
        self._seen[error.name] = error.reason
        _log.warning("left out: %s", error)
        if self.path is None:
            return
        line = json.dumps({"name": error.name, "reason": error.reason}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One short write in append mode: lines of several processes do not mix.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)
        except OSError as problem:
            _log.warning("could not write %s: %s", self.path, problem)

    def known(self, name: str) -> bool:
        """Whether this process has found that video unreadable."""
        return name in self._seen

    def read(self) -> dict[str, str]:
        """Name -> reason, of this process and of those that wrote to the file."""
        found = dict(self._seen)
        if self.path is not None and self.path.is_file():
            for line in self.path.read_text("utf-8").splitlines():
                try:
                    record = json.loads(line)
                    found.setdefault(str(record["name"]), str(record["reason"]))
                except (ValueError, KeyError, TypeError):
                    continue  # cut off by a kill
        return found


def use_first[T](
    use: Callable[[int], T],
    report: SkipReport,
    name: Callable[[int], str],
    count: int,
    first: int,
    *,
    failed: str,
) -> T:
    """`use(first)`; where a video cannot be used, that of the next in the list, up to 100 further.

    Args:
        use: (index) -> its result; a VideoError says that it cannot be used.
        report: what is known to be of no use is passed over; what is found to be is added.
        name: (index) -> the video's name.
        count: videos in the list, which begins again after the last.
        first: index.
        failed: for the message: "videos after it cannot be read".

    Raises:
        VideoDataError: none of them can be used.
    """
    for step in range(min(_MOST_REPLACED + 1, count)):
        index = (first + step) % count
        if report.known(name(index)):
            continue
        try:
            return use(index)
        except VideoError as error:
            report.add(VideoError(name(index), error.reason))
    raise VideoDataError(
        f"{name(first)} and the {step} {failed}; the first because: "
        f"{report.read().get(name(first), 'see the log')}"
    )
