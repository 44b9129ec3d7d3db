"""Classifying a film: the numbers of the whole clip, files that can be read, and clear refusals."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from models import trecvit
from tasks.common.config import load_config, save_resolved, to_json
from tasks.common.errors import CheckpointError, ConfigError, RunError
from tasks.common.video.decoding import Limits, VideoFile
from tasks.common.video.encoding import Mp4Writer
from tasks.common.video.frames import Window
from tasks.video import classify
from tasks.video.augment import AugmentConfig, prepare_eval
from tasks.video.classify import main
from tasks.video.trained import TrainedModel
from tests.tasks.common.video.video_files import mark_rotated, write_empty_video, write_sound, write_video

ROOT = Path(__file__).resolve().parents[3]
SIZE, CLASSES = 32, 10
CONFIG = trecvit.TRecViTConfig.preset(
    "mu", image_size=(SIZE, SIZE), patch_size=(8, 8), num_classes=CLASSES, rep_size=64
)
TOLERANCE = 1e-5  # of probabilities, float32; bfloat16: BFLOAT16
BFLOAT16 = 3e-2

Written = tuple[list[dict[str, Any]], dict[str, Any]]


@jax.jit
def make_params() -> Any:
    """Random, with a classifier that answers differently to different frames."""
    params = trecvit.init_params(CONFIG, jax.random.key(0))
    group = params["head"]["classes"]
    group["kernel"] = 2 * jax.random.normal(jax.random.key(1), group["kernel"].shape)
    return params


@jax.jit
def whole_clip(params: Any, frames: jax.Array) -> jax.Array:
    """[T, C]: probabilities after every frame of [1, T, h, w, 3], by one call of the model."""
    logits, _ = trecvit.apply(CONFIG, trecvit.TRecViTRuntime(), params, frames, output="logits")
    return jax.nn.softmax(logits[0], axis=-1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.npz"
    trecvit.convert.save_official(path, make_params(), CONFIG)
    return path


def pictures(count: int, height: int = 60, width: int = 80) -> np.ndarray:
    """A pattern that moves and changes its colours."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (height // 10 + 1, width // 10 + 1, 3)).astype(np.uint8)
    whole = np.kron(coarse, np.ones((10, 10, 1), np.uint8))[:height, :width]
    return np.stack([np.roll(whole, (3 * i, 7 * i, i), (0, 1, 2)) for i in range(count)])


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("films") / "clip.mp4", pictures(23))


def run(video: Path, checkpoint: Path, output: Path, *options: str) -> Written:
    """Lines and summary of a call."""
    main([f"--video={video}", f"--checkpoint={checkpoint}", f"--output={output}", *options])
    return read(output / video.stem)


