"""Where pictures come from: the frames and times of a file, and a camera's, which FFmpeg can play."""

import re
from pathlib import Path

import numpy as np
import pytest

from tasks.common.errors import ConfigError
from tasks.common.video.decoding import VideoFile
from tasks.common.video.errors import VideoError
from tasks.points.following import chunks, reversed_frames
from tasks.points.frame_sources import CameraSource, VideoSource
from tests.tasks.common.video.video_files import number_of, numbered_frames, write_video

CAMERA = "testsrc=size=64x48:rate=20:duration=1"  # FFmpeg's moving test picture, as a device
COUNT = 45


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("films") / "clip.mp4", numbered_frames(COUNT), gop=12)


def test_a_file_gives_its_frames_and_their_times(film: Path) -> None:
    with VideoFile(film) as video:
        source = VideoSource(video)
        assert (source.height, source.width, source.fps, source.frames) == (32, 48, 10, COUNT)
        for start in (0, 30):
            found = list(source.stream(start))
            assert [number_of(picture.frame) for picture in found] == list(range(start, COUNT))
            np.testing.assert_allclose([p.seconds for p in found], np.arange(start, COUNT) / 10)


@pytest.mark.parametrize("window", [1, 7, 12, 44, 45, 1000])
@pytest.mark.parametrize("count", [1, 44, 45])
def test_files_are_read_backward(
    film: Path, monkeypatch: pytest.MonkeyPatch, window: int, count: int
) -> None:
    held: list[int] = []
    monkeypatch.setattr("tasks.points.following._WINDOW", window * 3 * 32 * 48)
    with VideoFile(film) as video:
        source = VideoSource(video)
        stream = source.stream

        def watched(start: int = 0):
            held.append(0)
            for picture in stream(start):
                held[-1] += 1
                yield picture

        source.stream = watched  # type: ignore[method-assign]
        found = [number_of(frame) for frame in reversed_frames(source, count, (32, 48))]
    assert found == list(range(count - 1, -1, -1))
    assert sum(held) == count
    assert max(held) <= window


def test_chunks_keep_what_belongs_to_a_frame() -> None:
    frames = numbered_frames(5)
    found = list(chunks(((frame, number) for number, frame in enumerate(frames)), 2))
    assert [chunk.kept for chunk in found] == [[0, 1], [2, 3], [4]]
    np.testing.assert_array_equal(np.concatenate([chunk.frames for chunk in found]), frames)


def test_a_camera_gives_pictures_as_they_come() -> None:
    with CameraSource(CAMERA, format="lavfi") as camera:
        assert (camera.height, camera.width, camera.fps, camera.frames) == (48, 64, 20, None)
        found = list(camera.stream())
        np.testing.assert_allclose([picture.seconds for picture in found], np.arange(20) / 20)
        assert all(picture.frame.shape == (48, 64, 3) for picture in found)
        assert len({picture.frame.tobytes() for picture in found}) > 10  # it moves
        with pytest.raises(ValueError, match="start = 3: a camera has no frames but the next"):
            camera.stream(3)


def test_a_camera_stops_when_it_is_time() -> None:
    with CameraSource(CAMERA, seconds=0.5, format="lavfi") as camera:
        assert len(list(camera.stream())) == 11
    with CameraSource(CAMERA, format="lavfi") as camera:
        stream = camera.stream()
        next(stream)
        camera.close()
        assert list(stream) == []


def test_a_camera_whose_pictures_change_is_an_error() -> None:
    with CameraSource(CAMERA, format="lavfi") as camera:
        camera.width = 32
        with pytest.raises(VideoError, match="it now gives 64 x 48 pixels"):
            list(camera.stream())


@pytest.mark.parametrize(
    ("name", "format", "reason"),
    [
        ("0", "no_such_kind", "--camera=0: this build of PyAV has no devices of kind 'no_such_kind'"),
        ("no_such_filter", "lavfi", "--camera=no_such_filter: no_such_filter: "),
        ("testsrc=duration=0", "lavfi", "it gives no pictures"),
    ],
)
def test_what_is_no_camera_is_refused(name: str, format: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        CameraSource(name, format=format)
