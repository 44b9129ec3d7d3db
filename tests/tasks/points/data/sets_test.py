"""The evaluation sets in their official layouts: what is read, in bounded memory, and what is refused."""

import os
import pickle
import tracemalloc

import numpy as np
import pytest

from tasks.points.data.sets import open_set
from tasks.points.data.tapvid_csv import read_tapvid_csv
from tasks.points.data.tracked_video import PointDataError, checked_tracks
from tests.tasks.common.video.video_files import number_of, numbered_frames, write_video
from tests.tasks.points.annotated_videos import (
    HEIGHT,
    WIDTH,
    annotated,
    write_davis,
    write_kinetics,
    write_own,
    write_pickle,
    write_rgb_stacking,
    write_robotap,
)

CLIPS = [annotated(seed, frames=6 + seed, dtype="float64" if seed % 2 else "float32") for seed in range(4)]
JPEG_ERROR = 3.0  # mean grey levels, quality 95


def assert_is(video, clip, tolerance: float = 0.0) -> None:
    np.testing.assert_array_equal(video.tracks_xy, clip.points.astype(np.float64))
    np.testing.assert_array_equal(video.occluded, clip.occluded)
    frames = np.stack(list(video.frames())).astype(float)
    assert frames.shape == clip.video.shape
    assert np.abs(frames - clip.video).mean() <= tolerance


@pytest.mark.parametrize("protocol", range(6))
def test_davis(tmp_path, protocol):
    """A dict; a folder that holds the pickle does as well."""
    path = write_davis(tmp_path / "tapvid_davis" / "tapvid_davis.pkl", CLIPS, protocol)
    for where in (path, path.parent):
        found = open_set("davis", where)
        assert [video.name for video in found.videos] == [clip.name for clip in CLIPS]
        for video, clip in zip(found.videos, CLIPS, strict=True):
            assert_is(video, clip)


def test_rgb_stacking(tmp_path):
    found = open_set("rgb_stacking", write_rgb_stacking(tmp_path / "tapvid_rgb_stacking.pkl", CLIPS))
    assert [video.name for video in found.videos] == [f"tapvid_rgb_stacking/{i:04d}" for i in range(4)]
    for video, clip in zip(found.videos, CLIPS, strict=True):
        assert_is(video, clip)


@pytest.mark.parametrize("jpeg", ["array", "list"])
def test_kinetics_shards(tmp_path, jpeg):
    found = open_set("kinetics", write_kinetics(tmp_path / "shards", CLIPS, jpeg=jpeg))
    assert [video.name for video in found.videos] == [
        "0000_of_0002/0000", "0000_of_0002/0001", "0001_of_0002/0000", "0001_of_0002/0001",
    ]  # fmt: skip
    for video, index in zip(found.videos, (0, 2, 1, 3), strict=True):
        assert_is(video, CLIPS[index], JPEG_ERROR)


def test_robotap(tmp_path):
    found = open_set("robotap", write_robotap(tmp_path / "robotap", CLIPS))
    assert [video.name for video in found.videos] == ["clip0", "clip2", "clip1", "clip3"]
    assert_is(found.videos[1], CLIPS[2])
    assert len(found.files) == 2


def test_annotations_cannot_be_scaled_in_place(tmp_path):
    """The official Kinetics reader multiplies the stored points; reading twice would scale twice."""
    path = write_davis(tmp_path / "x.pkl", CLIPS[:1])
    video = open_set("davis", path).videos[0]
    with pytest.raises(ValueError, match="read-only"):
        video.tracks_xy *= 256
    with pytest.raises(ValueError, match="read-only"):
        next(video.frames())[:] = 0
    assert_is(open_set("davis", path).videos[0], CLIPS[0])


def test_an_incomplete_set_of_shards_is_refused(tmp_path):
    folder = write_kinetics(tmp_path / "shards", CLIPS, shards=4)
    (folder / "0002_of_0004.pkl").unlink()
    with pytest.raises(PointDataError, match=r"shards 2 of 4 are missing \(counted from 0\); give one file"):
        open_set("kinetics", folder)
    assert len(open_set("kinetics", folder / "0001_of_0004.pkl").videos) == 1


