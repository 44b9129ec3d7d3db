"""Small clips with known tracks, and files of them, for the tests of this folder."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tasks.common.video.errors import VideoError
from tasks.points.data.clips import PointClip


def moving_clip(
    frames: int = 6, height: int = 24, width: int = 32, points: int = 5, seed: int = 0
) -> PointClip:
    """A bright pixel pattern per point, moving one pixel right a frame; point i hidden in frame i + 1."""
    rng = np.random.default_rng(seed)
    video = rng.integers(0, 100, (frames, height, width, 3)).astype(np.uint8)
    start = np.stack(
        [rng.integers(2, height - 2, points), rng.integers(2, width - frames - 2, points)], axis=-1
    )
    tracks = np.repeat(start[:, None] + 0.5, frames, axis=1).astype(np.float32)
    tracks[..., 1] += np.arange(frames)
    visible = np.ones((points, frames), bool)
    for point in range(points):
        if point + 1 < frames:
            visible[point, point + 1] = False
        for t in range(frames):
            y, x = np.floor(tracks[point, t]).astype(int)
            video[t, y, x] = (255, 250 - 10 * point, 255)
    return PointClip(video, tracks, visible, np.zeros(points, np.int32))


@dataclass(frozen=True)
class ListedClips:
    """Given clips; None cannot be read."""

    clips: tuple[PointClip | None, ...]

    def __len__(self) -> int:
        return len(self.clips)

    def name(self, index: int) -> str:
        return f"clip {index}"

    def key(self, index: int) -> Any:
        return [index, None if self.clips[index] is None else int(self.clips[index].video.sum())]

    def open(self, index: int) -> PointClip:
        clip = self.clips[index]
        if clip is None:
            raise VideoError("a file", "is broken")
        return clip


def encode(frame: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """A frame as a picture file; 16-bit if it is uint16."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, kind, **options)
    return file.getvalue()


def write_npz(path: Path, clip: PointClip, **changes: Any) -> Path:
    """A clip as a file of the npz layout; changes replace arrays, None leaves one out."""
    arrays: dict[str, Any] = {
        "video": clip.video, "tracks_yx": clip.tracks_yx, "visible": clip.visible,
        "query_frames": clip.query_frames,
    }  # fmt: skip
    arrays |= changes
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def write_odyssey(folder: Path, clip: PointClip, **changes: Any) -> Path:
    """A clip as a sequence of PointOdyssey's layout; changes replace arrays of its annotations."""
    (folder / "rgbs").mkdir(parents=True)
    for number, frame in enumerate(clip.video):
        (folder / "rgbs" / f"rgb_{number:05d}.jpg").write_bytes(encode(frame, "JPEG", quality=95))
    arrays: dict[str, Any] = {
        "trajs_2d": clip.tracks_yx[..., ::-1].swapaxes(0, 1),
        "visibs": clip.visible.T,
        "valids": np.ones(clip.visible.T.shape, bool),
        "trajs_3d": np.zeros((*clip.visible.T.shape, 3), np.float32),
        "intrinsics": np.zeros((len(clip.video), 3, 3)),
    }
    arrays |= changes
    np.savez(folder / "anno.npz", **{k: v for k, v in arrays.items() if v is not None})
    return folder
