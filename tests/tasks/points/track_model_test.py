"""Tracking with a real, tiny, random TAPNext: the command writes what the model says of the whole clip."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import tapnext
from models.tapnext.convert import to_official
from tasks.common.config import load_config, save_resolved, to_json
from tasks.common.errors import ConfigError, RunError
from tasks.common.video.decoding import VideoFile
from tasks.points import track
from tasks.points.resize import resize_video
from tasks.points.track import main
from tasks.points.trained import TrainedModel
from tests.conftest import ROOT
from tests.tasks.common.video.video_files import write_video
from tests.tasks.points.blobs import HEIGHT, WIDTH, film

CONFIG = tapnext.TAPNextConfig(
    image_size=(32, 32), patch_size=(8, 8), width=16, depth=1, num_heads=2, mlp_size=32, head_width=16
)
FRAMES = 11
SCALE = np.array([WIDTH / 32, HEIGHT / 32])  # (x, y): pixels of the video in one of the model
QUERIES_TXY = np.array([[0, 30.0, 40.0], [4, 100.5, 20.25], [9, 64.0, 90.0], [2, 5.0, 5.0]])
CLICKS = [f"--click={x},{y},{int(t)}" for t, x, y in QUERIES_TXY]
TOLERANCE = 1e-3  # pixels of the video, float32


@pytest.fixture(scope="module")
def params() -> Any:
    """Random numbers, without compiling an initialiser, large enough for points to move."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: tapnext.init_params(CONFIG, jax.random.key(0)))
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def checkpoint(params: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tapnext.npz"
    np.savez(path, **to_official(params, CONFIG))
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("films") / "clip.mp4", film(FRAMES))


def run(video: Path, checkpoint: Path, output: Path, *options: str) -> dict[str, np.ndarray]:
    main([f"--video={video}", f"--checkpoint={checkpoint}", f"--output={output}", *options])
    with np.load(output / "clip.npz") as arrays:
        return dict(arrays)