def read(base: Path) -> Written:
    lines = Path(f"{base}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], json.loads(Path(f"{base}.json").read_text(encoding="utf-8"))


def probabilities(lines: list[dict[str, Any]]) -> np.ndarray:
    """[n, C] of lines that hold all classes (--top=10)."""
    found = np.zeros((len(lines), CLASSES))
    for row, line in zip(found, lines, strict=True):
        values = [each["probability"] for each in line["top"]]
        assert values == sorted(values, reverse=True)
        row[[each["index"] for each in line["top"]]] = values
    return found


def expected(video: Path, stride: int = 1, window: Window | None = None) -> np.ndarray:
    """What the model says of the whole clip at once, frame by frame."""
    return np.asarray(whole_clip(make_params(), seen(video, stride, window)))


def seen(video: Path, stride: int = 1, window: Window | None = None) -> jax.Array:
    """[1, T, h, w, 3]: frames as evaluation cuts them; of an official file, the short side at 8/7."""
    window = window or Window(round(SIZE * 8 / 7), round(SIZE * 8 / 7))
    with VideoFile(video) as opened:
        frames = [window.apply(f) for f in opened.read(range(0, opened.info.frames, stride))]
    return prepare_eval(AugmentConfig(size=CONFIG.image_size), jnp.asarray(np.stack(frames))[None])


@pytest.mark.parametrize(
    ("options", "stride"),
    [
        ([], 1),
        pytest.param(["--chunk=5"], 1, marks=pytest.mark.slow),
        (["--chunk=4", "--stride=3"], 3),
        pytest.param(["--stride=5", "--no_video"], 5, marks=pytest.mark.slow),
    ],
)
def test_every_frame_gets_what_the_whole_clip_says_of_those_up_to_it(
    film: Path, checkpoint: Path, tmp_path: Path, options: list[str], stride: int
) -> None:
    lines, summary = run(film, checkpoint, tmp_path, "--top=10", *options)
    wanted = expected(film, stride)
    assert np.ptp(wanted, axis=0).max() > 0.05  # frames differ in what is said of them
    np.testing.assert_allclose(probabilities(lines), wanted, atol=TOLERANCE)
    assert [line["frame"] for line in lines] == list(range(0, 23, stride))
    assert [line["time"] for line in lines] == pytest.approx([i / 10 for i in range(0, 23, stride)])
    assert {line["clip"] for line in lines} == {0}
    assert summary["prediction"]["top"] == lines[-1]["top"]
    assert summary["complete"]
    assert summary["stopped"] is None
    assert summary["frames"]["classified"] == len(lines)
    assert summary["options"]["stride"] == stride
    assert (tmp_path / "clip.mp4").exists() != ("--no_video" in options)


@pytest.mark.parametrize("chunk", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_restart_forgets_everything(film: Path, checkpoint: Path, tmp_path: Path, chunk: int) -> None:
    lines, summary = run(
        film, checkpoint, tmp_path, "--top=10", "--restart=6", "--stride=2", f"--chunk={chunk}"
    )
    frames, params = seen(film, 2), make_params()
    clips = [frames[:, :6], frames[:, 6:]]
    wanted = [np.asarray(whole_clip(params, clip)) for clip in clips]
    np.testing.assert_allclose(probabilities(lines), np.concatenate(wanted), atol=TOLERANCE)
    assert [line["clip"] for line in lines] == [0] * 6 + [1] * 6
    final = probabilities([{"top": summary["prediction"]["top"]}])[0]
    np.testing.assert_allclose(final, (wanted[0][-1] + wanted[1][-1]) / 2, atol=TOLERANCE)
    assert summary["prediction"]["mean_over_clips"] == 2


@pytest.mark.slow
def test_bfloat16_is_near(film: Path, checkpoint: Path, tmp_path: Path) -> None:
    lines, summary = run(
        film, checkpoint, tmp_path, "--top=10", "--dtype=bfloat16", "--no_video", "--chunk=3"
    )
    np.testing.assert_allclose(probabilities(lines), expected(film), atol=BFLOAT16)
    assert summary["model"]["compute_dtype"] == "bfloat16"


def test_films_have_the_videos_frames_and_rate(checkpoint: Path, tmp_path: Path) -> None:
    """Odd sizes, a rotated one, and a variable rate, whose pictures are those on the screen."""
    plain = write_video(tmp_path / "plain.mp4", pictures(9, 50, 70), fps=25)
    rotated = mark_rotated(write_video(tmp_path / "rotated.mp4", pictures(9, 50, 70), fps=25), 90)
    stamps = [0, 1, 2, 3, 14, 15, 16, 27, 28]
    varying = write_video(tmp_path / "varying.mp4", pictures(9), stamps=stamps)
    odd = write_video(tmp_path / "odd.avi", pictures(9, 51, 71), codec="ffv1", fps=25)
    sizes = {}
    for video in (plain, rotated, varying, odd):
        lines, summary = run(video, checkpoint, tmp_path / "out", "--top=10")
        with VideoFile(video) as read_from, VideoFile(tmp_path / "out" / f"{video.stem}.mp4") as written:
            assert written.info.frames == read_from.info.frames == len(lines) == summary["frames"]["read"]
            assert written.info.fps == pytest.approx(read_from.info.fps, rel=1e-3)
            assert written.info.height % 2 == written.info.width % 2 == 0
            sizes[video.stem] = (written.info.height, written.info.width)
        np.testing.assert_allclose(probabilities(lines), expected(video), atol=TOLERANCE)
    assert sizes["rotated"][0] > sizes["plain"][0]  # upright


def test_names_come_from_a_file(film: Path, checkpoint: Path, tmp_path: Path) -> None:
    names = [f"Klasse {i} — ж" for i in range(CLASSES)]
    file = tmp_path / "names.txt"
    file.write_text("\n".join(names) + "\n\n", encoding="utf-8")
    lines, summary = run(film, checkpoint, tmp_path, f"--classes={file}", "--stride=8")
    for line in [*lines, summary["prediction"]]:
        assert [each["name"] for each in line["top"]] == [names[each["index"]] for each in line["top"]]
        assert len(line["top"]) == 5
    lines, _ = run(film, checkpoint, tmp_path, "--top=99", "--stride=8", "--no_video")
    assert sorted(each["name"] for each in lines[0]["top"]) == [f"class {i}" for i in range(CLASSES)]


def test_an_output_may_be_a_file(film: Path, checkpoint: Path, tmp_path: Path) -> None:
    main([f"--video={film}", f"--checkpoint={checkpoint}", f"--output={tmp_path}/new/a.b.mp4", "--stride=8"])
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.b.json", "a.b.jsonl", "a.b.mp4"]


def make_run(folder: Path, monkeypatch: pytest.MonkeyPatch, **data: Any) -> Path:
    """The workdir of a run of this model, whose weights come from here."""
    config = to_json(load_config(str(ROOT / "configs" / "trecvit.py")))
    config["model"] = to_json(CONFIG)
    config["augment"]["size"] = [SIZE, SIZE]
    config["data"] |= data
    save_resolved(folder, config)
    names = tuple(f"name {i}" for i in range(CLASSES))

    def opened(path: Path, step: int | None = None) -> TrainedModel:
        assert (path, step) == (folder, None)
        return TrainedModel(CONFIG, make_params(), names, None, folder)

    monkeypatch.setattr(classify, "open_model", opened)
    return folder


def test_a_run_knows_its_frames_stride_and_names(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"height": 40, "width": 48, "stride": 3, "frames": 4}
    workdir = make_run(tmp_path / "run", monkeypatch, **data)
    words = [f"--video={film}", f"--workdir={workdir}", "--top=10", "--no_video"]
    main([*words, f"--output={tmp_path}"])
    lines, summary = read(tmp_path / "clip")
    window = Window(40, 48)
    np.testing.assert_allclose(probabilities(lines), expected(film, 3, window), atol=TOLERANCE)
    assert {each["name"] for each in lines[0]["top"]} == {f"name {i}" for i in range(CLASSES)}
    assert summary["model"]["source"] == str(workdir)
    main([*words, f"--output={tmp_path}", "--restart=auto", "--config.data.fit=stretch"])
    lines, summary = read(tmp_path / "clip")
    assert [line["clip"] for line in lines] == [0, 0, 0, 0, 1, 1, 1, 1]
    stretched = expected(film, 3, Window(40, 48, "stretch"))
    np.testing.assert_allclose(probabilities(lines)[:4], stretched[:4], atol=TOLERANCE)
    with pytest.raises(ConfigError, match="--grid belongs to --checkpoint"):
        main([*words, f"--output={tmp_path}", "--grid=4x4"])


@pytest.mark.slow
def test_a_run_of_evenly_spread_frames_sees_as_many(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = make_run(tmp_path / "run", monkeypatch, sampling="uniform", frames=5)
    main([f"--video={film}", f"--workdir={workdir}", f"--output={tmp_path}", "--no_video"])
    lines, summary = read(tmp_path / "clip")
    assert summary["options"]["stride"] == 4
    assert len(lines) == 6


def test_what_can_be_read_of_a_truncated_video_is_classified(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (40, 64, 64, 3)).astype(np.uint8)
    whole = write_video(tmp_path / "whole.mp4", noise, codec="mpeg4", faststart=True)
    content = whole.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(content[: len(content) // 2])
    lines, summary = run(cut, checkpoint, tmp_path / "out", "--top=10", "--chunk=3")
    assert 10 < len(lines) < 25
    np.testing.assert_allclose(probabilities(lines), expected(whole)[: len(lines)], atol=TOLERANCE)
    assert "truncated" in summary["video"]["cut_short"]
    assert "truncated" in capsys.readouterr().err
    with VideoFile(tmp_path / "out" / "cut.mp4") as written:
        assert written.info.frames == len(lines)


@pytest.mark.parametrize("options", [[], ["--chunk=4", "--stride=2"]])
def test_a_signal_leaves_files_that_can_be_read(
    film: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    frames = VideoFile.stream

    def interrupted(self: VideoFile, step: int = 1) -> Iterator[np.ndarray]:
        for index, frame in enumerate(frames(self, step)):
            if index == 9:
                os.kill(os.getpid(), signal.SIGINT)
            yield frame

    monkeypatch.setattr(VideoFile, "stream", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        RunError, match="interrupted by SIGINT; what was classified until then is in"
    ) as caught:
        run(film, checkpoint, tmp_path, *options)
    assert caught.value.exit_code == 2
    assert signal.getsignal(signal.SIGINT) is before
    lines, summary = read(tmp_path / "clip")
    assert len(lines) == (5 if options else 10)
    assert not summary["complete"]
    assert summary["stopped"] == "interrupted by SIGINT"
    assert summary["prediction"]["top"] == lines[-1]["top"]
    with VideoFile(tmp_path / "clip.mp4") as written:
        assert written.info.frames == 10
        assert len(written.read(range(10))) == 10


@pytest.mark.slow
def test_the_command_can_be_interrupted(checkpoint: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "long.mp4", np.tile(pictures(50), (60, 1, 1, 1)))
    words = [f"--video={video}", f"--checkpoint={checkpoint}", f"--output={tmp_path}/out"]
    command = subprocess.Popen(
        [sys.executable, "-m", "tasks.video.classify", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = tmp_path / "out" / "long.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and not (lines.exists() and lines.stat().st_size > 3000):
        time.sleep(0.05)
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 2, err
    assert err.strip() == f"error: interrupted by SIGINT; what was classified until then is in {tmp_path}/out"
    found, summary = read(tmp_path / "out" / "long")
    with VideoFile(tmp_path / "out" / "long.mp4") as written:
        assert written.info.frames == len(found) == summary["frames"]["read"] < 3000


@pytest.mark.parametrize(("chunk", "stride", "most"), [(1, 1, 1), (1, 4, 1), (3, 2, 5)])
def test_few_frames_are_held_at_a_time(
    film: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    stride: int,
    most: int,
) -> None:
    counts, ahead = {"decoded": 0, "written": 0}, []
    frames, write = VideoFile.stream, Mp4Writer.write

    def counted(self: VideoFile, step: int = 1) -> Iterator[np.ndarray]:
        for frame in frames(self, step):
            counts["decoded"] += 1
            ahead.append(counts["decoded"] - counts["written"])
            yield frame

    def written(self: Mp4Writer, frame: np.ndarray) -> None:
        write(self, frame)
        counts["written"] += 1

    monkeypatch.setattr(VideoFile, "stream", counted)
    monkeypatch.setattr(Mp4Writer, "write", written)
    run(film, checkpoint, tmp_path, f"--chunk={chunk}", f"--stride={stride}")
    assert counts == {"decoded": 23, "written": 23}
    assert max(ahead) == most == (chunk - 1) * stride + 1


def test_a_model_that_gives_no_numbers_is_an_error(film: Path, tmp_path: Path) -> None:
    params = make_params()
    params["norm"]["scale"] = jnp.full_like(params["norm"]["scale"], jnp.nan)
    trecvit.convert.save_official(tmp_path / "nan.npz", params, CONFIG)
    with pytest.raises(RunError, match="output is not finite from frame 0 on"):
        run(film, tmp_path / "nan.npz", tmp_path)


def test_a_failure_to_write_is_named(
    film: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file, no folder")
    with pytest.raises(CheckpointError, match="could not write the classification"):
        run(film, checkpoint, tmp_path / "taken")

    def full(self: Mp4Writer, frame: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Mp4Writer, "write", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        run(film, checkpoint, tmp_path)


def bad_video(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "sound":
        return write_sound(path)
    if kind == "zero_frames":
        return write_empty_video(path)
    if kind == "folder":
        path.mkdir()
    elif kind in ("empty", "text"):
        path.write_bytes(b"" if kind == "empty" else b"not a video\n" * 100)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file; needed: a video file, such as"),
        ("empty", "empty file"),
        ("text", "damaged, truncated, or not a video"),
        ("sound", r"no video in it \(there is: audio\)"),
        ("zero_frames", "no frames in it|there is: nothing"),
        ("folder", "is a folder: one video file is needed"),
    ],
)
def test_what_is_no_video_is_refused(checkpoint: Path, tmp_path: Path, kind: str, reason: str) -> None:
    video = bad_video(tmp_path, kind)
    with pytest.raises(ConfigError, match=reason) as caught:
        run(video, checkpoint, tmp_path / "out")
    assert str(caught.value).startswith(f"--video={video}")
    assert not (tmp_path / "out").exists()


def test_frames_beyond_the_limits_are_refused(
    film: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classify, "Limits", lambda: Limits(pixels=1000))
    with pytest.raises(
        ConfigError, match=r"frames of 80 x 60 pixels; the limit is 1000; needed: .* 1,000 pixels"
    ):
        run(film, checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--stride=0"], "--stride = 0: must be at least 1"),
        (["--chunk=0"], "--chunk = 0: must be at least 1"),
        (["--top=-1"], "--top = -1: must be at least 1"),
        (["--restart=often"], r"--restart=often: a number of frames, 0 \(never\) or 'auto' is needed"),
        (["--grid=3"], "--grid=3: expected rows x columns, such as 14x14"),
        (["--step=3"], "--step belongs to --workdir"),
        (["--workdir=somewhere"], "give one of --workdir=DIR"),
        (["--classes=nowhere.txt"], "--classes=nowhere.txt: cannot be read as UTF-8 text"),
        (["--font=nowhere.ttf"], "--font=nowhere.ttf: not a TrueType"),
        (["--strid=2"], "unknown option '--strid'"),
    ],
)
def test_wrong_options_are_refused(
    film: Path, checkpoint: Path, tmp_path: Path, options: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        run(film, checkpoint, tmp_path, *options)


def test_wrong_models_and_names_are_refused(film: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--video=FILE is missing"):
        main([f"--checkpoint={checkpoint}"])
    with pytest.raises(ConfigError, match="give one of --workdir=DIR"):
        main([f"--video={film}"])
    with pytest.raises(ConfigError, match="is not the workdir of a run"):
        main([f"--video={film}", f"--workdir={tmp_path}"])
    with pytest.raises(ConfigError, match=r"is a folder: an \.npz file is needed"):
        run(film, tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        run(film, tmp_path / "no.npz", tmp_path)
    few = tmp_path / "few.txt"
    few.write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match=r"few\.txt: 2 lines; the model has 10 classes"):
        run(film, checkpoint, tmp_path, f"--classes={few}")
    headless = dataclasses.replace(CONFIG, head="none")
    params = {name: group for name, group in make_params().items() if name != "head"}
    trecvit.convert.save_official(tmp_path / "encoder.npz", params, headless)
    with pytest.raises(ConfigError, match="its head is 'none'; a classifier is needed"):
        run(film, tmp_path / "encoder.npz", tmp_path)


def test_the_video_itself_is_never_overwritten(film: Path, checkpoint: Path, tmp_path: Path) -> None:
    content = film.read_bytes()
    with pytest.raises(ConfigError, match="is the video itself; name another"):
        run(film, checkpoint, film.parent)
    assert film.read_bytes() == content
