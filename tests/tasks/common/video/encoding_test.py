"""Films written frame by frame: every frame at its time, readable however the writer is left."""

from pathlib import Path

import numpy as np
import pytest

from tasks.common.video.decoding import VideoFile
from tasks.common.video.encoding import Mp4Writer
from tests.tasks.common.video.video_files import number_of, numbered_frames


@pytest.mark.parametrize("codec", [None, "mpeg4"])
@pytest.mark.parametrize("fps", [25.0, 30000 / 1001, 120000 / 1001, 3.793, 0.5])
def test_films_hold_the_frames_at_their_rate(tmp_path: Path, codec: str | None, fps: float) -> None:
    path = tmp_path / "film.mp4"
    with Mp4Writer(path, 32, 48, fps, codec) as writer:
        for frame in numbered_frames(40):
            writer.write(frame)
    assert writer.frames == 40
    with VideoFile(path) as video:
        assert video.info.codec == ("mpeg4" if codec else "h264")
        assert (video.info.frames, video.info.height, video.info.width) == (40, 32, 48)
        assert video.info.constant_rate
        assert video.info.fps == pytest.approx(fps, rel=1e-6)
        assert [number_of(f) for f in video.stream()] == list(range(40))


def test_without_h264_it_is_mpeg4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with Mp4Writer(tmp_path / "film.mp4", 32, 48, 10.0) as writer:
        assert writer.codec == "mpeg4"
        writer.write(numbered_frames(1)[0])


def test_a_film_that_breaks_off_plays(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    writer = Mp4Writer(path, 32, 48, 10.0)

    def break_off() -> None:
        with writer:
            for frame in numbered_frames(9):
                writer.write(frame)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    writer.close()  # again
    with VideoFile(path) as video:
        assert [number_of(f) for f in video.stream()] == list(range(9))


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    for height, width, fps in ((31, 48, 10.0), (32, 47, 10.0), (0, 2, 10.0), (32, 48, 0.0)):
        with pytest.raises(ValueError, match="need an even width and height, and a rate above 0"):
            Mp4Writer(tmp_path / "film.mp4", height, width, fps)
    with (
        Mp4Writer(tmp_path / "film.mp4", 32, 48, 10.0) as writer,
        pytest.raises(ValueError, match=r"frame of \(48, 32\), the file's are \(32, 48\)"),
    ):
        writer.write(np.zeros((48, 32, 3), np.uint8))


def test_what_the_system_refuses_is_an_os_error(tmp_path: Path) -> None:
    black = np.zeros((32, 48, 3), np.uint8)
    for path, reason in ((tmp_path / "nowhere" / "film.mp4", "No such file"), ("/dev/full", "No space left")):
        with pytest.raises(OSError, match=reason), Mp4Writer(path, 32, 48, 10.0) as writer:
            writer.write(black)