@jax.jit
def apply(params: Any, video: jax.Array, query_tyx: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    output, _ = tapnext.apply(CONFIG, tapnext.TAPNextRuntime(), params, video, query_tyx)
    sure = tapnext.certainty(CONFIG, output.track_logits, output.tracks_yx, 8.0)
    return output.tracks_yx[0], tapnext.is_visible(output.visible_logits)[0], sure[0]


def whole_clip(
    params: Any, frames: np.ndarray, queries_txy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tracks_xy in pixels of the video, visible, certainty) by one call of the model on the whole clip.

    At its own frame a point is where it was asked for.
    """
    tyx = np.stack([queries_txy[:, 0], *(queries_txy[:, 1:] / SCALE).T[::-1]], -1)
    tracks_yx, visible, sure = apply(params, frames[None], tyx[None].astype(np.float32))
    asked = np.arange(len(frames)) == queries_txy[:, :1]
    tracks_xy = np.where(asked[..., None], queries_txy[:, None, 1:], tracks_yx[..., ::-1] * SCALE)
    return tracks_xy, np.asarray(visible) | asked, np.asarray(sure)


def seen(video: Path) -> np.ndarray:
    """Frames as the model gets them."""
    with VideoFile(video) as opened:
        return resize_video(opened.stream(), 32, 32)


def assert_equal(arrays: dict[str, np.ndarray], wanted: Any, known: np.ndarray) -> None:
    tracks, visible, sure = wanted
    np.testing.assert_allclose(arrays["tracks_xy"][known], tracks[known], atol=TOLERANCE)
    np.testing.assert_array_equal(arrays["visible"], visible & known)
    np.testing.assert_allclose(arrays["certainty"][known], sure[known], atol=1e-5)
    assert np.isnan(arrays["tracks_xy"][~known]).all()


def test_tracks_are_those_of_the_whole_clip(
    video: Path, checkpoint: Path, params: Any, tmp_path: Path
) -> None:
    arrays = run(video, checkpoint, tmp_path, *CLICKS, "--chunk=4", "--no_video")
    wanted = whole_clip(params, seen(video), QUERIES_TXY)
    assert np.ptp(wanted[0], axis=1).max() > 10  # they move
    known = np.arange(FRAMES) >= QUERIES_TXY[:, :1]
    assert_equal(arrays, wanted, known)
    summary = json.loads((tmp_path / "clip.json").read_text())
    assert summary["model"]["parameters"] == tapnext.count_params(CONFIG)
    assert (summary["model"]["image_size"], summary["model"]["frame_size"]) == ([32, 32], [32, 32])


def test_backward_is_a_pass_over_the_reversed_clip(
    video: Path, checkpoint: Path, params: Any, tmp_path: Path
) -> None:
    arrays = run(video, checkpoint, tmp_path, *CLICKS, "--chunk=4", "--no_video", "--backward")
    frames = seen(video)
    forward = whole_clip(params, frames, QUERIES_TXY)
    turned = QUERIES_TXY.copy()
    turned[:, 0] = FRAMES - 1 - turned[:, 0]
    reverse = [np.flip(leaf, axis=1) for leaf in whole_clip(params, frames[::-1], turned)]
    before = np.arange(FRAMES) < QUERIES_TXY[:, :1]
    wanted = [
        np.where(before if f.ndim == 2 else before[..., None], r, f)
        for f, r in zip(forward, reverse, strict=True)
    ]
    assert_equal(arrays, wanted, np.ones((4, FRAMES), bool))


@pytest.mark.slow
def test_points_of_a_group_see_each_other_and_no_others(
    video: Path, checkpoint: Path, params: Any, tmp_path: Path
) -> None:
    arrays = run(video, checkpoint, tmp_path, *CLICKS, "--group=3", "--chunk=4", "--no_video")
    frames = seen(video)
    parts = [whole_clip(params, frames, QUERIES_TXY[group]) for group in (slice(0, 3), slice(3, 4))]
    wanted = [np.concatenate(leaves) for leaves in zip(*parts, strict=True)]
    assert_equal(arrays, wanted, np.arange(FRAMES) >= QUERIES_TXY[:, :1])


@pytest.mark.slow
def test_a_larger_size_is_seen_in_the_same_units(video: Path, checkpoint: Path, tmp_path: Path) -> None:
    arrays = run(video, checkpoint, tmp_path, *CLICKS, "--size=64", "--chunk=4", "--dtype=bfloat16")
    tracks = arrays["tracks_xy"][np.isfinite(arrays["certainty"])]
    assert (tracks >= 0).all()
    assert (tracks <= (WIDTH, HEIGHT)).all()
    summary = json.loads((tmp_path / "clip.json").read_text())
    assert summary["model"]["frame_size"] == [64, 64]
    assert summary["model"]["compute_dtype"] == "bfloat16"


def test_a_run_is_found_by_its_workdir(
    video: Path, params: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = to_json(load_config(str(ROOT / "configs" / "tapnext.py")))
    config["model"] |= to_json(CONFIG)
    config["data"] |= {"height": 32, "width": 32}
    save_resolved(tmp_path / "run", config)
    opened = []

    def open_model(path: Path, step: int | None = None) -> TrainedModel:
        opened.append((path, step))
        return TrainedModel(CONFIG, params, None, path)

    monkeypatch.setattr(track, "open_model", open_model)
    words = [f"--video={video}", f"--output={tmp_path}/out", *CLICKS, "--chunk=4", "--no_video"]
    main([*words, f"--workdir={tmp_path}/run", "--step=7"])
    assert opened == [(tmp_path / "run", 7)]
    with np.load(tmp_path / "out" / "clip.npz") as arrays:
        wanted = whole_clip(params, seen(video), QUERIES_TXY)
        assert_equal(dict(arrays), wanted, np.arange(FRAMES) >= QUERIES_TXY[:, :1])
    with pytest.raises(ConfigError, match="is not the workdir of a run: it has no config"):
        main([*words, f"--workdir={tmp_path}"])


def test_what_does_not_fit_the_model_is_refused(video: Path, checkpoint: Path, tmp_path: Path) -> None:
    for size, reason in (
        ("33", "must be multiples of the patch size"),
        ("axb", "--size=axb: must be a number"),
    ):
        with pytest.raises(ConfigError, match=reason):
            run(video, checkpoint, tmp_path / "out", *CLICKS, f"--size={size}")
    with pytest.raises(ConfigError, match="no such file"):
        run(video, tmp_path / "none.npz", tmp_path / "out", *CLICKS)
    (tmp_path / "bad.npz").write_bytes(b"not an npz")
    with pytest.raises(ConfigError, match=r"bad\.npz"):
        run(video, tmp_path / "bad.npz", tmp_path / "out", *CLICKS)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_are_an_error(video: Path, params: Any, tmp_path: Path) -> None:
    bad = jax.tree.map(jnp.asarray, params)
    bad["norm"]["scale"] = jnp.full_like(bad["norm"]["scale"], jnp.nan)
    np.savez(tmp_path / "nan.npz", **to_official(bad, CONFIG))
    with pytest.raises(RunError, match="output is not finite from frame 0 on"):
        run(video, tmp_path / "nan.npz", tmp_path / "out", *CLICKS, "--chunk=4", "--no_video")


_MEMORY = """
import resource, sys
import numpy as np
from tasks.points import following
from tasks.points.track import main
following._WINDOW = 1 << 20  # bytes; many windows in a video of this size
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
short, long, checkpoint, output = sys.argv[1:]
for options in (["--grid=8"], ["--grid=6", "--grid_frame=150", "--backward", "--group=20"]):
    found = []
    for video in (short, long):
        main([f"--video={video}", f"--checkpoint={checkpoint}", f"--output={output}", *options])
        found.append(peak())
    print("peak MiB", *found)
    with np.load(f"{output}/long.npz") as arrays:
        print("frames", arrays["tracks_xy"].shape[1])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(checkpoint: Path, tmp_path: Path, run_python: Any) -> None:
    """5,000 frames and 200 need the same memory, but for the blocks in which tracks are turned (`_BLOCK`)."""
    pictures = film(50)[:, ::3, ::2]
    for name, repeats in (("short", 4), ("long", 100)):
        write_video(tmp_path / f"{name}.mp4", np.tile(pictures, (repeats, 1, 1, 1)), gop=50)
    paths = [str(tmp_path / name) for name in ("short.mp4", "long.mp4")]
    done = run_python("-c", _MEMORY, *paths, str(checkpoint), str(tmp_path / "out"), timeout=850)
    lines = [line.split() for line in done.stdout.splitlines()]
    peaks = [(float(words[2]), float(words[3])) for words in lines if words[:2] == ["peak", "MiB"]]
    assert [words[1] for words in lines if words[0] == "frames"] == ["5000", "5000"]
    assert len(peaks) == 2
    for short, long in peaks:
        # The model's frames alone would be 15 MB, as decoded 31 MB, as drawn 2.6 GB.
        assert long - short < 2 * 16, done.stdout
