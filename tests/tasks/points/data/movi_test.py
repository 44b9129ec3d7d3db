"""MOVi's TFRecords: checksums, messages, and tracks against a scene that is cast ray by ray."""

import contextlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.common.video.errors import VideoDataError, VideoError
from tasks.points.data import PointsDataConfig, check_clip, movi_tracks, open_points_data
from tasks.points.data.__main__ import main
from tasks.points.data.clips import inside
from tasks.points.data.movi import MoviClips, find_movi, read_scene
from tasks.points.data.movi_tracks import Rendered, sample_points, track_points
from tasks.points.data.projection import Camera, neighbours, rotation_matrices
from tasks.points.data.tf_example import ExampleError, parse_example
from tasks.points.data.tfrecord import crc32c, find_records, read_record
from tests.tasks.points.data.movi_files import (
    BoxScene,
    example,
    frame_record,
    message,
    movi_features,
    varint,
    write_movi,
)


def test_checksums() -> None:
    """The published check value; and many lengths against the definition, bit by bit."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0
    assert crc32c(bytes(32)) == 0x8A9136AA

    def slow(content: bytes) -> int:
        state = 0xFFFFFFFF
        for byte in content:
            state ^= byte
            for _ in range(8):
                state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
        return state ^ 0xFFFFFFFF

    content = np.random.default_rng(0).bytes(40_000)
    for length in (1, 63, 4095, 4096, 4097, 8192, 20_001, 40_000):
        assert crc32c(content[:length]) == slow(content[:length]), length


def test_records(tmp_path: Path) -> None:
    path = tmp_path / "x-train.tfrecord-00000-of-00001"
    contents = [b"", b"abc", bytes(range(256)) * 50]
    path.write_bytes(b"".join(map(frame_record, contents)))
    places = find_records(path)
    assert [read_record(path, *place) for place in places] == contents
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[places[2][0] + 77] ^= 4
    path.write_bytes(damaged)
    assert find_records(path) == places
    with pytest.raises(VideoError, match=r"damaged record at byte \d+ \(checksum differs\)"):
        read_record(path, *places[2])
    path.write_bytes(whole[:-3])
    with pytest.raises(VideoError, match="cut off in record 2"):
        find_records(path)
    with pytest.raises(VideoError, match="cut off in the record"):
        read_record(path, *places[2])
    path.write_bytes(b"something else entirely")
    with pytest.raises(VideoError, match="not a TFRecord file, or damaged at byte 0"):
        find_records(path)
    path.write_bytes(whole + b"abc")
    with pytest.raises(VideoError, match="cut off at byte"):
        find_records(path)


def test_messages() -> None:
    features: dict[str, Any] = {
        "text": [b"one", b"", b"three"],
        "floats": np.array([1.5, -2.0, 3e30], np.float32),
        "whole": np.array([0, 1, 300, -1, 2**40]),
        "none": np.zeros(0, np.float32),
    }
    content = example(features)
    found = parse_example(content, ("text", "floats", "whole", "none", "absent"))
    assert found.keys() == features.keys()
    assert found["text"] == features["text"]
    for name in ("floats", "whole", "none"):
        assert np.array_equal(found[name], features[name])
    assert found["whole"].dtype == np.int64
    assert parse_example(content, ("floats",)).keys() == {"floats"}
    assert parse_example(b"", ("text",)) == {}
    # Unpacked numbers, and fields that nobody knows.
    unpacked = varint(1 << 3 | 5) + np.array([2.5], "<f4").tobytes()
    entry = message(1, b"f") + message(2, message(2, unpacked * 2 + varint(9 << 3) + varint(77)))
    assert parse_example(message(1, message(1, entry)), ("f",))["f"].tolist() == [2.5, 2.5]


def test_messages_are_parsed_with_suspicion() -> None:
    content = example({"a": [b"xyz"], "b": np.arange(3), "c": np.ones(2, np.float32)})
    rng = np.random.default_rng(0)
    for _ in range(500):
        broken = bytearray(content[: rng.integers(len(content) + 1)])
        if broken:
            broken[rng.integers(len(broken))] = rng.integers(256)
        with contextlib.suppress(ExampleError):  # and nothing else
            parse_example(bytes(broken), ("a", "b", "c"))
    for bad, reason in (
        (b"\x0a\xff\x01ab", "a field of 255 bytes"),
        (b"\xff" * 12, "more than 10 bytes"),
        (b"\x0b", "wire type 3"),
        (b"\x80", "cut off in a number"),
        (message(1, message(1, message(1, b"\xff\xfe"))), "not UTF-8"),
    ):
        with pytest.raises(ExampleError, match=reason):
            parse_example(bad, ("a",))


def test_the_camera() -> None:
    """Projecting and back; what is on the axis is in the middle, what is right and above is there too."""
    rng = np.random.default_rng(0)
    rotations = rotation_matrices(rng.standard_normal((3, 4)))
    assert np.allclose(np.einsum("tij,tkj->tik", rotations, rotations), np.eye(3))
    assert np.allclose(
        rotation_matrices(np.array([np.cos(0.3), 0, 0, np.sin(0.3)]))[:2, 0], [np.cos(0.6), np.sin(0.6)]
    )
    camera = Camera(rng.standard_normal((3, 3)), rotations, 50.0, 40, 60)
    yx, times, depth = rng.uniform(0, 40, (30, 2)), rng.integers(0, 3, 30), rng.uniform(1, 9, 30)
    points = camera.unproject(yx, times, depth)
    places, depths = camera.project(np.repeat(points[:, None], 3, axis=1))
    rows = np.arange(30)
    assert np.allclose(places[rows, times], yx)
    assert np.allclose(depths[rows, times], depth)
    distance = np.linalg.norm(points - camera.positions[times], axis=-1)
    assert np.allclose(distance * camera.depth_of_distance(yx), depth)
    plain = Camera(np.zeros((1, 3)), np.eye(3)[None], 50.0, 40, 60)
    places, depths = plain.project(np.array([[[0, 0, -2.0]], [[0.2, 0.4, -2.0]], [[0, 0, 3.0]]]))
    assert np.allclose(places[:2, 0], [[20, 30], [10, 35]])
    assert depths[:, 0].tolist() == [2, 2, -3]


def test_neighbours() -> None:
    maps = np.arange(24).reshape(2, 3, 4)
    places = np.array([[[1.2, 2.6], [0.0, 0.0]], [[2.9, 3.9], [1.5, 1.5]]])
    found = neighbours(maps, places)
    assert sorted(found[:, 0, 0].tolist()) == [2, 3, 6, 7]
    assert set(found[:, 0, 1].tolist()) == {12}
    assert set(found[:, 1, 0].tolist()) == {11}
    assert sorted(found[:, 1, 1].tolist()) == [17, 18, 21, 22]


@pytest.fixture(scope="module")
def scene() -> BoxScene:
    return BoxScene(frames=6, size=48)


def rendered(scene: BoxScene, normals: bool = True) -> Rendered:
    _, distances, segments, facing = scene.pictures()
    return Rendered(scene.camera, distances, segments, scene.boxes[None], facing if normals else None)


@pytest.mark.parametrize("normals", [True, False])
def test_tracks_are_those_of_the_scene(scene: BoxScene, normals: bool) -> None:
    query_tyx, things = sample_points(np.random.default_rng(0), rendered(scene, normals), 300)
    tracks, visible = track_points(rendered(scene, normals), query_tyx, things)
    assert set(things) == {0, 1}
    at = query_tyx[:, 0].astype(int)
    wrong = right = 0
    for t in range(scene.frames):
        for point in range(len(things)):
            _, thing, own, _ = scene.cast(at[point], query_tyx[point : point + 1, 1:])
            assert thing[0] == things[point]
            world = scene.world(t, thing, own)
            place, _ = scene.camera.project(np.repeat(world[:, None], scene.frames, axis=1))
            assert np.abs(place[0, t] - tracks[point, t]).max() < 1e-3
            if not (np.all(place[0, t] >= 0.5) and np.all(place[0, t] < scene.size - 0.5)):
                continue
            # What is seen at that place: is it the point, or something before it?
            seen, _, _, _ = scene.cast(t, place[:, t])
            hidden = seen[0] < 0.99 * np.linalg.norm(world[0] - scene.camera.positions[t])
            wrong += visible[point, t] == hidden
            right += visible[point, t] != hidden
    assert right > 700
    # Within a pixel of an edge, four pixels say less than one ray.
    assert wrong / (wrong + right) < 0.03
    assert 0.4 < visible.mean() < 0.95
    assert visible[np.arange(len(at)), at].all()


def test_surfaces_that_are_turned_away_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their normals alone: depth and segments say nothing here."""
    for name in ("hidden_by_depth", "hidden_by_segment"):
        monkeypatch.setattr(movi_tracks, name, lambda maps, yx, own: np.zeros(yx.shape[:2], bool))
    scene = BoxScene(frames=9, size=72)
    known = rendered(scene)
    query_tyx, things = sample_points(np.random.default_rng(0), known, 1000)
    tracks, visible = track_points(known, query_tyx, things)
    at, turned, shown = query_tyx[:, 0].astype(int), 0, inside(tracks, 72, 72)
    for point in np.flatnonzero(things == 1):
        _, _, own, normal = scene.cast(at[point], query_tyx[point : point + 1, 1:])
        local = normal @ scene.rotations[at[point]]
        row, column = np.floor(query_tyx[point, 1:]).astype(int)
        around = known.normals[at[point], row - 1 : row + 2, column - 1 : column + 2].reshape(-1, 3)
        if np.ptp(around, axis=0).max() > 1e-6:
            continue  # at an edge of the box, no normal is sure
        for t in range(scene.frames):
            sight = scene.camera.positions[t] - scene.world(t, np.ones(1), own)[0]
            away = (local @ scene.rotations[t].T)[0] @ sight < 0
            turned += away
            assert visible[point, t] == (shown[point, t] and not away)
    assert turned > 10