def test_frames_stay_on_disk(tmp_path):
    """Opening a set, and reading one video of it, takes the memory of a few frames."""
    big = annotated(0, frames=2)
    video = np.zeros((120, 256, 256, 3), np.uint8)  # 24 MB
    entry = {
        "video": video,
        "points": np.repeat(big.points[:, :1], 120, 1),
        "occluded": np.zeros((6, 120), bool),
    }
    path = write_pickle(tmp_path / "x.pkl", {f"v{i}": entry for i in range(3)})
    tracemalloc.start()
    try:
        for frame in open_set("davis", path).videos[2].frames():
            assert frame.shape == (256, 256, 3)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def changed(**changes):
    return {"clip": CLIPS[0].entry() | changes}


NAN = CLIPS[0].points.copy()
NAN[2, 0] = np.nan


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(points=NAN), r"video clip: track 2 is visible at frame 0, but its place is \[nan, nan\]"),
        (
            changed(points=CLIPS[0].points * 256),
            r"100% of the visible points lie outside the frame, up to .*; \(x, y\) in shares",
        ),
        (
            changed(points=CLIPS[0].points[:, :-1]),
            r"visibility is an array \(6, 6\) of bool; an array \(6, 5\)",
        ),
        (
            changed(points=CLIPS[0].points[..., 0]),
            r"points are an array \(6, 6\) of float32; an array \[tracks, fr",
        ),
        (changed(points=[1, 2]), "points are list"),
        (changed(occluded=CLIPS[0].occluded * 2.5), "visibility holds other values than 0 and 1"),
        (changed(occluded=None), "visibility is missing"),
        (changed(video=CLIPS[0].video[:-1]), "the video has 5 frames, its tracks 6"),
        (
            changed(video=CLIPS[0].video[..., :1]),
            r"its video is uint8 \(6, 48, 64, 1\); uint8 \[T, H, W, 3\]",
        ),
        (changed(video=CLIPS[0].video.astype(np.float32)), "its video is float32"),
        (changed(video=["a"] * 6), "its video is list"),
        (changed(video=np.zeros((6, 0, 64, 3), np.uint8)), "nothing in it"),
        ({"clip": {"video": 1}}, r"video clip has keys \['video'\]; a dict with video, points, occluded"),
        ({"clip": 3}, "video clip is int"),
        ([], "no videos in it"),
        (7, "holds int; a dict or list of videos was expected"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_what_is_wrong_is_named(tmp_path, content, message):
    path = write_pickle(tmp_path / "x.pkl", content)
    with pytest.raises(PointDataError, match=message) as error:
        open_set("davis", path)
    assert "x.pkl" in str(error.value)


def test_one_video_alone_is_read(tmp_path):
    path = write_pickle(tmp_path / "alone.pkl", CLIPS[0].entry())
    assert_is(open_set("davis", path).videos[0], CLIPS[0])


def test_hidden_points_may_be_unknown(tmp_path):
    points = np.where(CLIPS[0].occluded[..., None], np.nan, CLIPS[0].points)
    video = open_set("davis", write_pickle(tmp_path / "x.pkl", changed(points=points))).videos[0]
    assert np.isfinite(video.tracks_xy).all()
    shown = ~CLIPS[0].occluded
    np.testing.assert_array_equal(video.tracks_xy[shown], CLIPS[0].points[shown].astype(np.float64))


def test_a_damaged_frame_is_named(tmp_path):
    entry = CLIPS[0].entry(jpeg="list")
    entry["video"][3] = entry["video"][3][:40]
    video = open_set("kinetics", write_pickle(tmp_path / "x.pkl", [entry])).videos[0]
    with pytest.raises(ValueError, match=r"x\.pkl: video x/0000: frame 3 of 6 is damaged"):
        list(video.frames())


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'mark'}",)

    path = tmp_path / "tapvid_davis.pkl"
    path.write_bytes(pickle.dumps({"clip": CLIPS[0].entry() | {"points": Runs()}}))
    with pytest.raises(PointDataError, match=r"tapvid_davis\.pkl: asks for posix\.system"):
        open_set("davis", path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("dataset", "name", "message"),
    [
        ("davies", "x.pkl", "dataset 'davies': must be one of davis, kinetics"),
        ("davis", None, "needs --data_path"),
        ("davis", "nowhere.pkl", r"nowhere\.pkl: no such file or folder"),
        ("davis", "", "not the set davis: expected pickles"),
        ("kinetics", "", "expected pickles .*, or CSV files beside videos"),
        ("folder", "", r"no tracks in it: expected NAME\.npz or NAME\.csv"),
    ],
)
def test_wrong_names_and_paths(tmp_path, dataset, name, message):
    with pytest.raises(PointDataError, match=message):
        open_set(dataset, None if name is None else tmp_path / name)


