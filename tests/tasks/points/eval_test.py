"""The evaluation command end to end, on files in every official format, against metrics computed here."""

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.common.errors import ConfigError, RunError
from tasks.points import eval as evaluation
from tasks.points.metrics import METRICS, tapvid_metrics
from tasks.points.predictors import Prediction
from tasks.points.queries import sample_queries
from tasks.points.reappearance import aj_rd, reappearances
from tests.tasks.points.annotated_videos import (
    HEIGHT,
    WIDTH,
    Annotated,
    annotated,
    write_davis,
    write_kinetics,
    write_own,
    write_pickle,
    write_rgb_stacking,
    write_robotap,
)

CLIPS = [annotated(seed, frames=6 + seed) for seed in range(4)]
EMPTY = Annotated("empty", CLIPS[0].video, CLIPS[0].points, np.ones_like(CLIPS[0].occluded))


def write_all(folder: Path) -> Path:
    for clip in CLIPS:
        write_own(folder, clip)
    return folder


LAYOUTS = {
    "davis": lambda path: write_davis(path / "tapvid_davis.pkl", CLIPS),
    "rgb_stacking": lambda path: write_rgb_stacking(path / "tapvid_rgb_stacking.pkl", CLIPS),
    "kinetics": lambda path: write_kinetics(path / "kinetics", CLIPS, shards=1),
    "robotap": lambda path: write_robotap(path / "robotap", [CLIPS[0], CLIPS[2], CLIPS[1], CLIPS[3]]),
    "folder": lambda path: write_all(path / "own"),
}


class Guesses:
    """Predicts the truth of the clips, in the order they come, off by `off` pixels (of 256) in x.

    Hides every seventh of the points it should show.
    """

    def __init__(self, clips: list[Annotated], mode: str, off: float, size: int = 256, stop_at: int = -1):
        self.clips, self.mode, self.off, self.size = clips, mode, off, size
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, video: np.ndarray, query_tyx: np.ndarray) -> Prediction:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        queries, tracks, visible = guess_for(self.clips[self.calls], self.mode, self.off)
        self.calls += 1
        scale = self.size / 256
        assert video.shape[1:] == (self.size, self.size, 3)
        np.testing.assert_allclose(query_tyx, queries.query_tyx * [1, scale, scale], rtol=1e-6)
        return Prediction(tracks[..., ::-1] * scale, visible)


def guess_for(clip: Annotated, mode: str, off: float):
    queries = sample_queries(clip.occluded, clip.points.astype(np.float64) * 256, mode)
    tracks = queries.tracks_xy + np.array([off, 0.0])
    visible = ~queries.occluded
    visible.reshape(-1)[::7] = False
    return queries, tracks, visible


def expected_for(clip: Annotated, mode: str, off: float) -> dict[str, float]:
    queries, tracks, visible = guess_for(clip, mode, off)
    found = tapvid_metrics(
        queries.query_tyx[None],
        queries.occluded[None],
        queries.tracks_xy[None],
        ~visible[None],
        tracks[None],
        mode,
    )
    return {name: float(value[0]) for name, value in found.items()}


def run(monkeypatch, predictor, *words: str) -> dict:
    """The command with another predictor in place of the model; its summary."""
    monkeypatch.setattr(
        evaluation, "open_predictor", lambda command: (predictor, {"predictor": "guesses"}, "guesses")
    )
    evaluation.main(words)
    output = next(word.partition("=")[2] for word in words if word.startswith("--output"))
    return json.loads((Path(output) / "summary.json").read_text())


@pytest.mark.parametrize("mode", ["first", "strided"])
@pytest.mark.parametrize("dataset", list(LAYOUTS))
def test_every_layout_gives_the_metrics_of_its_videos(tmp_path, monkeypatch, dataset, mode):
    path, output = LAYOUTS[dataset](tmp_path), tmp_path / "out"
    size = 128 if dataset == "davis" else 256
    summary = run(
        monkeypatch,
        Guesses(CLIPS, mode, 3.0, size),
        f"--dataset={dataset}",
        f"--data_path={path}",
        f"--query_mode={mode}",
        f"--size={size}",
        f"--output={output}",
        "--worst=2",
    )
    videos = [expected_for(clip, mode, 3.0) for clip in CLIPS]
    for name in METRICS:
        assert summary["means"][name] == pytest.approx(np.mean([v[name] for v in videos]), rel=1e-12), name
        assert summary["undefined_videos"][name] == 0
    rows = list(csv.DictReader((output / "per_video.csv").open()))
    assert [int(row["frames"]) for row in rows] == [6, 7, 8, 9]
    for row, video in zip(rows, videos, strict=True):
        assert float(row["average_jaccard"]) == pytest.approx(video["average_jaccard"], abs=1e-6)
    assert 0 < summary["means"]["average_jaccard"] < 1
    picture = Image.open(output / "worst.png")
    assert picture.height > 2 * 256
    assert picture.width > 256


