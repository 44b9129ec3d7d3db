"""Decoding: the right frames of every format, only what is needed, and one clear reason for what fails."""

import contextlib
import re
import time
from pathlib import Path

import numpy as np
import pytest

from tasks.common.video.decoding import Limits, VideoFile, probe
from tasks.common.video.errors import VideoError, VideoTimeout
from tests.tasks.common.video.video_files import (
    mark_rotated,
    number_of,
    numbered_frames,
    write_empty_video,
    write_sound,
    write_video,
)

COUNT = 45
FORMATS = {
    "h264.mp4": {"codec": "libx264", "options": {"bf": "2"}},
    "h264.mkv": {"codec": "libx264", "options": {"bf": "2"}},
    "h264.ts": {"codec": "libx264"},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "fps": 25},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {
        name: write_video(folder / name, numbered_frames(COUNT), **options)
        for name, options in FORMATS.items()
    }


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_frames_asked_for(videos: dict[str, Path], name: str) -> None:
    with VideoFile(videos[name]) as video:
        info = video.info
        assert (info.frames, info.height, info.width, info.rotation) == (COUNT, 32, 48, 0)
        assert info.constant_rate
        assert info.fps == pytest.approx(FORMATS[name].get("fps", 10), rel=0.01)
        assert [number_of(f) for f in video.read(range(COUNT))] == list(range(COUNT))
    rng = np.random.default_rng(0)
    for _ in range(6):
        indices = np.sort(rng.integers(0, COUNT, 5))
        with VideoFile(videos[name]) as video:
            assert [number_of(f) for f in video.read(indices)] == indices.tolist()
            assert [number_of(f) for f in video.read([0, 7])] == [0, 7]  # backwards, in the same file
            assert [number_of(f) for f in video.read([COUNT - 1])] == [COUNT - 1]


def test_only_frames_from_the_key_frames_needed_are_decoded(tmp_path: Path) -> None:
    options = {"bf": "0", "sc_threshold": "0"}
    path = write_video(tmp_path / "long.mp4", numbered_frames(200), gop=10, options=options)
    with VideoFile(path, limits=Limits(decoded=12)) as video:
        assert number_of(video.read([195])[0]) == 195 % 48
    with VideoFile(path, limits=Limits(decoded=22)) as video:
        assert [number_of(f) for f in video.read([59, 155])] == [59 - 48, 155 - 3 * 48]
    with VideoFile(path, limits=Limits(decoded=12)) as video, pytest.raises(VideoError, match="more than 12"):
        video.read([0, 5, 15, 25])
    sparse = write_video(tmp_path / "one_key.mp4", numbered_frames(60), gop=100, options=options)
    with (
        VideoFile(sparse, limits=Limits(decoded=20)) as video,
        pytest.raises(VideoError, match=r"one_key\.mp4: more than 20 frames to decode for one clip"),
    ):
        video.read([50])


def test_frames_of_a_variable_rate_are_those_on_the_screen(tmp_path: Path) -> None:
    stamps = [0, 1, 2, 3, 4, 14, 15, 16, 17, 27, 28, 29]  # two pictures stay for a second each
    path = write_video(tmp_path / "phone.mp4", numbered_frames(12), stamps=stamps)
    with VideoFile(path) as video:
        info = video.info
        assert not info.constant_rate
        assert (info.pictures, info.frames) == (12, 12)
        assert info.fps == pytest.approx(11 / 2.9, rel=0.01)
        shown = [number_of(f) for f in video.read(range(info.frames))]
    times = np.arange(12) / info.fps * 10
    assert shown == [int(np.searchsorted(stamps, t + 1e-3, side="right")) - 1 for t in times]
    assert max(shown.count(i) for i in shown) > 1


