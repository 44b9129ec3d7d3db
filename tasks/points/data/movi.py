"""Kubric's MOVi-E and MOVi-F as TFDS stores them, TFRecord files of `tf.train.Example`, read without
TensorFlow.

Features that are read (T frames of H x W pixels, n instances):

video                           T PNG files, RGB
segmentations                   T PNG files, 8 bit: 0 is the background, k is instance k - 1
depth                           T PNG files, 16 bit: distance from the camera, from metadata/depth_range's
first
                                to its second number
normal                          T PNG files, 16 bit RGB: (n + 1) / 2 in the world; may be missing
metadata/depth_range            2 floats
metadata/video_name             bytes; may be missing
camera/positions, /quaternions  T x 3 floats; T x 4, (w, x, y, z)
camera/focal_length, /sensor_width  floats, in one unit
instances/bboxes_3d             n x T x 8 x 3 floats, corners in the world, in the same order in every frame

Files are named ...-train.tfrecord-00000-of-01024, and so on for validation and test.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from tasks.common.optional import need
from tasks.common.video.decoding import Limits
from tasks.common.video.errors import VideoDataError, VideoError
from tasks.common.video.frames import JpegClip
from tasks.common.video.shards import stamp
from tasks.points.data.clips import PointClip
from tasks.points.data.movi_tracks import Rendered, sample_points, track_points
from tasks.points.data.projection import Camera, rotation_matrices
from tasks.points.data.tf_example import ExampleError, Feature, parse_example
from tasks.points.data.tfrecord import find_records, read_record

VERSION = 1  # of the tracks: raise it with any change that alters one
_NAMED = re.compile(r"(?:^|-)(train|validation|test)\.tfrecord")
_IMAGES = ("video", "segmentations", "depth")
_NUMBERS = ("metadata/depth_range", "camera/positions", "camera/quaternions", "camera/focal_length",
            "camera/sensor_width", "instances/bboxes_3d")  # fmt: skip
_OPTIONAL = ("normal", "metadata/video_name")


@dataclass(frozen=True)
class MoviClips:
    """The examples of one split.

    records: (file, offset, length) of each.
    points: tracks of a clip.
    seed: of those that are taken.
    """

    records: tuple[tuple[str, int, int], ...]
    points: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ValueError(f"points = {self.points}: need at least 1")

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        file, offset, _ = self.records[index]
        return f"{file}@{offset}"

    def key(self, index: int) -> Any:
        file, offset, length = self.records[index]
        return [VERSION, file, stamp(file), offset, length, self.points, self.seed]

    def open(self, index: int) -> PointClip:
        file, offset, length = self.records[index]
        content, name = read_record(Path(file), offset, length), self.name(index)
        try:
            features = parse_example(content, (*_IMAGES, *_NUMBERS, *_OPTIONAL))
        except ExampleError as error:
            raise VideoError(name, f"not a tf.train.Example ({error})") from error
        video, scene = read_scene(features, name)
        rng = np.random.default_rng([self.seed % 2**63, offset, length])
        query_tyx, things = sample_points(rng, scene, self.points)
        tracks_yx, visible = track_points(scene, query_tyx, things)
        return PointClip(video, tracks_yx, visible, query_tyx[:, 0].astype(np.int32))


def find_movi(folder: Path, points: int = MoviClips.points, seed: int = 0) -> dict[str, MoviClips]:
    """The splits of a data set that TFDS has prepared: train, validation, test, as far as they are there.

    Args:
        folder: with the TFRecord files in it, at any depth.
        points: tracks of a clip.
        seed: of those that are taken.

    Raises:
        VideoDataError: no such folder, no such files, or damaged ones.
    """
    if not folder.is_dir():
        raise VideoDataError(f"{folder}: no such folder of TFRecord files")
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.tfrecord*")):
        named = _NAMED.search(path.name)
        if named and path.is_file():
            files.setdefault(named[1], []).append(path)
    if not files:
        raise VideoDataError(
            f"{folder}: no files called ...-train.tfrecord-00000-of-..., as TFDS prepares MOVi"
        )
    return {
        split: MoviClips(
            tuple((str(path), *place) for path in paths for place in find_records(path)), points, seed
        )
        for split, paths in files.items()
    }


def read_scene(features: dict[str, Feature], name: str) -> tuple[UInt8[np.ndarray, "T H W 3"], Rendered]:
    """(frames, what is known of what they show) of an example's features.

    Raises:
        VideoError: a feature is missing, of another kind or size, or damaged.
    """
    missing = [key for key in (*_IMAGES, *_NUMBERS) if key not in features]
    if missing:
        raise VideoError(name, f"no feature {', '.join(missing)}: not an example of MOVi-E or MOVi-F")
    images = {key: _byte_strings(features[key], key, name) for key in _IMAGES}
    frames = len(images["video"])
    if len({len(files) for files in images.values()}) != 1:
        counts = ", ".join(f"{len(files)} of {key}" for key, files in images.items())
        raise VideoError(name, f"unequal numbers of frames: {counts}")
    video = np.stack(JpegClip(images["video"], name).read(range(frames)))
    size = video.shape[1:3]
    segments, depth = (np.stack([_map(file, key, size, name) for file in images[key]])
                       for key in ("segmentations", "depth"))  # fmt: skip
    low, high = _numbers(features, "metadata/depth_range", (2,), name)
    positions = _numbers(features, "camera/positions", (frames, 3), name)
    quaternions = _numbers(features, "camera/quaternions", (frames, 4), name)
    focal, sensor = (
        _numbers(features, key, (1,), name)[0] for key in ("camera/focal_length", "camera/sensor_width")
    )
    if not (focal > 0 and sensor > 0 and high >= low >= 0 and np.linalg.norm(quaternions, axis=1).all()):
        raise VideoError(name, "a camera or a range of depths that cannot be")
    camera = Camera(positions, rotation_matrices(quaternions), float(focal / sensor * size[1]), *size)
    boxes = _numbers(features, "instances/bboxes_3d", (-1, frames, 8, 3), name)
    if segments.max() > len(boxes):
        raise VideoError(name, f"an instance {segments.max()} in the segmentation, boxes of {len(boxes)}")
    distances = low + depth.astype(np.float64) / 65535 * (high - low)
    return video, Rendered(camera, distances, segments, boxes, _normals(features, video.shape[:3], name))


def _byte_strings(feature: Feature, key: str, name: str) -> list[bytes]:
    if not isinstance(feature, list) or not feature:
        raise VideoError(name, f"feature {key} is no list of PNG files")
    return feature


def _numbers(
    features: dict[str, Feature], key: str, shape: tuple[int, ...], name: str
) -> Float[np.ndarray, "..."]:
    value = features[key]
    try:
        if isinstance(value, list) or value.dtype != np.float32:
            raise ValueError("no floats")
        array = value.reshape(shape).astype(np.float64)
    except ValueError:
        count = len(value)
        raise VideoError(
            name, f"feature {key} holds {count} values; expected floats of shape {shape}"
        ) from None
    if not np.isfinite(array).all():
        raise VideoError(name, f"feature {key} is not finite")
    return array


def _map(content: bytes, key: str, size: tuple[int, ...], name: str) -> Int[np.ndarray, "H W"]:
    """A PNG file of one channel of whole numbers."""
    images: Any = need("PIL.Image", "decoding frames")
    try:
        image = images.open(io.BytesIO(content), formats=("PNG",))
        if (image.height, image.width) != size or image.mode not in ("L", "I", "I;16", "I;16B", "P"):
            raise VideoError(
                name, f"a {key} of {image.width} x {image.height} pixels, mode {image.mode}; expected one "
                f"channel of {size[1]} x {size[0]}"
            )  # fmt: skip
        return np.asarray(image).astype(np.int64)
    except VideoError:
        raise
    except (OSError, ValueError, SyntaxError, images.DecompressionBombError) as error:
        raise VideoError(name, f"a damaged {key} ({error})") from error


def _normals(
    features: dict[str, Feature], shape: tuple[int, ...], name: str
) -> Float[np.ndarray, "T H W 3"] | None:
    if "normal" not in features:
        return None
    files = _byte_strings(features["normal"], "normal", name)
    # Pillow keeps the upper 8 of 16 bits: a hundredth, where the sign is asked for.
    decoded = np.stack(JpegClip(files, name, limits=Limits()).read(range(len(files))))
    if decoded.shape[:3] != shape:
        raise VideoError(name, f"normals of shape {decoded.shape[:3]} for frames {shape}")
    return decoded.astype(np.float32) / 127.5 - 1