def test_exact_tracks_score_1_and_static_ones_as_computed(tmp_path, monkeypatch, capsys):
    path = write_davis(tmp_path / "x.pkl", CLIPS)
    common = ("--dataset=davis", f"--data_path={path}")

    class Exact(Guesses):
        def __call__(self, video, query_tyx):
            queries, tracks, _ = guess_for(self.clips[self.calls], self.mode, self.off)
            self.calls += 1
            return Prediction(tracks[..., ::-1], ~queries.occluded)

    with monkeypatch.context() as patch:
        summary = run(patch, Exact(CLIPS, "first", 0.0), *common, f"--output={tmp_path / 'exact'}")
    assert set(summary["means"].values()) == {1.0}
    evaluation.main([*common, "--predictor=static", f"--output={tmp_path / 'static'}"])
    summary = json.loads((tmp_path / "static" / "summary.json").read_text())
    videos, events = [], []
    for clip in CLIPS:
        queries = sample_queries(clip.occluded, clip.points.astype(np.float64) * 256, "first")
        still = np.broadcast_to(queries.query_tyx[:, None, :0:-1], queries.tracks_xy.shape).astype(np.float32)
        seen = np.zeros(queries.occluded.shape, bool)
        found = tapvid_metrics(
            queries.query_tyx[None],
            queries.occluded[None],
            queries.tracks_xy[None],
            seen[None],
            still[None],
            "first",
        )
        videos.append({name: float(value[0]) for name, value in found.items()})
        swapped = [np.moveaxis(x, 0, 1)[None] for x in (queries.tracks_xy, ~queries.occluded, still, ~seen)]
        events.append(reappearances(*swapped))
    for name in METRICS:
        assert summary["means"][name] == pytest.approx(np.mean([v[name] for v in videos]), rel=1e-6)
    per_video = [aj_rd(part)["aj_rd"] for part in events]
    assert summary["means"]["aj_rd"] == pytest.approx(np.nanmean(per_video), rel=1e-6)
    printed = capsys.readouterr().out
    assert "the complete set has 30 videos" in printed
    assert f"AJ {100 * videos[0]['average_jaccard']:.1f}" in printed


def test_lucas_kanade_runs_and_follows_the_drift(tmp_path):
    path = write_davis(tmp_path / "x.pkl", CLIPS[:2])
    for name in ("lucas_kanade", "static"):
        evaluation.main([
            "--dataset=davis", f"--data_path={path}", "--query_mode=strided", f"--predictor={name}",
            f"--output={tmp_path / name}",
        ])  # fmt: skip
    means = {
        name: json.loads((tmp_path / name / "summary.json").read_text())["means"]
        for name in ("lucas_kanade", "static")
    }
    near = "pts_within_1"
    assert means["lucas_kanade"][near] > 0.8 > means["static"][near]


def test_undefined_videos_are_counted(tmp_path, monkeypatch, capsys):
    """One video without visible points, one whose only query is on its last frame."""
    late = np.ones_like(CLIPS[0].occluded)
    late[:, -1] = False
    videos = [CLIPS[1], EMPTY, Annotated("late", CLIPS[0].video, CLIPS[0].points, late)]
    path, output = write_davis(tmp_path / "x.pkl", videos), tmp_path / "out"
    guesses = Guesses([videos[0], videos[2]], "first", 3.0)
    summary = run(monkeypatch, guesses, "--dataset=davis", f"--data_path={path}", f"--output={output}")
    assert guesses.calls == 2  # nothing is asked of a video without queries
    assert summary["means"]["average_jaccard"] == pytest.approx(
        expected_for(CLIPS[1], "first", 3.0)["average_jaccard"], rel=1e-6
    )
    assert summary["undefined_videos"]["average_jaccard"] == 2
    rows = list(csv.DictReader((output / "per_video.csv").open()))
    assert [row["average_jaccard"] for row in rows[1:]] == ["", ""]
    assert "means over 3 videos" in capsys.readouterr().out


def test_no_video_is_defined(tmp_path, monkeypatch):
    path = write_davis(tmp_path / "x.pkl", [EMPTY])
    output = tmp_path / "out"
    summary = run(
        monkeypatch, Guesses([], "first", 0.0), "--dataset=davis", f"--data_path={path}", f"--output={output}"
    )
    assert summary["means"]["average_jaccard"] is None
    assert not (output / "worst.png").exists()


def outputs(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("summary.json", "per_video.csv", "worst.png")}


def test_an_interrupted_evaluation_continues(tmp_path, monkeypatch):
    path = write_davis(tmp_path / "x.pkl", CLIPS)
    words = ("--dataset=davis", f"--data_path={path}")
    run(monkeypatch, Guesses(CLIPS, "first", 3.0), *words, f"--output={tmp_path / 'whole'}")
    with pytest.raises(RunError, match="the same command continues after the last video"):
        run(monkeypatch, Guesses(CLIPS, "first", 3.0, stop_at=2), *words, f"--output={tmp_path / 'cut'}")
    (tmp_path / "cut" / "videos" / "00001.npz").write_bytes(b"damaged")  # is made again
    rest = Guesses([CLIPS[1], *CLIPS[2:]], "first", 3.0)
    run(monkeypatch, rest, *words, f"--output={tmp_path / 'cut'}")
    assert rest.calls == 3
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")