def csv_row(key: str, points: np.ndarray, occluded: np.ndarray) -> str:
    values = np.concatenate([points, occluded[:, None]], axis=1).reshape(-1)
    return ",".join([key, *(repr(float(value)) for value in values)])


@pytest.fixture
def csv_folder(tmp_path):
    """Three annotated videos of 8 frames: one cut, one whole, one gone."""
    tracks = annotated(1, frames=8)
    rows = []
    for key in ("cut-1_x,3,13", "whole2,2,12", "gone,0,10"):
        rows += [csv_row(key, p, o) for p, o in zip(tracks.points, tracks.occluded, strict=True)]
    (tmp_path / "tapvid_kinetics.csv").write_text("\n".join(rows) + "\n")
    videos = tmp_path / "videos"
    write_video(videos / "cut-1_x_000003_000013.mp4", numbered_frames(8), fps=25, codec="mpeg4")
    write_video(videos / "whole2.mp4", numbered_frames(70), fps=25, codec="mpeg4")
    return tmp_path, tracks


def test_csv_beside_videos(csv_folder):
    folder, tracks = csv_folder
    for path in (folder, folder / "tapvid_kinetics.csv"):
        found = open_set("kinetics", path)
        assert [video.name for video in found.videos] == ["cut-1_x_000003_000013", "whole2_000002_000012"]
        assert found.missing == ("gone_000000_000010",)
    cut, whole = found.videos
    assert [number_of(frame) for frame in cut.frames()] == list(range(8))
    # From second 2 on: frames 50 to 57, which are numbered from 0 again at 48.
    assert [number_of(frame) for frame in whole.frames()] == [(50 + i) % 48 for i in range(8)]
    np.testing.assert_allclose(cut.tracks_xy, tracks.points - 0.5 / np.array([48, 32]), atol=1e-7)
    np.testing.assert_array_equal(cut.occluded, tracks.occluded)


def test_a_video_at_another_rate_is_read_at_25_frames_a_second(tmp_path):
    tracks = annotated(1, frames=8)
    (tmp_path / "x.csv").write_text(csv_row("a,0,10", tracks.points[0], tracks.occluded[2]) + "\n")
    write_video(tmp_path / "a_000000_000010.mp4", numbered_frames(16), fps=50, codec="mpeg4")
    (video,) = open_set("robotap", tmp_path).videos
    assert [number_of(frame) for frame in video.frames()] == [1, 3, 5, 7, 9, 11, 13, 15]


def test_a_video_that_is_too_short_is_cut(tmp_path):
    tracks = annotated(1, frames=8)
    (tmp_path / "x.csv").write_text(csv_row("a,0,10", tracks.points[0], tracks.occluded[2]) + "\n")
    write_video(tmp_path / "a.mp4", numbered_frames(5), fps=25, codec="mpeg4")
    (video,) = open_set("robotap", tmp_path).videos
    assert len(video) == 5