def test_the_grid_has_every_fourth_pixel_and_frame() -> None:
    known = rendered(BoxScene(frames=9, size=32))
    query_tyx, things = sample_points(np.random.default_rng(1), known, 10_000)
    assert len(query_tyx) == len(things)
    steps = [np.unique(np.mod(np.floor(query_tyx[:, axis]), 4)) for axis in range(3)]
    assert [len(s) for s in steps] == [1, 1, 1]
    assert np.allclose(query_tyx[:, 1:] % 1, 0.5)
    assert len(np.unique(query_tyx, axis=0)) == len(query_tyx)


def test_examples_are_read_from_records(tmp_path: Path, scene: BoxScene) -> None:
    folder = write_movi(
        tmp_path / "movi_e" / "256x256" / "1.0.0", {"train": 3, "validation": 1}, frames=6, size=48
    )
    (folder / "features.json").write_text("{}")
    found = find_movi(tmp_path, 60)
    assert {split: len(clips) for split, clips in found.items()} == {"train": 3, "validation": 1}
    clips = pickle.loads(pickle.dumps(found["train"]))
    clip = check_clip(clips.open(0), "x")
    assert np.array_equal(clip.video, scene.pictures()[0])
    assert clip.tracks_yx.shape == (60, 6, 2)
    for point in range(60):
        t = clip.query_frames[point]
        _, thing, own, _ = scene.cast(t, clip.tracks_yx[point : point + 1, t].astype(float))
        for other in range(6):
            world = scene.world(other, thing, own)
            place, _ = scene.camera.project(np.repeat(world[:, None], 6, axis=1))
            # 16 bits of depth and float32 boxes: thousandths of a pixel.
            assert np.abs(place[0, other] - clip.tracks_yx[point, other]).max() < 0.01
    assert not np.array_equal(clips.open(1).tracks_yx, clip.tracks_yx)
    again = clips.open(0)
    assert np.array_equal(again.tracks_yx, clip.tracks_yx)


