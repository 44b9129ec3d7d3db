"""The evaluation command on held-out clips: figures worked out by hand, for controls and for a model."""

import csv
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from models import tapnext
from tasks.common.errors import ConfigError
from tasks.points import eval as evaluation
from tasks.points import weight_files
from tasks.points.data.clip_records import prepare_clips
from tasks.points.data.clips import ANY_FRAME, PointClip
from tasks.points.data.npz_folder import find_npz
from tests.tasks.points.data.point_clips import write_npz

SIDE = 32  # a pixel is 8 of TAP-Vid's 256


def clip(step: float) -> PointClip:
    """Six frames. Point A stands still and is always seen; B is seen in the last two frames only, between
    which it moves `step` pixels to the right."""
    rng = np.random.default_rng(0)
    video = np.repeat(rng.integers(0, 255, (1, SIDE, SIDE, 3)), 6, axis=0).astype(np.uint8)
    tracks_yx = np.tile(np.array([[[8.5, 9.5]], [[20.5, 12.5]]], np.float32), (1, 6, 1))
    tracks_yx[1, 5, 1] += step
    visible = np.array([[True] * 6, [False] * 4 + [True] * 2])
    return PointClip(video, tracks_yx, visible, np.full(2, ANY_FRAME, np.int32))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """validation/: two clips, whose B moves a pixel and not at all; train/: another."""
    folder = tmp_path_factory.mktemp("clips")
    for name, step in (("validation/a", 1.0), ("validation/b", 0.0), ("train/c", 5.0)):
        write_npz(folder / "npz" / f"{name}.npz", clip(step))
    for split in ("train", "validation"):
        prepare_clips(find_npz(folder / "npz" / split), folder / "records" / split, quality=0, workers=1)
    return folder / "records"


def run(records: Path, output: Path, *words: str) -> dict[str, Any]:
    evaluation.main(["--dataset=records", f"--data_path={records}", f"--output={output}", *words])
    return json.loads((output / "summary.json").read_text())


# Points that do not move, by hand. First: A counts in 5 frames, all right; B in the last, 8 pixels off, which
# is not less than 8. Strided, queries at frames 0 (A) and 5 (A, B): 15 frames count, on 11 of which a point
# is seen; B is said to be seen in the 4 frames before, where it is not, and is 8 off in frame 4.
BY_HAND = {
    "first": {
        "pts_within_4": 5 / 6, "pts_within_8": 5 / 6, "pts_within_16": 1.0,
        "average_pts_within_thresh": 13 / 15,
        "jaccard_8": 5 / 7, "jaccard_16": 1.0, "average_jaccard": 27 / 35, "occlusion_accuracy": 1.0,
    },
    "strided": {
        "pts_within_4": 10 / 11, "pts_within_8": 10 / 11, "pts_within_16": 1.0,
        "average_pts_within_thresh": 51 / 55, "jaccard_8": 10 / 16, "jaccard_16": 11 / 15,
        "average_jaccard": 97 / 150, "occlusion_accuracy": 11 / 15,
    },
}  # fmt: skip
# The other clip: B is right wherever it is seen.
STILL = {
    "first": {"average_jaccard": 1.0, "average_pts_within_thresh": 1.0, "occlusion_accuracy": 1.0},
    "strided": {"average_jaccard": 11 / 15, "average_pts_within_thresh": 1.0, "occlusion_accuracy": 11 / 15},
}


@pytest.mark.parametrize("mode", ["first", "strided"])
def test_figures_of_points_that_do_not_move_are_those_by_hand(
    records: Path, tmp_path: Path, mode: str
) -> None:
    summary = run(records, tmp_path, "--predictor=static", f"--query_mode={mode}", "--worst=1")
    rows = list(csv.DictReader((tmp_path / "per_video.csv").open()))
    assert [Path(row["video"]).stem for row in rows] == ["a", "b"]  # train/ is not looked at
    assert [row["queries"] for row in rows] == ["2" if mode == "first" else "3"] * 2
    for name, value in BY_HAND[mode].items():
        assert float(rows[0][name]) == pytest.approx(value, abs=1e-6), name
    for name, value in STILL[mode].items():
        assert float(rows[1][name]) == pytest.approx(value, abs=1e-6), name
        assert summary["means"][name] == pytest.approx((BY_HAND[mode][name] + value) / 2, rel=1e-9), name
    assert (summary["dataset"], summary["size"]) == ("records", 256)
    assert Image.open(tmp_path / "worst.png").height > 200


