"""Clips of every source as videos to evaluate on: the same places, and only what was held out."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tasks.points.data.clip_records import prepare_clips
from tasks.points.data.clip_sets import ClipSet, open_clip_set, tracked_clips
from tasks.points.data.clips import PointClip
from tasks.points.data.config import PointsDataConfig
from tasks.points.data.npz_folder import find_npz
from tasks.points.data.sets import open_set
from tasks.points.data.tracked_video import PointDataError
from tests.tasks.points.data.point_clips import moving_clip, write_npz

DRAWN = PointsDataConfig(
    frames=3, height=32, width=48, tracks=6, generated_held_out=2, generated_most=2, generated_cached=5
)


def names(found: ClipSet) -> list[str]:
    return [Path(video.name).stem for video in found.videos.videos]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """npz files in train/ and validation/, of different clips."""
    for split, seeds in (("train", range(4)), ("validation", range(10, 12))):
        for seed in seeds:
            write_npz(tmp_path / "npz" / split / f"{split}{seed}.npz", moving_clip(seed=seed))
    return tmp_path / "npz"


@dataclasses.dataclass(frozen=True)
class One:
    """A source of a single clip."""

    clip: PointClip

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return "one"

    def key(self, index: int) -> str:
        return "one"

    def open(self, index: int) -> PointClip:
        return self.clip


def test_places_are_shares_of_the_frame_and_what_is_not_visible_is_occluded() -> None:
    clip = moving_clip(frames=6, height=24, width=32, points=5)
    clip.tracks_yx[2, 4] = (-3.0, 60.0)  # beyond the frame
    clip.visible[2, 4] = False
    (video,) = tracked_clips(One(clip)).videos
    assert np.array_equal(video.occluded, ~clip.visible)
    assert video.occluded[2, 4]
    np.testing.assert_array_equal(video.tracks_xy[..., 0] * 32, clip.tracks_yx[..., 1].astype(np.float64))
    np.testing.assert_allclose(video.tracks_xy[..., 1] * 24, clip.tracks_yx[..., 0], rtol=1e-15)
    assert np.array_equal(np.stack(list(video.frames())), clip.video)
    # What is visible must be in the frame: a source that says otherwise is refused, not scored.
    clip.visible[2, 4] = True
    with pytest.raises(PointDataError, match="one: point 2 is visible at frame 4 at y = -3, x = 60"):
        tracked_clips(One(clip))


def test_only_the_held_out_clips_of_a_folder_are_taken(folder: Path) -> None:
    found = open_clip_set("npz", folder)
    assert names(found) == ["validation10", "validation11"]
    assert found.described == f"all clips of {folder / 'validation'}"
    assert names(open_clip_set("npz", folder, most=1)) == ["validation10"]
    assert names(open_clip_set("npz", folder / "train")) == [f"train{i}" for i in range(4)]


def test_of_the_folder_a_run_was_trained_on_its_own_held_out_clips_are_taken(folder: Path) -> None:
    run = PointsDataConfig(source="npz", path=str(folder / "train"), held_out_fraction=0.25)
    found = open_clip_set("npz", folder / "train", run)
    assert names(found) == ["train3"]
    assert found.described == f"what the run held out of {folder / 'train'}"
    assert (
        len(open_clip_set("npz", folder / "validation", run).videos.videos) == 2
    )  # another folder: all of it
    everything = dataclasses.replace(run, held_out_fraction=0.0)
    with pytest.raises(PointDataError, match=r"nothing is held out of .*train to evaluate on"):
        open_clip_set("npz", folder / "train", everything)


def test_records_are_taken_too(folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "records" / "validation"
    prepare_clips(find_npz(folder / "validation"), shards, quality=0, workers=1)
    assert names(open_clip_set("records", tmp_path / "records")) == ["validation10", "validation11"]
    (video, _) = open_clip_set("records", shards).videos.videos
    assert np.array_equal(np.stack(list(video.frames())), moving_clip(seed=10).video)


def test_generated_clips_are_those_a_run_holds_out() -> None:
    found = open_clip_set("generated", None, DRAWN)
    assert found.described == "held-out clips of 3 frames of 32 x 48 pixels, seed 0"
    assert [video.name for video in found.videos.videos] == [
        "generated:validation:0:0",
        "generated:validation:0:1",
    ]
    (frame, *_) = found.videos.videos[0].frames()
    assert frame.shape == (32, 48, 3)
    # Trained on something else: still clips of that size.
    other = dataclasses.replace(DRAWN, source="npz", path="x")
    again = open_clip_set("generated", None, other)
    assert np.array_equal(again.videos.videos[1].tracks_xy, found.videos.videos[1].tracks_xy)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda folder: open_clip_set("kubric", folder),
            "no clips of source 'kubric': there are generated, rec",
        ),
        (lambda folder: open_clip_set("npz", None), "dataset npz: needs --data_path=FOLDER"),
        (lambda folder: open_clip_set("npz", folder / "nowhere"), "nowhere: no such folder"),
        (lambda folder: open_clip_set("npz", folder, most=-1), "-1 clips: must be at least 1, or 0 for all"),
        (lambda folder: open_clip_set("records", folder), "not a folder of shards; make one by"),
        (
            lambda folder: open_clip_set("generated", folder),
            "generated: reads no files: leave out --data_path",
        ),
        (
            lambda folder: open_clip_set("generated", None, dataclasses.replace(DRAWN, generated_held_out=0)),
            "dataset generated: nothing is held out of it",
        ),
        (
            lambda folder: open_set("kubric"),
            "davis, .*, folder, generated, records, npz, pointodyssey, or a folder",
        ),
    ],
)
def test_what_is_wrong_is_said(folder: Path, call: Callable[[Path], object], message: str) -> None:
    with pytest.raises(PointDataError, match=message):
        call(folder)


def test_a_folder_with_training_clips_only_is_not_evaluated_on(folder: Path) -> None:
    (folder / "validation").rename(folder / "elsewhere")
    with pytest.raises(PointDataError, match=r"dataset npz: nothing is held out of .*npz to evaluate on"):
        open_clip_set("npz", folder)


def test_a_damaged_clip_is_named(folder: Path) -> None:
    (folder / "validation" / "validation11.npz").write_bytes(b"PK")
    with pytest.raises(PointDataError, match=r"validation11\.npz: not a readable \.npz file"):
        open_clip_set("npz", folder)
