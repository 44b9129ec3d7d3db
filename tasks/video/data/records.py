"""Prepared videos: shards of JPEG frames, which `prepare` writes and training reads."""

from pathlib import Path

import numpy as np

from tasks.common.video.decoding import Limits
from tasks.common.video.errors import VideoDataError
from tasks.common.video.frame_records import unpack_record
from tasks.common.video.frames import Clip, JpegClip
from tasks.common.video.shards import MANIFEST, Format, Shards

FORMAT = Format("foxtrot-video-shards", 1, "python -m tasks.video.data prepare --output=DIR ...")


class RecordVideos(Shards):
    """The videos of a folder of shards.

    Raises:
        VideoDataError: unfinished or damaged shards.
        ImportError: array_record is missing.
    """

    missing: tuple[str, ...] = ()

    def __init__(self, folder: Path | str, limits: Limits | None = None):
        self.limits = limits or Limits()
        super().__init__(folder, FORMAT)

    def _read_index(self) -> None:
        self.classes = tuple(self.manifest["classes"])
        super()._read_index()
        self.labels = np.asarray([self.entry(i)["label"] for i in range(len(self))], np.int32)
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise VideoDataError(f"{self.folder / MANIFEST}: a label beyond the {len(self.classes)} classes")

    def open(self, index: int) -> Clip:
        record, name = self.read_record(index)
        frames, fps = unpack_record(record, name)
        return JpegClip(frames, name, fps, self.limits)
