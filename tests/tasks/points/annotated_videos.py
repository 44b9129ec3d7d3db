"""Small annotated videos with exact tracks, and writers of every format that evaluation reads."""

import dataclasses
import io
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64


@dataclasses.dataclass(frozen=True)
class Annotated:
    """A video: a smooth texture that drifts, and points on it.

    points: float [N, T, 2], (x, y) as shares of width and height; occluded: bool [N, T].
    """

    name: str
    video: np.ndarray
    points: np.ndarray
    occluded: np.ndarray

    def entry(self, *, jpeg: str = "") -> dict[str, object]:
        """As TAP-Vid's pickles have it; jpeg: "list" or "array" of JPEG files instead of frames."""
        frames = [jpeg_bytes(frame) for frame in self.video]
        video = {"": self.video, "list": frames, "array": np.asarray(frames)}[jpeg]
        return {"video": video, "points": self.points, "occluded": self.occluded}


def jpeg_bytes(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=95)
    return file.getvalue()


def annotated(seed: int, frames: int = 9, tracks: int = 6, dtype: str = "float32") -> Annotated:
    rng = np.random.default_rng(seed)
    velocity = rng.uniform(-1.5, 1.5, 2)  # pixels a frame, (x, y)
    waves = rng.uniform(0.05, 0.6, (12, 2)), rng.uniform(0, 6.3, 12), rng.uniform(0, 1, (12, 3))
    y, x = np.meshgrid(np.arange(HEIGHT) + 0.5, np.arange(WIDTH) + 0.5, indexing="ij")
    video = np.stack([_texture(x - t * velocity[0], y - t * velocity[1], *waves) for t in range(frames)])
    start = rng.uniform(0.3, 0.7, (tracks, 1, 2)) * [WIDTH, HEIGHT]
    points = start + np.arange(frames)[None, :, None] * velocity
    occluded = rng.random((tracks, frames)) < 0.3
    occluded[0] = True  # never visible: no query
    occluded[1, :] = np.arange(frames) < frames - 1  # visible on the last frame only
    occluded[2, 0] = False
    return Annotated(f"clip{seed}", video, (points / [WIDTH, HEIGHT]).astype(dtype), occluded)


def _texture(
    x: np.ndarray, y: np.ndarray, waves: np.ndarray, phases: np.ndarray, colours: np.ndarray
) -> np.ndarray:
    angle = x[..., None] * waves[:, 0] + y[..., None] * waves[:, 1] + phases
    picture = np.sin(angle) @ colours
    return np.clip(128 + 28 * picture, 0, 255).astype(np.uint8)


def write_pickle(path: Path, content: object, protocol: int = pickle.DEFAULT_PROTOCOL) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def write_davis(path: Path, videos: list[Annotated], protocol: int = 4) -> Path:
    """A dict by name."""
    return write_pickle(path, {video.name: video.entry() for video in videos}, protocol)


def write_rgb_stacking(path: Path, videos: list[Annotated]) -> Path:
    """A list."""
    return write_pickle(path, [video.entry() for video in videos])


def write_kinetics(folder: Path, videos: list[Annotated], shards: int = 2, jpeg: str = "array") -> Path:
    """Shards of lists, frames as JPEG files."""
    for shard in range(shards):
        part = [video.entry(jpeg=jpeg) for video in videos[shard::shards]]
        write_pickle(folder / f"{shard:04d}_of_{shards:04d}.pkl", part)
    return folder


def write_robotap(folder: Path, videos: list[Annotated]) -> Path:
    """Several pickles of dicts."""
    for part in range(2):
        write_davis(folder / f"robotap_split{part}.pkl", videos[part::2])
    return folder


def write_own(folder: Path, video: Annotated, tracks: str = "npz", flag: str = "visible") -> Path:
    """One's own folder: frames as PNG files, tracks in pixels as .npz or .csv."""
    frames = folder / video.name
    frames.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(video.video):
        Image.fromarray(frame).save(frames / f"{number:05d}.png")
    tracks_xy = video.points.astype(np.float64) * [WIDTH, HEIGHT]
    path = folder / f"{video.name}.{tracks}"
    if tracks == "npz":
        seen = video.occluded if flag == "occluded" else ~video.occluded
        np.savez(path, tracks_xy=tracks_xy, **{flag: seen})
        return path
    lines = ["track,frame,x,y,visible"]
    for track, frame in np.argwhere(~video.occluded):
        x, y = tracks_xy[track, frame]
        lines.append(f"{track},{frame},{float(x)!r},{float(y)!r},1")
    path.write_text("\n".join(lines) + "\n")
    return path
