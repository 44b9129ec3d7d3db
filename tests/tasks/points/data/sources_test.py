"""Clips in files: the npz and PointOdyssey layouts, your own folder, prepared shards; and what opens them."""

import contextlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.common.video.decoding import Limits
from tasks.common.video.errors import VideoDataError, VideoError
from tasks.points.data import PointsDataConfig, open_points_data
from tasks.points.data.annotated import find_own
from tasks.points.data.assemble import hold_out, join
from tasks.points.data.clip_records import RecordClips, pack_clip, prepare_clips, unpack_clip
from tasks.points.data.clips import PointClip, check_clip
from tasks.points.data.npz_folder import find_npz, read_npz_clip
from tasks.points.data.point_odyssey import find_odyssey
from tests.tasks.points.data.point_clips import ListedClips, encode, moving_clip, write_npz, write_odyssey

FIELDS = ("video", "tracks_yx", "visible", "query_frames")


def assert_same(clip: PointClip, other: PointClip, *fields: str) -> None:
    for name in fields or FIELDS:
        assert np.array_equal(getattr(clip, name), getattr(other, name)), name


def config(source: str, path: Path, **options: Any) -> PointsDataConfig:
    given = {"frames": 4, "height": 24, "width": 32, "tracks": 5} | options
    return PointsDataConfig(source=source, path=str(path), **given)


# npz


def test_npz_clips_are_read_by_either_name(tmp_path: Path) -> None:
    clip = moving_clip()
    assert_same(read_npz_clip(write_npz(tmp_path / "a.npz", clip)), clip)
    other = write_npz(
        tmp_path / "b.npz", clip, tracks_yx=None, visible=None, query_frames=None,
        tracks_xy=clip.tracks_yx[..., ::-1].astype(np.float64), occluded=(~clip.visible).astype(np.uint8),
    )  # fmt: skip
    read = read_npz_clip(other)
    assert_same(read, clip, "video", "tracks_yx", "visible")
    assert set(read.query_frames) == {-1}


def test_unknown_hidden_places_are_put_outside(tmp_path: Path) -> None:
    clip = moving_clip()
    tracks = np.where(clip.visible[..., None], clip.tracks_yx, np.nan)
    read = check_clip(read_npz_clip(write_npz(tmp_path / "a.npz", clip, tracks_yx=tracks)), "a")
    assert np.all(read.tracks_yx[~clip.visible] < 0)
    tracks[0, 0] = np.nan  # where it is visible
    bad = read_npz_clip(write_npz(tmp_path / "b.npz", clip, tracks_yx=tracks))
    with pytest.raises(VideoError, match=r"point 0 at frame 0 is .*nan"):
        check_clip(bad, "b")


