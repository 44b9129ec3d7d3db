"""Clips for self-training: the student's window, its exact map, and films that cannot be read."""

from pathlib import Path

import numpy as np
import pytest

from tasks.common.video.encoding import encode_mp4
from tasks.common.video.errors import VideoDataError
from tasks.common.video.skips import SkipReport
from tasks.points.data.unlabelled import (
    StudentView,
    UnlabelledClips,
    WithUnlabelled,
    affine_of,
    cut,
    find_videos,
    student_boxes,
)

HEIGHT, WIDTH, FRAMES = 32, 48, 5


def film(count: int = 12, seed: int = 0) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = [128 + 100 * np.sin(0.3 * (x + 2 * t + seed)) * np.cos(0.2 * y) for t in range(count)]
    return np.repeat(np.stack(waves)[..., None], 3, axis=-1).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    for seed in range(2):
        (tmp_path / "deep" / f"{seed}.mp4").write_bytes(encode_mp4(film(seed=seed)))
    (tmp_path / "notes.txt").write_text("no video")
    return tmp_path


def clips(folder: Path, **options) -> UnlabelledClips:
    settings = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "tracks": 7} | options
    return UnlabelledClips(find_videos(folder), **settings)


def test_an_example_is_a_function_of_seed_and_index(folder: Path) -> None:
    example, again = clips(folder)[3], clips(folder)[3]
    assert {name: (x.shape, x.dtype.name) for name, x in example.items()} == {
        "real_video": ((FRAMES, HEIGHT, WIDTH, 3), "uint8"),
        "student_video": ((FRAMES, HEIGHT, WIDTH, 3), "uint8"),
        "student_affine": ((FRAMES, 2, 3), "float32"),
        "real_query_tyx": ((7, 3), "float32"),
    }
    for name, value in example.items():
        np.testing.assert_array_equal(value, again[name])
        assert (value != clips(folder)[4][name]).any()
        assert (value != clips(folder, seed=1)[3][name]).any()
    queries = example["real_query_tyx"]
    assert (queries[:, 0] % 1 == 0).all()
    assert ((queries >= 0) & (queries < [FRAMES, HEIGHT, WIDTH])).all()


def test_windows_stay_in_the_frame_and_as_large_as_asked_for() -> None:
    for seed in range(20):
        view = StudentView(zoom=(0.5, 0.9))
        boxes = student_boxes(np.random.default_rng(seed), 40, HEIGHT, WIDTH, view)
        assert (boxes[:, :2] >= -1e-9).all()
        assert (boxes[:, 2:] <= np.array([HEIGHT, WIDTH]) + 1e-9).all()
        share = (boxes[:, 2:] - boxes[:, :2]) / (HEIGHT, WIDTH)
        assert (share >= 0.5 - 1e-9).all()
        assert (share <= 0.9 + 1e-9).all()
        assert np.abs(np.diff(boxes, axis=0)).max() < 0.2 * WIDTH  # it wanders, it does not jump
    still = student_boxes(np.random.default_rng(0), 40, HEIGHT, WIDTH, StudentView((1.0, 1.0)))
    np.testing.assert_allclose(still, np.tile([0.0, 0.0, HEIGHT, WIDTH], (40, 1)), atol=1e-9)


def test_the_map_says_where_a_pixel_of_the_clip_is_in_the_students() -> None:
    """A bright square is found where the map puts its middle, at every frame."""
    boxes = student_boxes(np.random.default_rng(1), FRAMES, HEIGHT, WIDTH, StudentView((0.5, 0.8)))
    affine = affine_of(boxes, HEIGHT, WIDTH)
    corners = np.stack([boxes[:, :2], boxes[:, 2:]], axis=1)
    mapped = np.einsum("tij,tnj->tni", affine[..., :2], corners) + affine[:, None, :, 2]
    np.testing.assert_allclose(mapped, np.tile([[0.0, 0.0], [HEIGHT, WIDTH]], (FRAMES, 1, 1)), atol=1e-4)
    video = np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    for t, (y, x) in enumerate(np.round(middle).astype(int)):
        video[t, y - 2 : y + 2, x - 2 : x + 2] = 255
        middle[t] = (y, x)
    shown = cut(video, boxes, quality=95).astype(np.float64)[..., 0]
    shown[shown < 60] = 0
    weights = shown / shown.sum(axis=(1, 2), keepdims=True)
    rows, columns = (np.arange(size) + 0.5 for size in (HEIGHT, WIDTH))
    found = np.stack([(weights.sum(2) * rows).sum(1), (weights.sum(1) * columns).sum(1)], axis=1)
    expected = np.einsum("tij,tj->ti", affine[..., :2], middle) + affine[..., 2]
    np.testing.assert_allclose(found, expected, atol=0.3)


def test_films_that_cannot_be_read_are_named_and_replaced(folder: Path) -> None:
    (folder / "broken.mp4").write_bytes(b"\0" * 100)
    report = SkipReport(folder / "skips.jsonl")
    source = clips(folder, report=report)
    for index in range(8):
        assert source[index]["real_video"].shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert list(report.read()) == [str(folder / "broken.mp4")]
    for path in find_videos(folder):
        path.write_bytes(b"")
    with pytest.raises(VideoDataError, match=r"20 unlabelled videos in a row could not be read"):
        source[0]


def test_a_film_shorter_than_a_clip_ends_on_its_last_frame(tmp_path: Path) -> None:
    (tmp_path / "short.mp4").write_bytes(encode_mp4(film(3)))
    frames = clips(tmp_path)[0]["real_video"]
    np.testing.assert_array_equal(frames[2], frames[-1])
    assert (frames[0] != frames[1]).any()


def test_folders_without_videos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoDataError, match="no such folder"):
        find_videos(tmp_path / "nothing")
    with pytest.raises(VideoDataError, match="no video files in it"):
        find_videos(tmp_path)


def test_labelled_and_unlabelled_examples_come_together(folder: Path) -> None:
    both = WithUnlabelled([{"video": np.zeros(1)}], clips(folder))
    assert len(both) == 1
    assert set(both[0]) == {"video", "real_video", "student_video", "student_affine", "real_query_tyx"}
