"""Which videos were left out, and why: counted and named, across processes."""

import json
import logging
import os
from pathlib import Path

from tasks.common.video.errors import VideoError

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
