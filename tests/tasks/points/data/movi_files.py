"""MOVi's TFRecords as TFDS writes them, of a small scene whose truth is known: a box that falls and turns
over a floor, seen by a moving camera, cast ray by ray."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.points.data.projection import Camera, rotation_matrices
from tasks.points.data.tfrecord import masked_crc32c
from tests.tasks.points.data.point_clips import encode

HALF = np.array([0.8, 0.6, 0.5])  # of the box's sides
FOCAL, SENSOR = 35.0, 32.0
CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * HALF


class BoxScene:
    """A box over the floor z = 0, at every frame."""

    def __init__(self, frames: int = 6, size: int = 40):
        self.frames, self.size = frames, size
        t = np.arange(frames) / max(frames - 1, 1)
        eye = np.stack([6 - 1.5 * t, -3 + 2 * t, 4 + 0 * t], axis=-1)
        back = eye / np.linalg.norm(eye, axis=-1, keepdims=True)  # it looks at the origin
        right = np.cross([0, 0, 1.0], back)
        right /= np.linalg.norm(right, axis=-1, keepdims=True)
        turns = np.stack([right, np.cross(back, right), back], axis=-1)
        self.camera_positions, self.camera_quaternions = eye, np.stack([quaternion(turn) for turn in turns])
        self.camera = Camera(
            eye, rotation_matrices(self.camera_quaternions), FOCAL / SENSOR * size, size, size
        )
        angle = 3.0 * t
        self.quaternions = np.stack(
            [np.cos(angle / 2), 0.6 * np.sin(angle / 2), 0 * t, 0.8 * np.sin(angle / 2)], axis=-1
        )
        self.positions = np.stack([-0.5 + 1.2 * t, 0.3 - 0.8 * t, 2.0 - 0.8 * t], axis=-1)
        self.rotations = rotation_matrices(self.quaternions)
        self.boxes = self.positions[:, None] + np.einsum("tij,nj->tni", self.rotations, CORNERS)

    def cast(self, t: int, yx: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What lies behind places of a frame: (distance, 0 floor or 1 box, place in its own axes, normal)."""
        origin = self.camera.positions[t]
        rays = self.camera.rays(yx) @ self.camera.rotations[t].T
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
        floor = np.where(rays[:, 2] < -1e-6, -origin[2] / np.minimum(rays[:, 2], -1e-6), 60.0)
        local_origin = (origin - self.positions[t]) @ self.rotations[t]
        local = rays @ self.rotations[t]
        near, far = (-HALF - local_origin) / local, (HALF - local_origin) / local
        low, high = np.minimum(near, far), np.maximum(near, far)
        enter, leave = low.max(axis=-1), high.min(axis=-1)
        hit = (enter < leave) & (enter > 0) & (enter < floor)
        distance = np.where(hit, enter, floor)
        own = np.where(
            hit[:, None], local_origin + local * distance[:, None], origin + rays * distance[:, None]
        )
        side = low.argmax(axis=-1)
        faces = np.zeros_like(local)
        faces[np.arange(len(side)), side] = -np.sign(local[np.arange(len(side)), side])
        normals = np.where(hit[:, None], faces @ self.rotations[t].T, [0, 0, 1.0])
        return distance, hit.astype(np.int64), own, normals

    def world(self, t: int, thing: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Places in a thing's own axes, in the world at time t."""
        moved = self.positions[t] + own @ self.rotations[t].T
        return np.where((thing == 1)[:, None], moved, own)

    def pictures(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(video uint8, distances, segments, normals) of all frames."""
        rows, columns = np.meshgrid(np.arange(self.size) + 0.5, np.arange(self.size) + 0.5, indexing="ij")
        yx = np.stack([rows.ravel(), columns.ravel()], axis=-1)
        cast = [self.cast(t, yx) for t in range(self.frames)]
        shape = (self.frames, self.size, self.size)
        distances, segments = (np.stack([c[i] for c in cast]).reshape(shape) for i in (0, 1))
        own, normals = (np.stack([c[i] for c in cast]).reshape(*shape, 3) for i in (2, 3))
        colours = 128 + 100 * np.sin(own * (3, 4, 5) + segments[..., None])
        return colours.astype(np.uint8), distances, segments, normals


def quaternion(turn: np.ndarray) -> np.ndarray:
    """(w, x, y, z) of a rotation."""
    w = np.sqrt(max(1 + np.trace(turn), 1e-12)) / 2
    x, y, z = (turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]) / (4 * w)
    return np.array([w, x, y, z])


# Protocol buffers


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def message(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(value: Sequence[bytes] | np.ndarray) -> bytes:
    """A tf.train.Feature of byte strings, floats or whole numbers."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return message(2, message(1, value.astype("<f4").tobytes()))
    if isinstance(value, np.ndarray):
        return message(3, message(1, b"".join(varint(int(v)) for v in value.ravel())))
    return message(1, b"".join(message(1, content) for content in value))


def example(features: Mapping[str, Any]) -> bytes:
    """A tf.train.Example."""
    entries = (message(1, message(1, k.encode()) + message(2, feature(v))) for k, v in features.items())
    return message(1, b"".join(entries))


def frame_record(content: bytes) -> bytes:
    """A record of a TFRecord file."""
    length = struct.pack("<Q", len(content))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
    return length + next(checksums) + content + next(checksums)


def movi_features(scene: BoxScene, normals: bool = True) -> dict[str, Any]:
    """The features of a scene, and some that nobody asks for."""
    video, distances, segments, facing = scene.pictures()
    low, high = distances.min(), distances.max()
    depth = np.round((distances - low) / (high - low) * 65535).astype(np.uint16)
    features = {
        "video": [encode(frame) for frame in video],
        "segmentations": [encode(frame.astype(np.uint8)) for frame in segments],
        "depth": [encode(frame) for frame in depth],
        "forward_flow": [b"\0" * 1000] * scene.frames,
        "metadata/depth_range": np.array([low, high], np.float32),
        "metadata/video_name": [b"0"],
        "metadata/num_frames": np.array([scene.frames]),
        "camera/positions": scene.camera_positions.astype(np.float32).ravel(),
        "camera/quaternions": scene.camera_quaternions.astype(np.float32).ravel(),
        "camera/focal_length": np.array([FOCAL], np.float32),
        "camera/sensor_width": np.array([SENSOR], np.float32),
        "camera/field_of_view": np.array([0.85], np.float32),
        "instances/bboxes_3d": scene.boxes.astype(np.float32).ravel(),
        "instances/bbox_frames/ragged_flat_values": np.arange(scene.frames),
        "events/collisions/force": np.zeros(0, np.float32),
    }
    if normals:
        features["normal"] = [encode(((frame + 1) * 127.5).round().astype(np.uint8)) for frame in facing]
    return features


def write_movi(folder: Path, examples: Mapping[str, int], **options: Any) -> Path:
    """A prepared MOVi-E of so many examples of every split, two of a file. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = frame_record(example(movi_features(BoxScene(**options))))
    for split, count in examples.items():
        files = -(-count // 2)
        for number in range(files):
            path = folder / f"movi_e-{split}.tfrecord-{number:05d}-of-{files:05d}"
            path.write_bytes(content * min(2, count - 2 * number))
    return folder