def test_long_videos_are_split_into_equal_parts(tmp_path):
    video = open_set("davis", write_davis(tmp_path / "x.pkl", [annotated(0, frames=23)])).videos[0]
    assert video.parts(23) == [video]
    parts = video.parts(10)
    assert [part.name for part in parts] == ["clip0[0:8]", "clip0[8:15]", "clip0[15:23]"]
    assert sum(len(part) for part in parts) == 23
    np.testing.assert_array_equal(np.concatenate([part.tracks_xy for part in parts], 1), video.tracks_xy)
    frames = [frame for part in parts for frame in part.frames()]
    np.testing.assert_array_equal(np.stack(frames), np.stack(list(video.frames())))


def test_long_videos_of_a_csv_are_split(csv_folder):
    folder, tracks = csv_folder
    found = read_tapvid_csv(folder, most_frames=5)
    assert [len(video) for video in found.videos] == [4, 4, 4, 4]
    second = found.videos[3]
    assert second.name == "whole2_000002_000012[4:8]"
    assert [number_of(frame) for frame in second.frames()] == [(54 + i) % 48 for i in range(4)]
    np.testing.assert_array_equal(second.occluded, tracks.occluded[:, 4:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,start,end,x,y,occ\n", r"x\.csv:1: could not convert string to float: 'start'"),
        ("a,0,10,0.5,0.5\n", r"x\.csv:1: 5 columns; id, start, end and three for every frame"),
        ("a,10,0,0.5,0.5,0\n", "from 10 to 0 seconds: start must come before end"),
        (
            "a,0,10,0.5,0.5,0\na,0,10,0.5,0.5,0,0.5,0.5,0\n",
            r"x\.csv:2: 2 frames; earlier rows of this video have 1",
        ),
        ("a,0,10,nan,0.5,0\n", "track 0 is visible at frame 0"),
        ("", "no rows in it"),
        ("b,0,10,0.5,0.5,0\n", r"none of its 1 videos is in .*; names such as b_000000_000010\.mp4"),
        ("a,60,70,0.5,0.5,0\n", r"a\.mp4 ends before 60\.02 s"),
        ('"a\n', "not readable as CSV"),
    ],
)
def test_wrong_csv_files(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    write_video(tmp_path / "a.mp4", numbered_frames(5), fps=25, codec="mpeg4")
    with pytest.raises(PointDataError, match=message):
        open_set("kinetics", tmp_path)


@pytest.mark.parametrize(("tracks", "flag"), [("npz", "visible"), ("npz", "occluded"), ("csv", "")])
def test_ones_own_folder(tmp_path, tracks, flag):
    for clip in CLIPS[:2]:
        write_own(tmp_path, clip, tracks, flag)
    found = open_set("folder", tmp_path)
    assert [video.name for video in open_set(str(tmp_path)).videos] == ["clip0", "clip1"]
    for video, clip in zip(found.videos, CLIPS, strict=False):
        kept = np.ones(6, bool) if tracks == "npz" else ~clip.occluded.all(axis=1)
        shown = ~clip.occluded[kept]
        np.testing.assert_array_equal(~video.occluded, shown)
        np.testing.assert_allclose(video.tracks_xy[shown], clip.points[kept][shown], rtol=1e-6)
        np.testing.assert_array_equal(np.stack(list(video.frames())), clip.video)


def test_ones_own_video_file(tmp_path):
    write_video(tmp_path / "my [clip].mp4", numbered_frames(6), codec="mpeg4")
    tracks = np.full((2, 6, 2), [24.0, 8.0])
    np.savez(tmp_path / "my [clip].npz", tracks_xy=tracks, visible=np.ones((2, 6), bool))
    (video,) = open_set("folder", tmp_path).videos
    assert video.tracks_xy[0, 0].tolist() == [0.5, 0.25]
    assert [number_of(frame) for frame in video.frames()] == list(range(6))


def own(tmp_path, **arrays):
    write_own(tmp_path, CLIPS[0])
    good = {"tracks_xy": CLIPS[0].points * [WIDTH, HEIGHT], "visible": ~CLIPS[0].occluded}
    arrays = {name: value for name, value in (good | arrays).items() if value is not None}
    np.savez(tmp_path / "clip0.npz", **arrays)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tracks_xy": None}, "holds visible; expected tracks_xy and one of visible and occluded"),
        ({"occluded": CLIPS[0].occluded}, "holds occluded, tracks_xy, visible; expected"),
        ({"visible": np.array([["a"]])}, "visibility is an array"),
        ({"visible": ~CLIPS[0].occluded * 0.5}, "other values than 0 and 1"),
        (
            {"tracks_xy": CLIPS[0].points * [HEIGHT, WIDTH * 3]},
            "of the visible points lie outside the frame, .* in pixels",
        ),
        ({"tracks_xy": np.array([{}])}, "not a readable .npz file"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_wrong_npz_files(tmp_path, arrays, message):
    own(tmp_path, **arrays)
    with pytest.raises(PointDataError, match=message):
        open_set("folder", tmp_path)


def test_exchanged_axes_are_found_out():
    """(y, x) in a wide frame: y always fits as x, x often does not as y."""
    rng = np.random.default_rng(0)
    tracks_yx = rng.uniform(0, 1, (8, 5, 2)) * [100, 400]
    with pytest.raises(PointDataError, match=r"none if y and x are exchanged; the order is \(x, y\)"):
        checked_tracks("x", tracks_yx, np.zeros((8, 5), bool), (400.0, 100.0))
    tracks, _ = checked_tracks("x", tracks_yx[..., ::-1], np.zeros((8, 5), bool), (400.0, 100.0))
    assert tracks.max() <= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t,x,y\n", r"its first line is \['t', 'x', 'y'\]; expected track,frame,x,y,visible"),
        ("track,frame,x,y,visible\n0,6,1,1,1\n", r"clip0\.csv:2: frame 6 of a video of 6 frames"),
        ("track,frame,x,y,visible\n0,1,1,1,1\n0,1,1,1,1\n", r"clip0\.csv:3: track 0 has frame 1 twice"),
        ("track,frame,x,y,visible\n0,1,nan,1,1\n", "a visible point at x = 'nan'"),
        ("track,frame,x,y,visible\n0,1,1,1,2\n", "visible 2: track counts from 0, visible is 0 or 1"),
        ("track,frame,x,y,visible\n0,1,1\n", "expected numbers for track,frame"),
        ("track,frame,x,y,visible\n0,a,1,1,1\n", "invalid literal"),
        ("track,frame,x,y,visible\n0,1,x,1,1\n", "could not convert"),
    ],
)
def test_wrong_csv_tracks(tmp_path, text, message):
    write_own(tmp_path, CLIPS[0], "csv")
    (tmp_path / "clip0.csv").write_text(text)
    with pytest.raises(PointDataError, match=message):
        open_set("folder", tmp_path)