def test_convert_movi_and_train_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_movi(tmp_path / "movi_f", {"train": 3, "validation": 1, "test": 1}, frames=4, size=32)
    damaged = bytearray((source / "movi_e-train.tfrecord-00000-of-00002").read_bytes())
    damaged[500] ^= 1
    (source / "movi_e-train.tfrecord-00000-of-00002").write_bytes(damaged)
    out = tmp_path / "records"
    arguments = ["convert-movi", f"--path={source}", f"--output={out}", "--points=40", "--workers=1"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "train: 2 clips, 8 frames, 80 points" in printed
    assert "validation: 1 clips" in printed
    assert "left out: 1" in printed
    assert "checksum differs" in printed
    data = open_points_data(
        PointsDataConfig(source="records", path=str(out), frames=4, height=32, width=32, tracks=16)
    )
    assert data.batches(2)[0]["tracks_yx"].shape == (2, 16, 4, 2)
    assert data.held_out[0]["valid"].all()


def test_what_is_wrong_with_an_example_is_named(tmp_path: Path) -> None:
    features = movi_features(BoxScene(frames=3, size=16), normals=False)
    video, known = read_scene(features, "x")
    assert video.shape == (3, 16, 16, 3)
    assert known.normals is None
    cases: list[tuple[dict[str, Any], str]] = [
        ({"depth": None}, "no feature depth: not an example of MOVi"),
        (
            {"depth": features["depth"][:2]},
            "unequal numbers of frames: 3 of video, 3 of segmentations, 2 of depth",
        ),
        ({"video": np.zeros(3, np.float32)}, "feature video is no list of PNG files"),
        ({"depth": [b"no picture"] * 3}, "a damaged depth"),
        ({"segmentations": features["video"]}, "mode RGB; expected one channel of 16 x 16"),
        ({"camera/positions": np.zeros(8, np.float32)}, r"holds 8 values; expected floats of shape \(3, 3\)"),
        ({"camera/positions": np.arange(9)}, "expected floats"),
        ({"camera/positions": np.full(9, np.nan, np.float32)}, "camera/positions is not finite"),
        ({"camera/quaternions": np.zeros(12, np.float32)}, "a camera or a range of depths that cannot be"),
        ({"instances/bboxes_3d": np.zeros(0, np.float32)}, "an instance 1 in the segmentation, boxes of 0"),
        ({"normal": features["video"][:2]}, "normals of shape"),
    ]
    for changes, reason in cases:
        changed = {k: v for k, v in (features | changes).items() if v is not None}
        with pytest.raises(VideoError, match=f"^x: .*{reason}"):
            read_scene(changed, "x")
    for path, content, reason in (
        ("a-train.tfrecord-0", frame_record(b"\xff" * 20), "not a tf.train.Example"),
        ("b-train.tfrecord-0", frame_record(example({"video": [b""]})), "no feature segmentations, depth"),
    ):
        file = tmp_path / path
        file.write_bytes(content)
        clips = MoviClips(tuple((str(file), *place) for place in find_records(file)), 5)
        with pytest.raises(VideoError, match=reason):
            clips.open(0)
        file.unlink()
    for folder, reason in (
        (tmp_path / "none", "no such folder"),
        (tmp_path, r"no files called \.\.\.-train"),
    ):
        with pytest.raises(VideoDataError, match=reason):
            find_movi(folder)
    with pytest.raises(ValueError, match="points = 0"):
        MoviClips((), 0)
