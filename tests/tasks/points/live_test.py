"""Tracking in front of a camera, which FFmpeg plays here: it ends when told to, and leaves files like any."""

import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.common.errors import ConfigError
from tasks.common.video.decoding import VideoFile
from tasks.points import frame_sources, track
from tasks.points.escape import EscapeKey
from tasks.points.frame_sources import CameraSource, Picture
from tasks.points.overlay import TrackOverlay
from tasks.points.query_points import parse_clicks
from tasks.points.track import main
from tasks.points.track_files import TrackFiles
from tasks.points.track_spool import VISIBLE, track_rows
from tests.tasks.points.blobs import BlobModel

CAMERA = "testsrc=size=64x48:rate=20"  # without an end


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> BlobModel:
    fake = BlobModel()
    monkeypatch.setattr(track, "_open_tracker", lambda command: (fake, {"source": "blobs"}))
    monkeypatch.setitem(frame_sources._FORMATS, sys.platform, "lavfi")
    return fake


def run(output: Path, *options: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    main([f"--camera={CAMERA}", "--checkpoint=blobs.npz", f"--output={output}", *options])
    with np.load(output / "camera.npz") as arrays:
        return dict(arrays), json.loads((output / "camera.json").read_text())


def assert_whole(output: Path, arrays: dict[str, np.ndarray], frames: int) -> None:
    assert arrays["tracks_xy"].shape[1] == frames
    np.testing.assert_allclose(arrays["time"], np.arange(frames) / 20, atol=1e-6)
    with VideoFile(output / "camera.mp4") as written:
        assert written.info.frames == frames
        assert len(written.read(range(frames))) == frames
    lines = (output / "camera.csv").read_text().splitlines()
    assert len(lines) == 1 + int(np.isfinite(arrays["certainty"]).sum())


def test_a_camera_is_tracked_for_so_long(tmp_path: Path, model: BlobModel) -> None:
    arrays, summary = run(tmp_path, "--seconds=0.6", "--grid=2")
    assert_whole(tmp_path, arrays, 13)
    assert summary["complete"]
    assert summary["video"] == {"camera": f"--camera={CAMERA}", "fps": 20, "height": 48, "width": 64}
    assert {shape[0] for shape in model.shapes} == {1}  # nothing waits for a chunk to fill


def test_a_point_may_be_for_a_later_frame(tmp_path: Path, model: BlobModel) -> None:
    arrays, _ = run(tmp_path, "--seconds=0.6", "--click=10,10,5", "--click=10,10,500")
    assert_whole(tmp_path, arrays, 13)
    known = np.isfinite(arrays["certainty"])
    np.testing.assert_array_equal(known, [np.arange(13) >= 5, np.zeros(13, bool)])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_how_a_live_session_ends(
    tmp_path: Path, model: BlobModel, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    pictures = CameraSource.stream

    def ended(self: CameraSource, start: int = 0) -> Iterator[Picture]:
        for index, picture in enumerate(pictures(self, start)):
            if index == 6:
                os.kill(os.getpid(), number)
            yield picture

    monkeypatch.setattr(CameraSource, "stream", ended)
    arrays, summary = run(tmp_path, "--grid=2")
    assert_whole(tmp_path, arrays, 7)
    assert summary["complete"]
    assert summary["stopped"] is None


def test_so_is_the_escape_key(tmp_path: Path, model: BlobModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = itertools.count()
    monkeypatch.setattr(EscapeKey, "hit", lambda self: next(asked) == 9)
    arrays, summary = run(tmp_path, "--grid=2")
    assert_whole(tmp_path, arrays, 9)
    assert summary["complete"]


def test_a_camera_that_breaks_off_is_tracked_until_then(
    tmp_path: Path, model: BlobModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import av

    following, calls = CameraSource._next, itertools.count()

    def unplugged() -> Iterator[Any]:
        raise av.error.OSError(19, "No such device")
        yield

    def pulled(self: CameraSource) -> Any:
        if next(calls) == 5:
            self._frames = unplugged()
        return following(self)

    monkeypatch.setattr(CameraSource, "_next", pulled)
    arrays, summary = run(tmp_path, "--grid=2")
    assert_whole(tmp_path, arrays, 5)
    assert "frame 5 cannot be decoded: it gives no more pictures (No such device)" in summary["stopped"]
    assert "No such device" in capsys.readouterr().err


def test_a_camera_that_has_nothing_yet_is_asked_again(
    tmp_path: Path, model: BlobModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import av

    following, calls = CameraSource._next, itertools.count()

    def empty() -> Iterator[Any]:
        raise av.error.BlockingIOError(11, "Resource temporarily unavailable")
        yield

    def slow(self: CameraSource) -> Any:
        if next(calls) % 3 == 1:
            self._frames = empty()
        return following(self)

    monkeypatch.setattr(CameraSource, "_next", slow)
    arrays, summary = run(tmp_path, "--grid=2", "--seconds=0.6")
    assert_whole(tmp_path, arrays, 13)
    assert summary["stopped"] is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--grid=4", "--group=15"], "16 points, but --group=15: what a camera shows is seen once"),
        (["--grid=2", "--backward"], "--backward needs a --video: what a camera saw is gone"),
        (["--click=65,10,0"], "x = 65, y = 10, t = 0 is outside of the video: .* t from 0 .frames"),
        (["--grid=2", "--seconds=0"], "--seconds = 0: must be positive"),
    ],
)
def test_what_a_camera_cannot_do_is_refused(
    tmp_path: Path, model: BlobModel, options: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        run(tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


class Source:
    height, width, fps, frames = 48, 64, 10.0, None

    def stream(self, start: int = 0) -> Iterator[Picture]:
        raise NotImplementedError


def test_a_film_keeps_the_time_of_an_uneven_camera(tmp_path: Path) -> None:
    """Where pictures come late the one before stays on the screen, but not for ever; where they come too fast
    some are left out."""
    points = parse_clicks(["10,10,0"])
    overlay = TrackOverlay(48, 64, points.query_txy[:, 1:])
    times = [0.0, 0.1, 0.52, 0.55, 0.58, 0.7, 60.0, 60.1]
    rows = track_rows(1)
    rows["xy"], rows["certainty"], rows["state"] = 10, 1, VISIBLE
    with TrackFiles(tmp_path / "camera", Source(), points, overlay) as files:
        for number, seconds in enumerate(times):
            files.draw(np.full((48, 64, 3), 25 * number, np.uint8), rows, seconds)
    with VideoFile(tmp_path / "camera.mp4") as written:
        shown = [round(frame[300, 400].mean() / 25) for frame in written.stream()]
    assert shown == [0, 1, 1, 1, 1, 2, 3, 5, *[5] * 99, 6, 7]
