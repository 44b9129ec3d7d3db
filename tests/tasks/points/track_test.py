"""Tracking a film: points end up where the things are in the user's pixels, and bad input is refused."""

import csv
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.common.errors import CheckpointError, ConfigError, RunError
from tasks.common.video.decoding import VideoFile
from tasks.common.video.encoding import Mp4Writer
from tasks.common.video.errors import VideoError
from tasks.points import following, track
from tasks.points.track import main
from tests.tasks.common.video.video_files import mark_rotated, write_video
from tests.tasks.points.blobs import FRAMES, HEIGHT, HIDDEN, WIDTH, BlobModel, film, places

TOLERANCE = 0.6  # pixels of the video, that squashing to 64 x 64 and the codec cost


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> BlobModel:
    """Stands in for the weights of --checkpoint."""
    fake = BlobModel()
    monkeypatch.setattr(track, "_open_tracker", lambda command: (fake, {"source": "blobs"}))
    return fake


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("films") / "clip.mp4", film(), options={"crf": "10"})


def run(video: Path, output: Path, *options: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and summary of a call."""
    main([f"--video={video}", "--checkpoint=blobs.npz", f"--output={output}", *options])
    return read(output / video.stem)


def read(base: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(f"{base}.npz", allow_pickle=False) as arrays:
        return dict(arrays), json.loads(Path(f"{base}.json").read_text(encoding="utf-8"))


def clicks(*wanted: tuple[int, int], frames: int = FRAMES) -> list[str]:
    """Options for the middles of squares: (square, frame)."""
    xy = places(frames)
    return [f"--click={xy[s, t, 0]},{xy[s, t, 1]},{t}" for s, t in wanted]


def rows(base: Path) -> list[dict[str, str]]:
    with Path(f"{base}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def expected_visible(frames: int = FRAMES) -> np.ndarray:
    visible = np.ones((3, frames), bool)
    visible[HIDDEN[0], [t for t in HIDDEN[1] if t < frames]] = False
    return visible


def assert_tracks(arrays: dict[str, np.ndarray], squares: list[int], known: np.ndarray) -> None:
    """Tracks lie on the squares where these are seen, and are NaN where they are not known."""
    frames = known.shape[1]
    truth, visible = places(frames)[squares], expected_visible(frames)[squares]
    np.testing.assert_array_equal(arrays["visible"], visible & known)
    np.testing.assert_array_equal(np.isfinite(arrays["tracks_xy"]).all(-1), known)
    seen = visible & known
    np.testing.assert_allclose(arrays["tracks_xy"][seen], truth[seen], atol=TOLERANCE)
    np.testing.assert_array_equal(np.isfinite(arrays["certainty"]), known)


def test_tracks_are_where_the_things_are(video: Path, tmp_path: Path, model: BlobModel) -> None:
    arrays, summary = run(video, tmp_path, *clicks((0, 0), (1, 0), (2, 0)))
    assert_tracks(arrays, [0, 1, 2], np.ones((3, FRAMES), bool))
    assert arrays["tracks_xy"].dtype == arrays["certainty"].dtype == np.float32
    np.testing.assert_allclose(arrays["query_txy"][:, 1:], places()[:, 0])
    np.testing.assert_allclose(arrays["time"], np.arange(FRAMES) / 10)
    assert (float(arrays["fps"]), arrays["size_wh"].tolist()) == (10, [WIDTH, HEIGHT])
    assert arrays["names"].tolist() == ["0", "1", "2"]
    assert summary["complete"]
    assert summary["frames"] == {"tracked": FRAMES, "drawn": FRAMES}
    assert summary["points"]["groups"] == 1
    assert summary["points"]["visible_share"] == pytest.approx(1 - 4 / (3 * FRAMES))
    table = rows(tmp_path / "clip")
    assert len(table) == 3 * FRAMES
    for row in table:
        track, frame = int(row["track"]), int(row["frame"])
        xy = [float(row["x"]), float(row["y"])]
        np.testing.assert_allclose(xy, arrays["tracks_xy"][track, frame], atol=1e-3)
        assert row["visible"] == str(int(arrays["visible"][track, frame]))
        assert float(row["time"]) == pytest.approx(frame / 10)
        assert float(row["certainty"]) == pytest.approx(0.9, abs=1e-4)
    with VideoFile(tmp_path / "clip.mp4") as written:
        assert written.info.frames == FRAMES
        assert written.info.fps == 10


def test_the_film_shows_discs_rings_and_trails_at_the_tracks(
    video: Path, tmp_path: Path, model: BlobModel
) -> None:
    run(video, tmp_path, *clicks((0, 0), (1, 0), (2, 0)))
    with VideoFile(tmp_path / "clip.mp4") as drawn, VideoFile(video) as plain:
        frame, before = drawn.read([7])[0].astype(int), plain.read([7])[0].astype(int)
    scale = 360 / HEIGHT
    for square in range(3):
        x, y = (places()[square, 7] * scale).astype(int)
        colour = before[int(y / scale), int(x / scale)]
        assert np.abs(frame[y, x] - colour).max() > 60  # the disc is painted over the square


def test_points_may_be_asked_for_in_the_middle(video: Path, tmp_path: Path, model: BlobModel) -> None:
    wanted = [(0, 5), (1, 13), (2, FRAMES - 1)]
    known = np.array([np.arange(FRAMES) >= t for _, t in wanted])
    arrays, summary = run(video, tmp_path, *clicks(*wanted))
    assert_tracks(arrays, [0, 1, 2], known)
    assert len(rows(tmp_path / "clip")) == known.sum()
    assert summary["points"]["not_reached"] == 0


@pytest.mark.parametrize("window", [None, 5])
def test_backward_follows_them_to_the_first_frame(
    video: Path, tmp_path: Path, model: BlobModel, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    if window is not None:  # several windows to be turned round
        monkeypatch.setattr(following, "_WINDOW", window * 64 * 64 * 3)
    arrays, summary = run(
        video, tmp_path, *clicks((0, 5), (1, 13), (2, FRAMES - 1)), "--backward", "--chunk=7"
    )
    assert_tracks(arrays, [0, 1, 2], np.ones((3, FRAMES), bool))
    assert len(rows(tmp_path / "clip")) == 3 * FRAMES
    assert summary["frames"] == {"tracked": FRAMES, "drawn": FRAMES}
    with VideoFile(tmp_path / "clip.mp4") as written:
        assert written.info.frames == FRAMES


@pytest.mark.parametrize("backward", [[], ["--backward"]])
def test_groups_share_a_program_and_files(
    video: Path, tmp_path: Path, model: BlobModel, backward: list[str]
) -> None:
    wanted = [(0, 0), (1, 3), (2, 10), (0, 8), (2, 0)]
    arrays, summary = run(video, tmp_path, *clicks(*wanted), "--group=2", *backward)
    known = np.array([np.arange(FRAMES) >= (0 if backward else t) for _, t in wanted])
    assert_tracks(arrays, [s for s, _ in wanted], known)
    assert set(model.slots) == {2}
    assert len(set(model.shapes)) == 1  # the last chunk too
    assert summary["points"]["groups"] == 3
    assert summary["frames"] == {"tracked": FRAMES, "drawn": FRAMES}


def test_any_chunk_gives_the_same(video: Path, tmp_path: Path, model: BlobModel) -> None:
    arrays = [run(video, tmp_path, *clicks((0, 2), (1, 0)), f"--chunk={n}")[0] for n in (1, 7, 100)]
    for other in arrays[1:]:
        np.testing.assert_array_equal(other["tracks_xy"], arrays[0]["tracks_xy"])
    assert {shape[0] for shape in model.shapes} == {1, 7, FRAMES}


def test_the_model_may_see_frames_of_another_size(video: Path, tmp_path: Path, model: BlobModel) -> None:
    model.frame_size = (128, 160)
    arrays, _ = run(video, tmp_path, *clicks((0, 0), (1, 0), (2, 0)))
    assert_tracks(arrays, [0, 1, 2], np.ones((3, FRAMES), bool))


def test_rotated_videos_are_upright(tmp_path: Path, model: BlobModel) -> None:
    """A phone held upright: the picture is stored lying, its points are those of the upright one."""
    lying = write_video(tmp_path / "phone.mp4", film(), options={"crf": "10"})
    mark_rotated(lying, 90)
    truth = places()
    upright = np.stack([HEIGHT - truth[..., 1], truth[..., 0]], -1)  # turned clockwise
    x, y = upright[0, 0]
    arrays, _ = run(lying, tmp_path / "out", f"--click={x},{y},0")
    assert arrays["size_wh"].tolist() == [HEIGHT, WIDTH]
    np.testing.assert_allclose(arrays["tracks_xy"][0], upright[0], atol=TOLERANCE)


def test_variable_rates_are_frames_on_the_screen(tmp_path: Path, model: BlobModel) -> None:
    stamps = [0, 1, 2, 3, 14, 15, 16, 27, 28]
    varying = write_video(tmp_path / "varying.mp4", film(9), stamps=stamps, options={"crf": "10"})
    (tmp_path / "points.csv").write_text(f"time,x,y\n0.25,{places()[0, 2, 0]},{places()[0, 2, 1]}\n")
    with VideoFile(varying) as opened:
        frames, fps = opened.info.frames, opened.info.fps
        shown = (
            np.searchsorted(np.array(stamps) / 10 + 1e-3, np.arange(frames) / fps + 2e-3, side="right") - 1
        )
    arrays, _ = run(varying, tmp_path / "out", f"--points={tmp_path}/points.csv")
    first = int(arrays["query_txy"][0, 0])
    assert first == int(0.25 * fps)
    truth = places(9)[0][np.clip(shown, 0, 8)]
    np.testing.assert_allclose(arrays["tracks_xy"][0, first], arrays["query_txy"][0, 1:], rtol=1e-6)
    np.testing.assert_allclose(arrays["tracks_xy"][0, first + 1 :], truth[first + 1 :], atol=TOLERANCE)
    np.testing.assert_allclose(arrays["time"], np.arange(frames) / fps)


def test_certainty_gates_visibility(video: Path, tmp_path: Path, model: BlobModel) -> None:
    model.certainty = lambda frame: 0.4 if frame in (3, 4) else 0.9
    free, _ = run(video, tmp_path, *clicks((0, 0)))
    assert free["visible"].all()
    gated, _ = run(video, tmp_path, *clicks((0, 0)), "--certainty")
    np.testing.assert_array_equal(np.flatnonzero(~gated["visible"][0]), [3, 4])
    np.testing.assert_array_equal(gated["tracks_xy"], free["tracks_xy"])


def test_points_come_from_a_file_with_names(video: Path, tmp_path: Path, model: BlobModel) -> None:
    xy = places()
    lines = [
        "Name, t, y, x",
        f'"left, hand",0,{xy[0, 0, 1]},{xy[0, 0, 0]}',
        f"Ärger,4,{xy[2, 4, 1]},{xy[2, 4, 0]}",
    ]
    (tmp_path / "points.csv").write_text("\n".join(lines) + "\n\n", encoding="utf-8-sig")
    arrays, _ = run(video, tmp_path / "out", f"--points={tmp_path}/points.csv")
    assert arrays["names"].tolist() == ["left, hand", "Ärger"]
    known = np.array([np.arange(FRAMES) >= t for t in (0, 4)])
    assert_tracks(arrays, [0, 2], known)
    assert {row["track"] for row in rows(tmp_path / "out" / "clip")} == {"left, hand", "Ärger"}


def test_a_grid_is_spread_over_the_frame(video: Path, tmp_path: Path, model: BlobModel) -> None:
    arrays, summary = run(video, tmp_path, "--grid=3", "--grid_frame=2", "--no_video")
    x, y = np.meshgrid([WIDTH / 6, WIDTH / 2, 5 * WIDTH / 6], [HEIGHT / 6, HEIGHT / 2, 5 * HEIGHT / 6])
    wanted = np.stack([np.full(9, 2), x.ravel(), y.ravel()], -1)
    np.testing.assert_allclose(arrays["query_txy"], wanted)
    assert not (tmp_path / "clip.mp4").exists()
    assert summary["frames"] == {"tracked": FRAMES, "drawn": 0}


def test_what_there_is_of_a_truncated_video_is_tracked(
    tmp_path: Path, model: BlobModel, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_video(tmp_path / "whole.mp4", film(40), codec="mpeg4", gop=4, faststart=True)
    content = whole.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(content[: len(content) * 2 // 3])
    arrays, summary = run(cut, tmp_path / "out", *clicks((0, 4), frames=40), "--backward")
    count = arrays["tracks_xy"].shape[1]
    assert 10 < count < 38
    np.testing.assert_allclose(arrays["tracks_xy"][0], places(40)[0, :count], atol=TOLERANCE)
    assert "truncated" in summary["video"]["cut_short"]
    assert "truncated" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--backward"], ["--group=1"]])
def test_tracking_ends_where_a_video_is_damaged(
    video: Path,
    tmp_path: Path,
    model: BlobModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    frames, end = VideoFile.stream, 17

    def damaged(self: VideoFile, step: int = 1, start: int = 0) -> Iterator[np.ndarray]:
        for index, frame in enumerate(frames(self, step, start), start=start):
            if index == end:
                raise VideoError(self.name, "frame 17 of 24 is damaged")
            yield frame

    monkeypatch.setattr(VideoFile, "stream", damaged)
    arrays, summary = run(video, tmp_path, *clicks((0, 4), (2, 20)), *options)
    known = np.array([(np.arange(end) >= 4) | ("--backward" in options), np.zeros(end, bool)])
    assert_tracks(arrays, [0, 2], known)
    assert summary["frames"] == {"tracked": end, "drawn": end}
    assert summary["points"]["not_reached"] == 1
    assert "frame 17 cannot be decoded: frame 17 of 24 is damaged" in summary["stopped"]
    err = capsys.readouterr().err
    assert "frame 17 cannot be decoded" in err
    assert "points for frames that were not reached: 1" in err


PASSES = {
    "one pass": ([], 3),
    "the film": (["--group=1"], 2 * FRAMES + 3),
    "a group": (["--group=1"], FRAMES + 3),
}


@pytest.mark.parametrize("when", PASSES)
def test_a_signal_leaves_files_that_can_be_read(
    video: Path, tmp_path: Path, model: BlobModel, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    options, at = PASSES[when]
    given, frames = iter(range(1000)), VideoFile.stream

    def interrupted(self: VideoFile, step: int = 1, start: int = 0) -> Iterator[np.ndarray]:
        for frame in frames(self, step, start):
            if next(given) == at:
                os.kill(os.getpid(), signal.SIGINT)
            yield frame

    monkeypatch.setattr(VideoFile, "stream", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RunError, match="interrupted by SIGINT; what was tracked until then is in") as caught:
        run(video, tmp_path, *clicks((0, 0), (1, 0)), *options)
    assert caught.value.exit_code == 2
    assert signal.getsignal(signal.SIGINT) is before
    arrays, summary = read(tmp_path / "clip")
    assert summary["stopped"] == "interrupted by SIGINT"
    assert not summary["complete"]
    tracked = 4 if when == "one pass" else FRAMES
    known = np.ones((2, tracked), bool)
    known[1, 4:] = when != "a group"
    assert_tracks(arrays, [0, 1], known)
    assert len(rows(tmp_path / "clip")) == known.sum()
    drawn = 0 if when == "a group" else 4
    assert summary["frames"] == {"tracked": tracked, "drawn": drawn}
    assert (tmp_path / "clip.mp4").exists() == bool(drawn)
    if drawn:
        with VideoFile(tmp_path / "clip.mp4") as written:
            assert len(written.read(range(drawn))) == written.info.frames == drawn


def test_few_pictures_are_held_at_a_time(
    video: Path, tmp_path: Path, model: BlobModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, ahead = {"decoded": 0, "written": 0}, []
    frames, write = VideoFile.stream, Mp4Writer.write

    def counted(self: VideoFile, step: int = 1, start: int = 0) -> Iterator[np.ndarray]:
        for frame in frames(self, step, start):
            counts["decoded"] += 1
            ahead.append(counts["decoded"] - counts["written"])
            yield frame

    def written(self: Mp4Writer, frame: np.ndarray) -> None:
        write(self, frame)
        counts["written"] += 1

    monkeypatch.setattr(VideoFile, "stream", counted)
    monkeypatch.setattr(Mp4Writer, "write", written)
    run(video, tmp_path, *clicks((0, 0)), "--chunk=4")
    assert counts == {"decoded": FRAMES, "written": FRAMES}
    assert max(ahead) == 4


def test_what_an_earlier_call_left_is_gone(video: Path, tmp_path: Path, model: BlobModel) -> None:
    run(video, tmp_path, *clicks((0, 0)))
    run(video, tmp_path, *clicks((0, 0)), "--no_video")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.csv", "clip.json", "clip.npz"]


def test_a_failure_to_write_is_named(
    video: Path, tmp_path: Path, model: BlobModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file, no folder")
    with pytest.raises(CheckpointError, match="could not write the tracks"):
        run(video, tmp_path / "taken", *clicks((0, 0)))

    def full(self: Mp4Writer, frame: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Mp4Writer, "write", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        run(video, tmp_path / "out", *clicks((0, 0)))
    assert rows(tmp_path / "out" / "clip")  # what came before can be read


def test_nothing_that_is_read_is_overwritten(video: Path, tmp_path: Path, model: BlobModel) -> None:
    content = video.read_bytes()
    with pytest.raises(ConfigError, match="is the video itself; name another"):
        run(video, video.parent, *clicks((0, 0)))
    assert video.read_bytes() == content
    (tmp_path / "clip.csv").write_text("x,y,t\n20,20,0\n")
    with pytest.raises(ConfigError, match="is the points itself; name another"):
        run(video, tmp_path, f"--points={tmp_path}/clip.csv")


def test_a_model_that_gives_no_numbers_is_an_error(video: Path, tmp_path: Path, model: BlobModel) -> None:
    model.certainty = lambda frame: np.nan
    with pytest.raises(RunError, match="output is not finite from frame 0 on"):
        run(video, tmp_path, *clicks((0, 0)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "no points: give one of --points=CSV, --grid=N and --click=X,Y,T"),
        (["--grid=4", "--click=1,1,0"], "--click and --grid: give one of"),
        (["--grid=0"], r"--grid=0: must be from 1 to 141 \(points in a row\)"),
        (["--grid=200"], r"--grid=200: must be from 1 to 141"),
        (["--grid=4", "--grid_frame=24"], r"--grid=4 --grid_frame=24: x = 16, y = 12, t = 24 is outside"),
        (["--click=1"], "--click=1: must be x,y,t"),
        (["--click=1,2,3,4"], "--click=1,2,3,4: must be x,y,t"),
        (["--click=1,two,3"], "--click=1,two,3: y = 'two': must be a number"),
        (["--click=1,nan,3"], "--click=1,nan,3: y = nan: must be a finite number"),
        (["--click=1,1,0", "--group=0"], "--group = 0: must be at least 1"),
        (["--click=1,1,0", "--chunk=-1"], "--chunk = -1: must be at least 1"),
        (["--click=1,1,0", "--trail=-1"], "--trail = -1: must be at least 0"),
        (["--click=1,1,0", "--certainty=0"], "--certainty = 0: must be positive"),
        (["--click=1,1,0", "--camera=0"], "give one of --video=FILE and --camera=N"),
        (["--click=1,1,0", "--seconds=2"], "--seconds belongs to --camera"),
        (["--click=1,1,0", "--step=2"], "--step belongs to --workdir"),
        (["--click=1,1,0", "--workdir=x"], "give one of --workdir=RUN"),
        (["--click=1,1,0", "--font=nowhere.ttf"], "--font=nowhere.ttf: not a TrueType"),
        (
            ["--points=nowhere.csv"],
            "--points=nowhere.csv: cannot be read as a CSV file in UTF-8: No such file",
        ),
        (["--clik=1,1,0"], "unknown option '--clik'"),
    ],
)
def test_wrong_options_are_refused(
    video: Path, tmp_path: Path, model: BlobModel, options: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        run(video, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
    assert not model.slots  # before any weights


def test_points_that_are_not_in_the_video_are_refused(video: Path, tmp_path: Path, model: BlobModel) -> None:
    inside = "x goes from 0 to 128 .to the right., y from 0 to 96 .down., t from 0 to 23 .frames."
    cases = {
        "--click=128.5,20,0": f"x = 128.5, y = 20, t = 0 is outside of the video: {inside}",
        "--click=20,-1,0": "x = 20, y = -1, t = 0 is outside",
        "--click=20,20,24": "t = 24 is outside",
        "--click=20,120,0": "read as y, x, t .* instead of x, y, t all would be inside: is the order right",
        "--click=5,20,90": "read as t, x, y",
        "--click=5,90,120": "read as t, y, x instead",
        "--click=20,20,0.5": "t = 0.5: must be a whole number, the frame",
    }
    for option, reason in cases.items():
        with pytest.raises(ConfigError, match=reason):
            run(video, tmp_path / "out", option)


def test_a_video_of_one_frame_is_refused(tmp_path: Path, model: BlobModel) -> None:
    still = write_video(tmp_path / "still.mp4", film(1))
    with pytest.raises(ConfigError, match=r"still\.mp4: it has one frame: there is nothing to track"):
        run(still, tmp_path / "out", "--grid=2")
    (tmp_path / "text.mp4").write_bytes(b"not a video\n" * 100)
    with pytest.raises(ConfigError, match="damaged, truncated, or not a video"):
        run(tmp_path / "text.mp4", tmp_path / "out", "--grid=2")
