"""TensorBoard event files, written in the caller's thread.

tensorboardX's own SummaryWriter hands events to a thread through a bounded queue: on a full disk the thread
dies with a traceback of its own and the queue fills up. Its record format is used directly instead.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

_FLUSH_SECONDS = 10.0


class Board:
    """Scalars of one process of a run.

    Args:
      folder: created if missing; each process writes a file of its own into it.
      first_step: TensorBoard hides what earlier processes wrote from this step on.

    Raises:
      OSError: from every method, when the folder cannot be written.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The names TensorBoard looks for; the last parts keep a quick restart from taking an earlier name.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{first_step}"
        self._records = RecordWriter(str(folder / name))
        self._flushed = 0.0
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        restart = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), step=first_step, session_log=restart))

    def _add(self, event: Event) -> None:
        self._records.write(event.SerializeToString())

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds {tag: value} at `step`."""
        for tag, value in values.items():
            self._add(Event(wall_time=time.time(), step=step, summary=scalar(tag, value)))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._records.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self._records.close()
