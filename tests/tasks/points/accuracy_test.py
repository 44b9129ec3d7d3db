"""bfloat16 against float32: what is compared, how it is summed up, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from launch import bench
from models import tapnext
from models.tapnext import TAPNextConfig, TAPNextRuntime, Tracks
from models.tapnext.convert import to_official
from tasks.common.errors import ConfigError
from tasks.points import accuracy
from tasks.points.accuracy import Difference, compare, summaries
from tests.models.tapnext.small_tapnext import random_params
from tests.tasks.common.video.video_files import write_video
from tests.tasks.points.blobs import HEIGHT, WIDTH, film

CONFIG = TAPNextConfig(
    image_size=(16, 16), patch_size=(8, 8), width=16, depth=1, num_heads=2, mlp_size=32, head_width=16
)
BFLOAT16 = TAPNextRuntime(compute_dtype="bfloat16")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tapnext.npz"
    np.savez(path, **to_official(random_params(CONFIG), CONFIG))
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("films")
    lengths = {"a": 3, "b": 5, "c": 1}
    return [str(write_video(folder / f"{name}.mp4", film(frames))) for name, frames in lengths.items()]


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A tracker whose bfloat16 tracks are off by (3, 4) pixels in frame 1 and see the last point nowhere."""
    calls: list[tuple] = []

    def track_clip(
        config: Any, params: Any, clip: Any, query_tyx: Any, *, runtime: Any, both_ways: bool
    ) -> Tracks:
        calls.append((runtime, jax.config.jax_default_matmul_precision, clip.shape, query_tyx, both_ways))
        tracks = np.tile(query_tyx[:, None, 1:], (1, len(clip), 1))
        visible = np.ones(tracks.shape[:2], bool)
        visible[0] = False
        if runtime.compute_dtype == "bfloat16":
            tracks[:, 1] += (3, 4)
            visible[-1] = False
        return Tracks(tracks, visible, visible.astype(np.float32), visible.astype(np.float32))

    monkeypatch.setattr(tapnext, "track_clip", track_clip)
    return calls


def test_films_are_tracked_in_both_precisions_and_compared(
    tracker: list[tuple], checkpoint: Path, films: list[str]
) -> None:
    rows = accuracy.rows(videos=films[:2], checkpoint=checkpoint, grid=2, frames=4)
    size = f"frames of {WIDTH} x {HEIGHT}"
    assert [(row["case"], row["compared"], row["values"]) for row in rows] == [
        (f"a.mp4, 3 {size}", "all points", 12),
        (f"a.mp4, 3 {size}", "visible points", 9),
        (f"b.mp4, 4 {size}", "all points", 16),
        (f"b.mp4, 4 {size}", "visible points", 12),
        ("all 2 films", "all points", 28),
        ("all 2 films", "visible points", 21),
    ]
    # Of 3 frames one is off by 5 pixels, of 4 points one is no longer seen.
    first, seen = rows[:2]
    assert (first["mean px"], first["median px"], first["95 % px"], first["largest px"]) == (1.67, 0, 5, 5)
    assert (first["visibility agreement"], seen["visibility agreement"]) == (0.75, round(2 / 3, 4))
    assert rows[4]["mean px"] == float(f"{5 * 8 / 28:.3g}")
    assert all(row.keys() == first.keys() for row in rows)
    (exact, precision, shape, query_tyx, both_ways), (rounded, usual, *_) = tracker[:2]
    assert (exact, precision) == (TAPNextRuntime(), "highest")
    assert (rounded, usual) == (BFLOAT16, None)
    assert (shape, both_ways) == ((3, 16, 16, 3), False)
    np.testing.assert_array_equal(query_tyx, [[0, 4, 4], [0, 4, 12], [0, 12, 4], [0, 12, 12]])


def test_the_command_takes_films_weights_and_settings(
    tracker: list[tuple], checkpoint: Path, films: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    setting = "--set=runtime.residual_dtype=bfloat16"
    bench.main(["tasks.points", "--accuracy", *films[:2], f"--checkpoint={checkpoint}", setting])
    assert tracker[1][0] == TAPNextRuntime(compute_dtype="bfloat16", residual_dtype="bfloat16")
    assert len(tracker) == 4
    assert "all 2 films" in capsys.readouterr().out


def test_a_real_model_differs_by_its_rounding() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    query_tyx = np.array([[0, 3, 5], [0, 12.5, 7]], np.float32)
    found = compare(CONFIG, random_params(CONFIG), clip, query_tyx, BFLOAT16)
    assert found.pixels.shape == found.visible.shape == found.agrees.shape == (2, 2)
    assert np.isfinite(found.pixels).all()
    assert found.pixels.any()
    assert np.median(found.pixels) < 1


def test_where_no_point_is_seen_there_are_no_figures() -> None:
    nowhere = np.zeros((2, 3), bool)
    every, seen = summaries(Difference(np.full((2, 3), 0.5), nowhere, ~nowhere))
    assert (every["values"], every["median px"], every["visibility agreement"]) == (6, 0.5, 1)
    assert (seen["values"], seen["median px"], seen["visibility agreement"]) == (0, "-", "-")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda given: given | {"videos": ()}, "--accuracy: on which films"),
        (lambda given: given | {"checkpoint": None}, "--checkpoint=RUN|FILE is missing"),
        (lambda given: given | {"checkpoint": Path("nowhere.npz")}, "nowhere.npz: no such file"),
        (lambda given: given | {"videos": [str(given["checkpoint"])]}, "--accuracy .*tapnext.npz: "),
        (lambda given: given | {"videos": given["films"][2:]}, "it has one frame"),
        (lambda given: given | {"settings": "runtime.compute_type=float16"}, "did you mean"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    options: Callable[[dict], dict], message: str, tracker: list[tuple], checkpoint: Path, films: list[str]
) -> None:
    given = {"videos": films[:1], "checkpoint": checkpoint, "films": films}
    asked = options(given)
    del asked["films"]
    with pytest.raises(ConfigError, match=message):
        accuracy.rows(**asked)
    assert not tracker