def test_folders_that_do_not_fit_together(tmp_path):
    write_own(tmp_path, CLIPS[0])
    (tmp_path / "clip0" / "00005.png").unlink()
    with pytest.raises(PointDataError, match="the video has 5 frames, its tracks 6"):
        open_set("folder", tmp_path)
    write_video(tmp_path / "clip0.mp4", numbered_frames(6), codec="mpeg4")
    with pytest.raises(PointDataError, match=r"clip0\.mp4 and clip0 beside it"):
        open_set("folder", tmp_path)
    write_own(tmp_path, CLIPS[1], "csv")
    (tmp_path / "clip1.npz").touch()
    with pytest.raises(PointDataError, match=r"clip1\.csv and clip1\.npz are both tracks"):
        open_set("folder", tmp_path)


def test_tracks_without_a_video(tmp_path):
    np.savez(tmp_path / "a.npz", tracks_xy=np.zeros((1, 1, 2)), visible=np.ones((1, 1), bool))
    with pytest.raises(PointDataError, match=r"a\.npz: no video beside it; expected one of a\.mp4"):
        open_set("folder", tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(PointDataError, match=r"a\.mp4: damaged"):
        open_set("folder", tmp_path)
    (tmp_path / "a.mp4").unlink()
    (tmp_path / "a").mkdir()
    with pytest.raises(PointDataError, match="no frames in it"):
        open_set("folder", tmp_path)
