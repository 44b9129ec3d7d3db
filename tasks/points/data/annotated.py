"""Annotated real videos as training clips: a folder of anybody's own, see `own_folder.py` and OWN_VIDEOS.md.

A long video is several clips, and large frames are reduced as they are read, so that memory stays bounded.
Where a hidden point is, a person cannot say: its place is put outside the frame, so that it teaches nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tasks.common.optional import need
from tasks.common.video.errors import VideoError
from tasks.common.video.shards import stamp
from tasks.points.data.clips import ANY_FRAME, PointClip, inside, place_outside
from tasks.points.data.own_folder import read_own_video, track_files
from tasks.points.data.tracked_video import PointDataError


@dataclass(frozen=True)
class FolderClips:
    """Parts of the videos of a folder, by their files of tracks.

    parts: (NAME.npz or NAME.csv beside its video, which part) of each.
    frames: of a part, at most; parts of a video are equally long.
    side: pixels of the frames' shorter side, at most.
    """

    parts: tuple[tuple[str, int], ...]
    frames: int
    side: int

    def __len__(self) -> int:
        return len(self.parts)

    def name(self, index: int) -> str:
        file, part = self.parts[index]
        return f"{file}[{part}]" if part else file

    def key(self, index: int) -> Any:
        file, part = self.parts[index]
        return [file, stamp(file), part, self.frames, self.side]

    def open(self, index: int) -> PointClip:
        file, number = self.parts[index]
        try:
            video = read_own_video(Path(file)).parts(self.frames)[number]
        except PointDataError as error:
            raise VideoError(file, str(error).removeprefix(f"{file}: ")) from error
        frames = np.stack(list(_reduced(video.frames(), self.side)))
        height, width = frames.shape[1:3]
        tracks_yx = (video.tracks_xy * (width, height))[..., ::-1].astype(np.float32)
        # A few annotated points lie beyond the border.
        visible = ~video.occluded & inside(tracks_yx, height, width)
        query = np.full(len(visible), ANY_FRAME, np.int32)
        return PointClip(frames, place_outside(tracks_yx, ~visible, height, width), visible, query)


def find_own(folder: Path, frames: int, side: int) -> FolderClips:
    """The videos of a folder, cut into parts.

    Args:
        folder: with videos and tracks.
        frames: that an example needs; parts have up to twice as many.
        side: pixels of an example's longer side; frames' shorter sides stay up to twice as long.

    Raises:
        VideoDataError: no such folder, or no tracks in it.
    """
    parts: list[tuple[str, int]] = []
    for file in track_files(folder):
        try:
            count = len(read_own_video(file).parts(2 * frames))
        except PointDataError:
            count = 1  # what is wrong with it is said when it is opened
        parts += [(str(file), number) for number in range(count)]
    return FolderClips(tuple(parts), 2 * frames, 2 * side)


def _reduced(frames: Iterator[UInt8[np.ndarray, "H W 3"]], side: int) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Frames, those larger than `side` at their shorter side brought to it."""
    images = need("PIL.Image", "resizing frames")
    for frame in frames:
        height, width = frame.shape[:2]
        scale = side / min(height, width)
        if scale < 1:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            frame = np.asarray(images.fromarray(frame).resize(size, images.Resampling.BILINEAR))
        yield frame