def test_what_is_wrong_with_an_npz_file_is_named(tmp_path: Path) -> None:
    clip = moving_clip()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tracks_yx": None}, "expected one of tracks_yx and tracks_xy"),
        ({"tracks_xy": clip.tracks_yx}, "expected one of tracks_yx and tracks_xy"),
        ({"visible": None}, "expected one of visible and occluded"),
        ({"video": None}, "its video is float64"),
        ({"video": clip.video[..., 0]}, r"expected uint8 \(frames, height, width, 3\)"),
        ({"video": clip.video.astype(np.float32)}, "its video is float32"),
        ({"tracks_yx": clip.tracks_yx[:, :3]}, r"expected numbers \(points, 6, 2\)"),
        ({"visible": clip.visible * 2}, r"its visibility is int64"),
        ({"visible": clip.visible.astype(float)}, r"its visibility is float64"),
        ({"query_frames": np.zeros(5)}, "expected whole numbers"),
        ({"video": np.array([{"a": 1}], object)}, "not a readable .npz file"),
    ]
    for changes, message in cases:
        path = write_npz(tmp_path / "x.npz", clip, **changes)
        with pytest.raises(VideoError, match=message):
            read_npz_clip(path)
    content = write_npz(tmp_path / "x.npz", clip).read_bytes()
    (tmp_path / "x.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(VideoError, match=r"not a readable \.npz file"):
        read_npz_clip(tmp_path / "x.npz")
    late = write_npz(tmp_path / "y.npz", clip, query_frames=np.full(5, 99))
    with pytest.raises(VideoError, match="query frames 99"):
        check_clip(read_npz_clip(late), "y")


def test_a_folder_of_npz_files(tmp_path: Path) -> None:
    for number in range(4):
        write_npz(tmp_path / "train" / f"deep{number % 2}" / f"{number}.npz", moving_clip(seed=number))
    write_npz(tmp_path / "validation" / "a.npz", moving_clip(seed=9))
    data = open_points_data(config("npz", tmp_path, frames=6))
    assert (len(data.train), len(data.held_out)) == (4, 1)
    assert np.array_equal(data.held_out[0]["video"], moving_clip(seed=9).video)
    batch = pickle.loads(pickle.dumps(data.batches(3)))[0]
    assert batch["tracks_yx"].shape == (3, 5, 6, 2)
    for folder, message in ((tmp_path / "no", "no such folder"), (tmp_path / "empty", r"no \.npz files")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(VideoDataError, match=message):
            find_npz(folder)


# PointOdyssey


def test_point_odyssey(tmp_path: Path) -> None:
    clip = moving_clip(frames=11, points=6)
    known = np.ones((6, 11), bool)
    known[2, 4] = False
    tracks = np.where(known[..., None], clip.tracks_yx, np.inf)
    write_odyssey(
        tmp_path / "train" / "scene", clip, valids=known.T, trajs_2d=tracks[..., ::-1].swapaxes(0, 1)
    )
    source = find_odyssey(tmp_path / "train", 4, 100)
    assert [source.name(i).rsplit("/", 1)[1] for i in range(len(source))] == ["scene[0:4]", "scene[4:8]"]
    second = check_clip(source.open(1), "x")
    assert second.video.shape == (4, 24, 32, 3)
    assert np.abs(second.video.astype(int) - clip.video[4:8]).mean() < 20  # JPEG of noise
    seen = clip.visible[:, 4:8] & known[:, 4:8]
    assert np.array_equal(second.visible, seen)
    assert np.array_equal(second.tracks_yx[seen], clip.tracks_yx[:, 4:8][seen])
    assert np.all(second.tracks_yx[2, 0] == (-24, -32))
    some = find_odyssey(tmp_path / "train", 4, 3).open(0)
    assert len(some.tracks_yx) == 3
    data = open_points_data(config("pointodyssey", tmp_path))
    assert data.batches(2)[0]["video"].shape == (2, 4, 24, 32, 3)
    assert data.held_out is None
    plain = write_odyssey(tmp_path / "plain" / "s", clip, valids=None)
    assert find_odyssey(plain.parent, 11, 100).open(0).visible.sum() == clip.visible.sum()


def test_what_is_wrong_with_a_sequence_is_named(tmp_path: Path) -> None:
    clip = moving_clip()
    for number, (changes, message) in enumerate(
        [
            ({"visibs": None}, "no visibs"),
            ({"trajs_2d": None}, "no trajs_2d"),
            ({"trajs_2d": np.zeros((6, 5, 3), np.float32)}, r"expected floats \(frames, points, 2\)"),
            ({"visibs": clip.visible.T[:, :3]}, r"visibs \(6, 3\)"),
            (
                dict.fromkeys(("visibs", "valids"), np.ones((7, 5)))
                | {"trajs_2d": np.zeros((7, 5, 2), np.float32)},
                "6 frames, tracks of 7",
            ),
            ({"visibs": np.zeros((6, 5), bool)}, "no point is visible in these frames"),
        ]
    ):  # fmt: skip
        folder = write_odyssey(tmp_path / str(number) / "s", clip, **changes).parent
        with pytest.raises(VideoError, match=message):
            find_odyssey(folder, 6, 10).open(0)
    with pytest.raises(VideoDataError, match="1 sequences, none of 7 frames or more"):
        find_odyssey(tmp_path / "0", 7, 10)
    with pytest.raises(VideoDataError, match="no sequences in it"):
        find_odyssey(tmp_path / "0" / "s" / "rgbs", 6, 10)
    with pytest.raises(VideoDataError, match="no such folder"):
        find_odyssey(tmp_path / "nowhere", 6, 10)
    bare = tmp_path / "bare" / "s"
    bare.mkdir(parents=True)
    np.savez(bare / "anno.npz", x=np.zeros(1))
    with pytest.raises(VideoDataError, match="without the folder rgbs"):
        find_odyssey(bare.parent, 6, 10)
    damaged = write_odyssey(tmp_path / "damaged" / "s", clip)
    (damaged / "rgbs" / "rgb_00003.jpg").write_bytes(b"no picture")
    with pytest.raises(VideoError, match="frame 3 of 6 is damaged"):
        find_odyssey(damaged.parent, 6, 10).open(0)


# Your own folder


def write_own(folder: Path, name: str, clip: PointClip, **arrays: Any) -> None:
    (folder / name).mkdir(parents=True)
    for number, frame in enumerate(clip.video):
        (folder / name / f"{number:03d}.png").write_bytes(encode(frame))
    tracks_xy = clip.tracks_yx[..., ::-1].astype(float).copy()
    tracks_xy[~clip.visible] = 3.0  # what was drawn for a hidden point means nothing
    given = {"tracks_xy": tracks_xy, "visible": clip.visible} | arrays
    np.savez(folder / f"{name}.npz", **{k: v for k, v in given.items() if v is not None})


def test_your_own_folder(tmp_path: Path) -> None:
    clip = moving_clip()
    write_own(tmp_path, "box", clip)
    read = check_clip(find_own(tmp_path, 6, 32).open(0), "x")
    assert np.array_equal(read.video, clip.video)
    assert np.array_equal(read.visible, clip.visible)
    assert np.allclose(read.tracks_yx[clip.visible], clip.tracks_yx[clip.visible], atol=1e-5)
    assert np.all(read.tracks_yx[~clip.visible] < 0)
    data = open_points_data(config("folder", tmp_path, held_out_fraction=0.0))
    assert data.train[0]["video"].shape == (4, 24, 32, 3)
    write_own(tmp_path, "cup", clip, visible=None)
    source = find_own(tmp_path, 6, 32)
    assert [Path(source.name(i)).name for i in range(2)] == ["box.npz", "cup.npz"]
    with pytest.raises(VideoError, match=r"cup\.npz: holds tracks_xy; expected tracks_xy and one of visible"):
        source.open(1)


def test_long_and_large_videos_are_read_in_parts_and_reduced(tmp_path: Path) -> None:
    clip = moving_clip(frames=19, height=80, width=100)
    write_own(tmp_path, "long", clip)
    source = find_own(tmp_path, 4, 20)  # parts of at most 8 frames, sides of at most 40 pixels
    assert [Path(source.name(i)).name for i in range(len(source))] == [
        "long.npz",
        "long.npz[1]",
        "long.npz[2]",
    ]
    parts = [check_clip(source.open(i), "x") for i in range(3)]
    assert [part.video.shape for part in parts] == [(6, 40, 50, 3), (7, 40, 50, 3), (6, 40, 50, 3)]
    assert np.array_equal(np.concatenate([part.visible for part in parts], axis=1), clip.visible)
    seen = parts[1].visible
    assert np.allclose(parts[1].tracks_yx[seen], clip.tracks_yx[:, 6:13][seen] / 2, atol=1e-4)
    with pytest.raises(VideoDataError, match="the only video"):
        open_points_data(config("folder", tmp_path))
    write_own(tmp_path, "other", moving_clip())
    data = open_points_data(config("folder", tmp_path))
    held = {Path(data.held_out_clips.name(i)).name for i in range(len(data.held_out_clips))}
    assert held == {"other.npz"}  # no part of a video is on both sides
    assert len(data.train_clips) == 3


# Prepared shards


@pytest.mark.parametrize("quality", [0, 95])
def test_records_hold_the_clip(quality: int) -> None:
    clip = moving_clip(points=7)
    read = unpack_clip(pack_clip(clip, quality), "x")
    assert_same(read, clip, "tracks_yx", "visible", "query_frames")
    if quality == 0:
        assert_same(read, clip)
    assert read.video.shape == clip.video.shape


def test_records_are_parsed_with_suspicion() -> None:
    record = pack_clip(moving_clip(frames=2, points=2), 0)
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(record[: rng.integers(len(record) + 1)])
        if broken:
            broken[rng.integers(len(broken))] = rng.integers(256)
        with contextlib.suppress(VideoError):  # and nothing else
            unpack_clip(bytes(broken), "x")
    huge = record[:4] + (2**32 - 1).to_bytes(4, "little") * 2 + record[12:]
    for bad in (b"", record[:-1], record + b"x", b"XXXX" + record[4:], huge):
        with pytest.raises(VideoError, match=r"^x: "):
            unpack_clip(bad, "x")
    with pytest.raises(VideoError, match="the limit is 20"):
        unpack_clip(record, "x", Limits(pixels=20))


def test_prepared_clips_are_the_clips_and_bad_ones_are_named(tmp_path: Path) -> None:
    clips = ListedClips((moving_clip(seed=1), None, moving_clip(seed=2, points=3), moving_clip(seed=3)))
    far = replace(clips.clips[3], tracks_yx=clips.clips[3].tracks_yx + 100)
    clips = ListedClips((*clips.clips[:3], far))
    manifest = prepare_clips(clips, tmp_path, quality=0, per_shard=2, workers=1)
    assert (manifest["videos"], manifest["frames"], len(manifest["shards"])) == (2, 12, 2)
    assert [s["name"] for s in manifest["skipped"]] == ["clip 1", "clip 3"]
    assert "is broken" in manifest["skipped"][0]["reason"]
    assert "outside the frame" in manifest["skipped"][1]["reason"]
    stored = pickle.loads(pickle.dumps(RecordClips(tmp_path)))
    assert [stored.name(i) for i in range(len(stored))] == ["clip 0", "clip 2"]
    assert_same(stored.open(0), clips.clips[0])
    assert_same(stored.open(1), clips.clips[2])
    stored.verify()
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("shard-*")}
    assert prepare_clips(clips, tmp_path, quality=0, per_shard=2, workers=1) == manifest
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("shard-*")} == before
    with pytest.raises(VideoError, match="is broken"):
        prepare_clips(clips, tmp_path / "y", on_error="fail", workers=1)
    with pytest.raises(VideoDataError, match=r"no video could be read \(clip 0: is broken"):
        prepare_clips(ListedClips((None,)), tmp_path / "z", workers=1)
    for options, message in (
        ({"quality": 101}, "quality"),
        ({"per_shard": 0}, "per_shard"),
        ({"on_error": "x"}, "on_error"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_clips(clips, tmp_path / "w", **options)


def test_records_as_a_source_alone_and_mixed(tmp_path: Path) -> None:
    for folder, seeds in (("a/train", (1, 2, 3)), ("a/validation", (4,)), ("b", (5, 6))):
        prepare_clips(
            ListedClips(tuple(moving_clip(seed=s) for s in seeds)), tmp_path / folder, quality=0, workers=1
        )
    alone = open_points_data(config("records", tmp_path / "a", frames=6))
    assert (len(alone.train), len(alone.held_out)) == (3, 1)
    assert np.array_equal(alone.held_out[0]["video"], moving_clip(seed=4).video)
    both = open_points_data(config("records", Path(f"{tmp_path}/a, {tmp_path}/b"), frames=6))
    assert (len(both.train), len(both.held_out)) == (4, 2)
    seen = {int(both.train_clips.open(i).video.sum()) for i in range(4)}
    assert seen == {int(moving_clip(seed=s).video.sum()) for s in (1, 2, 3, 5)}
    with pytest.raises(VideoDataError, match="not a folder of shards; make one by `python -m"):
        open_points_data(config("records", tmp_path))
    content = json.loads((tmp_path / "b" / "manifest.json").read_text())
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(content | {"format": "foxtrot-video-shards"}))
    with pytest.raises(VideoDataError, match="not a manifest of foxtrot-point-clips version 1"):
        RecordClips(tmp_path / "b")


def test_a_part_is_held_out_evenly() -> None:
    clips = ListedClips(tuple(moving_clip(seed=s) for s in range(10)))
    train, held_out = hold_out(clips, 0.2)
    assert [held_out.name(i) for i in range(len(held_out))] == ["clip 4", "clip 9"]
    assert len(train) == 8
    assert hold_out(clips, 0.0) == (clips, None)
    assert len(hold_out(clips, 0.01)[1]) == 1  # at least one
    with pytest.raises(VideoDataError, match="clip 0: the only video"):
        hold_out(ListedClips((moving_clip(),)), 0.5)
    joined = join([clips, train])
    assert (len(joined), joined.name(9), joined.name(10)) == (18, "clip 9", "clip 0")
    assert joined.key(10) == clips.key(0)
    with pytest.raises(IndexError, match="clip 18 of 18"):
        joined.name(18)


# Generated


def test_generated_clips_as_a_source(tmp_path: Path) -> None:
    small = PointsDataConfig(
        frames=4, stride=2, height=24, width=32, tracks=6, generated_held_out=3, generated_most=3,
        cache_dir=str(tmp_path),
    )  # fmt: skip
    data = open_points_data(small, seed=1)
    assert (len(data.train), len(data.held_out)) == (1_000_000, 3)
    batch = data.batches(2)[5]
    assert {k: v.shape for k, v in batch.items()} == {
        "video": (2, 4, 24, 32, 3), "query_tyx": (2, 6, 3), "tracks_yx": (2, 6, 4, 2), "visible": (2, 6, 4),
        "valid": (2, 6),
    }  # fmt: skip
    assert not list(tmp_path.iterdir())
    cached = open_points_data(replace(small, generated_cached=3))
    assert len(cached.train) == 3
    (folder,) = tmp_path.iterdir()
    stamps = {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*")}
    assert stamps
    open_points_data(replace(small, generated_cached=3))
    assert {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*")} == stamps
    first, again = cached.train[0], cached.train[0]
    assert all(np.array_equal(first[k], again[k]) for k in first)
    repeated = open_points_data(replace(small, repeats=2), seed=1)
    rows = repeated.batches(4)[0]
    same = [np.array_equal(rows["video"][0], rows["video"][i]) for i in range(4)]
    assert same == [True, True, False, False]
    assert not np.array_equal(rows["tracks_yx"][0], rows["tracks_yx"][1])
    assert all(np.array_equal(data.held_out[0][k], repeated.held_out[0][k]) for k in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "kubric"}, "data.source must be one of"),
        ({"source": "npz"}, "needs data.path"),
        ({"path": "x"}, "data.path has no meaning"),
        ({"held_out_fraction": 1.0}, "data.held_out_fraction"),
        ({"frames": 0}, "data.frames must be at least 1"),
        ({"generated_most": 1}, "need 0 <= fewest <= most"),
        ({"augment_roll": 2.0}, "augment.roll"),
        ({"generated_cached": -1}, "data.generated_cached"),
        ({"repeats": 0}, "data.repeats must be at least 1, got 0"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointsDataConfig(**options)