def test_an_evaluation_goes_on_where_it_was(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--predictor=static", "--worst=0")
    first = run(records, tmp_path, *words)
    (tmp_path / "videos" / "00001.npz").unlink()
    capsys.readouterr()
    assert run(records, tmp_path, *words) == first
    printed = capsys.readouterr().out.splitlines()
    assert f"records: all clips of {records / 'validation'}" in printed
    assert ["from before" in line for line in printed if line.startswith("[")] == [True, False]
    with pytest.raises(ConfigError, match="holds another evaluation"):
        run(records, tmp_path, *words, "--clips=1")


def test_lucas_kanade_sees_that_nothing_moves(records: Path, tmp_path: Path) -> None:
    summary = run(records, tmp_path, "--predictor=lucas_kanade", "--clips=1", "--worst=0")
    assert summary["videos"] == 1
    assert summary["means"]["pts_within_1"] == pytest.approx(5 / 6)


def test_generated_clips_are_drawn_by_the_configuration_given(tmp_path: Path) -> None:
    words = ["--predictor=static", "--config=configs/tapnext.py:image=32,frames=4", "--worst=0", "--clips=2"]
    evaluation.main(["--dataset=generated", f"--output={tmp_path}", *words, "--config.data.generated_seed=5"])
    rows = list(csv.DictReader((tmp_path / "per_video.csv").open()))
    assert [row["video"] for row in rows] == ["generated:validation:5:0", "generated:validation:5:1"]
    assert [row["frames"] for row in rows] == ["4", "4"]


CONFIG = tapnext.TAPNextConfig(
    image_size=(32, 32), patch_size=(8, 8), width=16, depth=1, num_heads=2, mlp_size=32, head_width=16
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random ones."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: tapnext.init_params(CONFIG, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    path.write_bytes(weight_files.pack_weights(params, CONFIG, {}))
    return path


def test_a_model_is_scored_at_its_own_size(records: Path, weights: Path, tmp_path: Path) -> None:
    summary = run(records, tmp_path, f"--checkpoint={weights}", "--worst=0")
    assert summary["size"] == 32
    assert summary["model"]["image_size"] == [32, 32]
    model = weight_files.load_weights(weights)
    video = clip(1.0).video
    query_tyx = np.array([[[0, 8.5, 9.5], [4, 20.5, 12.5]]], np.float32)
    apply = jax.jit(lambda *given: tapnext.apply(CONFIG, tapnext.TAPNextRuntime(), *given)[0])
    output = apply(model.params, video[None], query_tyx)
    with np.load(tmp_path / "videos" / "00000.npz") as found:
        np.testing.assert_allclose(found["tracks_xy"][0] / 8, output.tracks_yx[0, 0, :, ::-1], atol=2e-3)
        np.testing.assert_allclose(found["tracks_xy"][1, 4:] / 8, output.tracks_yx[0, 1, 4:, ::-1], atol=2e-3)


def test_without_weights_those_that_ship_are_used(
    records: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "DEFAULT", tmp_path / "weights" / "default.safetensors")
    with pytest.raises(ConfigError, match=r"give one of --workdir=RUN .* there are no default weights"):
        run(records, tmp_path / "out")
    (tmp_path / "weights").mkdir()
    weight_files.DEFAULT.write_bytes(weights.read_bytes())
    record = {"sha256": weight_files.checksum(weights)}
    weight_files.DEFAULT.with_suffix(".json").write_text(json.dumps(record))
    summary = run(records, tmp_path / "out", "--clips=1", "--worst=0")
    assert summary["model"]["width"] == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset=davis", "--clips=2"], r"--clips belongs to --dataset=generated\|records"),
        (["--dataset=records"], "dataset records: needs --data_path=FOLDER"),
        (["--dataset=records", "--data_path=RECORDS", "--clips=-1"], "-1 clips: must be at least 1"),
        (["--dataset=generated", "--data_path=RECORDS"], "reads no files: leave out --data_path"),
        (
            ["--dataset=records", "--data_path=RECORDS", "--workdir=nowhere"],
            "nowhere: no such file or folder",
        ),
        (["--dataset=records", "--data_path=RECORDS", "--checkpoint=x"], "static has no weights"),
    ],
)
def test_wrong_options_are_said(records: Path, tmp_path: Path, words: list[str], message: str) -> None:
    given = [word.replace("RECORDS", str(records)) for word in words]
    predictor = [] if "--workdir=nowhere" in given else ["--predictor=static"]
    with pytest.raises(ConfigError, match=message):
        evaluation.main([*given, *predictor, f"--output={tmp_path / 'out'}"])