@pytest.mark.parametrize("clockwise", [90, 180, 270])
def test_rotation_marks_are_applied(tmp_path: Path, clockwise: int) -> None:
    path = mark_rotated(write_video(tmp_path / "phone.mp4", numbered_frames(5)), clockwise)
    info = probe(path)
    assert info.rotation == (360 - clockwise) % 360
    with VideoFile(path) as video:
        (frame,) = video.read([2])
    upright = numbered_frames(5)[2]
    expected = np.rot90(upright, -clockwise // 90)
    assert (info.height, info.width) == frame.shape[:2] == expected.shape[:2]
    assert np.abs(frame.astype(int) - expected).mean() < 3


def test_a_file_in_memory_is_read_like_one_on_disk(videos: dict[str, Path]) -> None:
    path = videos["h264.mp4"]
    with VideoFile(path.read_bytes(), "clip 7") as inside, VideoFile(path) as outside:
        for a, b in zip(inside.read([3, 30]), outside.read([3, 30]), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(VideoError, match=r"^clip 8: damaged, truncated, or not a video"):
        VideoFile(b"no video at all", "clip 8")


def test_indices_must_ascend_and_exist(videos: dict[str, Path]) -> None:
    with VideoFile(videos["h264.mp4"]) as video:
        with pytest.raises(ValueError, match="must ascend"):
            video.read([3, 2])
        with pytest.raises(ValueError, match=r"frames 3\.\.45 of 45"):
            video.read([3, 45])


def broken(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "audio":
        return write_sound(path)
    if kind == "zero_frames":
        return write_empty_video(path)
    if kind in ("empty", "text", "playlist", "missing"):
        contents = {
            "empty": b"",
            "text": b"not a video\n" * 100,
            "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        }
        if kind in contents:
            path.write_bytes(contents[kind])
        return path
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (40, 64, 64, 3)).astype(np.uint8)
    write_video(path, noise, codec="mpeg4", faststart=kind == "cut_in_pictures")
    content = path.read_bytes()
    if kind.startswith("cut"):
        path.write_bytes(content[: len(content) // 2])
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "empty file"),
        ("missing", "no such file"),
        ("text", "damaged, truncated, or not a video"),
        ("playlist", "damaged, truncated, or not a video"),
        ("audio", r"no video in it \(there is: audio\)"),
        ("zero_frames", r"no frames in it|no video in it \(there is: nothing\)"),
        ("cut_before_index", "damaged, truncated, or not a video"),
        ("cut_in_pictures", r"truncated: \d+ of 40 frames are there"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, kind: str, reason: str) -> None:
    path = broken(tmp_path, kind)
    with pytest.raises(VideoError, match=reason) as caught:
        VideoFile(path)
    assert caught.value.name == str(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert "\n" not in caught.value.reason


def test_no_damage_escapes_as_another_error(tmp_path: Path) -> None:
    """Random damage anywhere in a file: it is read, or there is a VideoError, and nothing else."""
    rng = np.random.default_rng(1)
    outcomes = set()
    for name, options in (("h264.mp4", {"options": {"bf": "2"}}), ("mpeg4.avi", {"codec": "mpeg4"})):
        good = write_video(tmp_path / name, numbered_frames(20), **options).read_bytes()
        for trial in range(40):
            content = bytearray(good)
            for _ in range(rng.integers(1, 30)):
                content[rng.integers(len(content))] = rng.integers(256)
            path = tmp_path / f"{trial}_{name}"
            path.write_bytes(content)
            try:
                with VideoFile(path, limits=Limits(pixels=10**6, frames=1000)) as video:
                    video.read(range(0, video.info.frames, 3))
                outcomes.add("read")
            except VideoError:
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_limits(videos: dict[str, Path]) -> None:
    path = videos["h264.mp4"]
    with pytest.raises(VideoError, match="frames of 48 x 32 pixels; the limit is 1000"):
        VideoFile(path, limits=Limits(pixels=1000))
    with pytest.raises(VideoError, match="more than 44 frames"):
        VideoFile(path, limits=Limits(frames=44))
    with pytest.raises(VideoTimeout, match=r"h264\.mp4: reading it took more than 1e-09 s: raise data"):
        VideoFile(path, limits=Limits(seconds=1e-9))
    with pytest.raises(ValueError, match="limit on frames = 0: must be above 0"):
        Limits(frames=0)


@pytest.mark.parametrize("name", FORMATS)
def test_a_stream_gives_all_frames_in_order(videos: dict[str, Path], name: str) -> None:
    with VideoFile(videos[name]) as video:
        assert [number_of(f) for f in video.stream()] == list(range(COUNT))
        assert [number_of(f) for f in video.stream(7)] == list(range(0, COUNT, 7))  # and once more
        assert [number_of(f) for f in video.read([3, 30])] == [3, 30]
        for streamed, read in zip(video.stream(), VideoFile(videos[name]).read(range(COUNT)), strict=True):
            np.testing.assert_array_equal(streamed, read)
        with pytest.raises(ValueError, match="step = 0: must be at least 1"):
            video.stream(0)


@pytest.mark.parametrize("name", FORMATS)
def test_a_stream_may_begin_at_any_frame(videos: dict[str, Path], name: str) -> None:
    with VideoFile(videos[name]) as video:
        for start, step in ((COUNT - 1, 1), (13, 1), (29, 4), (0, 3), (COUNT, 1)):
            assert [number_of(f) for f in video.stream(step, start)] == list(range(start, COUNT, step))


def test_a_stream_shows_what_is_on_the_screen_upright(tmp_path: Path) -> None:
    stamps = [0, 1, 2, 3, 4, 14, 15, 16, 17, 27, 28, 29]
    path = mark_rotated(write_video(tmp_path / "phone.mp4", numbered_frames(12), stamps=stamps), 90)
    with VideoFile(path) as video, VideoFile(path) as other:
        assert not video.info.constant_rate
        for step in (1, 3):
            wanted = other.read(range(0, other.info.frames, step))
            for streamed, read in zip(video.stream(step), wanted, strict=True):
                np.testing.assert_array_equal(streamed, read)
            for streamed, read in zip(video.stream(step, 2 * step), wanted[2:], strict=True):
                np.testing.assert_array_equal(streamed, read)
        assert wanted[0].shape == (48, 32, 3)


def test_a_stream_is_not_limited_by_what_a_clip_may_take(tmp_path: Path) -> None:
    path = write_video(tmp_path / "one_key.mp4", numbered_frames(60), gop=100)
    with VideoFile(path, limits=Limits(decoded=2)) as video:
        frames = video.stream()
        video._limits = Limits(decoded=2, seconds=0.3)  # for each frame, not for all together
        for number, frame in enumerate(frames):
            assert number_of(frame) == number % 48
            time.sleep(0.01)
        assert number == 59
        video._limits = Limits(seconds=1e-9)
        with pytest.raises(VideoTimeout):
            next(video.stream())


CUT = {
    "cut.mp4": ({"codec": "mpeg4", "faststart": True}, r"truncated: \d+ of 40 frames are there"),
    "cut.mkv": ({"codec": "mpeg4"}, r"its pictures end after \d\.\d s, its header says 4\.0 s"),
}


@pytest.mark.parametrize("name", CUT)
def test_the_beginning_of_a_truncated_file_can_be_read(tmp_path: Path, name: str) -> None:
    options, reason = CUT[name]
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (40, 64, 64, 3)).astype(np.uint8)
    whole = write_video(tmp_path / f"whole_{name}", noise, **options)
    with VideoFile(whole, partial=True) as video:
        assert video.cut_short == ""
        wanted = video.read(range(40))
    content = whole.read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: len(content) // 2])
    found = []
    with VideoFile(path, partial=True) as video:
        assert re.fullmatch(reason, video.cut_short)
        with contextlib.suppress(VideoError):  # of the last picture only a part is there
            found.extend(video.stream())
        assert len(found) >= video.info.frames - 1
    assert 10 < len(found) < 30
    for streamed, read in zip(found, wanted, strict=False):
        np.testing.assert_array_equal(streamed, read)