def test_another_evaluation_is_not_continued(tmp_path, monkeypatch):
    words = ("--dataset=davis", f"--output={tmp_path / 'out'}")
    first = write_davis(tmp_path / "x.pkl", CLIPS[:2])
    run(monkeypatch, Guesses(CLIPS, "first", 3.0), *words, f"--data_path={first}")
    with pytest.raises(ConfigError, match=r"holds another evaluation.*\n  query_mode: 'first' -> 'strided'"):
        run(
            monkeypatch,
            Guesses(CLIPS, "strided", 3.0),
            *words,
            f"--data_path={first}",
            "--query_mode=strided",
        )
    second = write_davis(tmp_path / "y.pkl", CLIPS[1:3])
    with pytest.raises(ConfigError, match="annotations: '"):
        run(monkeypatch, Guesses(CLIPS[1:], "first", 3.0), *words, f"--data_path={second}")


@pytest.mark.slow
def test_killed_at_any_moment_it_continues(tmp_path):
    """The real command, killed by SIGKILL while it is at work, gives the bytes of an undisturbed run."""
    path = write_davis(tmp_path / "x.pkl", [annotated(seed, frames=24) for seed in range(6)])
    root = Path(__file__).resolve().parents[3]

    def command(output: str) -> list[str]:
        return [
            sys.executable, "-m", "tasks.points.eval", "--dataset=davis", f"--data_path={path}", "--worst=1",
            "--predictor=lucas_kanade", f"--output={tmp_path / output}",
        ]  # fmt: skip

    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(command("cut"), cwd=root, env=environment, stdout=subprocess.DEVNULL) as child:
        until = time.monotonic() + 120
        while not (tmp_path / "cut" / "videos" / "00001.npz").exists() and time.monotonic() < until:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    done = len(list((tmp_path / "cut" / "videos").glob("*.npz")))
    assert 2 <= done < 6
    assert not (tmp_path / "cut" / "summary.json").exists()
    for output in ("cut", "whole"):
        evaluation.main(command(output)[3:])
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")


def test_a_malicious_file_is_refused_before_any_weights_load(tmp_path, monkeypatch):
    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'mark'}",)

    def no_weights(*args):
        raise AssertionError("weights were opened")

    monkeypatch.setattr(evaluation, "open_model", no_weights)
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"clip": CLIPS[0].entry() | {"occluded": Runs()}}))
    with pytest.raises(ConfigError, match=r"x\.pkl: asks for posix\.system.*nothing was run"):
        evaluation.main(["--dataset=davis", f"--data_path={path}", "--checkpoint=weights.npz"])
    assert not (tmp_path / "mark").exists()


def test_damage_met_on_the_way_is_named_and_the_rest_kept(tmp_path, monkeypatch):
    entries = [clip.entry(jpeg="list") for clip in CLIPS[:3]]
    entries[1]["video"][2] = b"\xff\xd8 no frame"
    path, output = write_pickle(tmp_path / "x.pkl", entries), tmp_path / "out"
    with pytest.raises(ConfigError, match="video x/0001: frame 2 of 7 is damaged"):
        run(
            monkeypatch,
            Guesses(CLIPS, "first", 0.0),
            "--dataset=kinetics",
            f"--data_path={path}",
            f"--output={output}",
        )
    assert [file.name for file in (output / "videos").iterdir()] == ["00000.npz"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workdir=a", "--checkpoint=b"], "give one of --workdir=RUN"),
        (["--predictor=static", "--checkpoint=b"], "--predictor=static has no weights"),
        (["--checkpoint=nowhere.npz"], r"nowhere\.npz: no such file or folder"),
        (["--predictor=static", "--size=0"], "--size=0: must be at least 1"),
        (["--query_mode=last"], "invalid choice: 'last'"),
        (["--predicto=static"], "unknown option '--predicto': did you mean '--predictor'"),
    ],
)
def test_wrong_options(tmp_path, words, message):
    path = write_davis(tmp_path / "x.pkl", CLIPS[:1])
    with pytest.raises(ConfigError, match=message):
        evaluation.main(["--dataset=davis", f"--data_path={path}", f"--output={tmp_path / 'out'}", *words])


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (lambda q, t: Prediction(np.zeros((q, t + 1, 2)), np.ones((q, t + 1), bool)), "points and frames"),
        (lambda q, t: Prediction(np.full((q, t, 2), np.nan), np.ones((q, t), bool)), "not finite"),
    ],
)
def test_predictors_that_answer_nonsense(tmp_path, monkeypatch, prediction, message):
    path = write_davis(tmp_path / "x.pkl", CLIPS[:1])

    def predictor(video, query_tyx):
        return prediction(len(query_tyx), len(video))

    with pytest.raises(ValueError, match=message):
        run(monkeypatch, predictor, "--dataset=davis", f"--data_path={path}", f"--output={tmp_path / 'out'}")


def test_clips_are_wider_than_high():
    """Else a test with exchanged axes could pass."""
    assert HEIGHT != WIDTH
