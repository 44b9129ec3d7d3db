"""Clips to examples: what is refused, which frames and points are taken, what replaces a bad clip."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from tasks.common.data import Batches
from tasks.common.epochs import EpochOrder
from tasks.common.video.errors import VideoDataError, VideoError
from tasks.common.video.skips import SkipReport
from tasks.points.data.augment import AugmentConfig
from tasks.points.data.clips import PointClip, check_clip, place_outside
from tasks.points.data.examples import (
    HeldOutExamples,
    Kept,
    LatestKept,
    Shape,
    TrainExamples,
    cut_frames,
    draw_query_frames,
    make_example,
)
from tests.tasks.points.data.point_clips import ListedClips, moving_clip

SHAPE = Shape(frames=6, height=24, width=32, tracks=5)


@pytest.mark.usefixtures("unchecked_types")
def test_what_is_wrong_with_a_clip_is_named() -> None:
    clip = moving_clip()
    assert check_clip(clip, "x") is clip
    nan, swapped, far = clip.tracks_yx.copy(), clip.tracks_yx.copy(), clip.tracks_yx.copy()
    nan[2, 3, 1] = np.nan
    swapped = swapped[..., ::-1] + (0, 0)
    swapped[0, 0, 1], swapped[0, 0, 0] = 10.5, 29.5  # y and x, exchanged: y would be outside
    far[1, 0] = (24.0, 3.0)
    hidden = np.zeros(5, np.int32)
    hidden[4] = 5
    blocked = clip.visible.copy()
    blocked[4, 5] = False
    none = replace(clip, tracks_yx=clip.tracks_yx[:0], visible=clip.visible[:0], query_frames=hidden[:0])
    cases = [
        (replace(clip, tracks_yx=nan), r"point 2 at frame 3 is \[.*nan\]: coordinates must be finite"),
        (
            replace(clip, tracks_yx=far),
            "point 1 is visible at frame 0 at y = 24, x = 3, outside the frame",
        ),
        (replace(clip, tracks_yx=swapped), r"as \(x, y\) all would be inside; tracks_yx is \(y, x\)"),
        (replace(clip, query_frames=np.full(5, 6, np.int32)), r"query frames 6\.\.6 of 5 points: outside"),
        (replace(clip, query_frames=np.full(5, -2, np.int32)), "outside the clip of 6 frames"),
        (
            replace(clip, query_frames=hidden, visible=blocked),
            "point 4 is asked for at frame 5, where it is",
        ),
        (replace(clip, visible=clip.visible[:, :4]), r"expected \(points, 6, 2\) and \(points, 6\)"),
        (none, "no points"),
    ]
    for bad, message in cases:
        with pytest.raises(VideoError, match=f"^x: .*{message}"):
            check_clip(bad, "x")


def test_unknown_places_are_outside() -> None:
    clip = moving_clip()
    placed = place_outside(clip.tracks_yx, ~clip.visible, 24, 32)
    assert np.array_equal(placed[clip.visible], clip.tracks_yx[clip.visible])
    assert np.all(placed[~clip.visible] == (-24, -32))


def test_an_example_holds_what_the_clip_holds() -> None:
    clip = moving_clip()
    example = TrainExamples(ListedClips((clip,)), SHAPE)[0]
    assert {k: (v.shape, str(v.dtype)) for k, v in example.items()} == {
        "video": ((6, 24, 32, 3), "uint8"),
        "query_tyx": ((5, 3), "float32"),
        "tracks_yx": ((5, 6, 2), "float32"),
        "visible": ((5, 6), "bool"),
        "valid": ((5,), "bool"),
    }
    assert np.array_equal(example["video"], clip.video)
    assert np.array_equal(example["tracks_yx"], clip.tracks_yx)
    assert np.array_equal(example["visible"], clip.visible)
    assert np.array_equal(example["query_tyx"], np.c_[np.zeros(5), clip.tracks_yx[:, 0]])
    assert example["valid"].all()


def test_a_query_lies_on_its_track() -> None:
    """Whether the clip says when a point is asked for, or it is drawn; and with augmentations."""
    asked = replace(moving_clip(frames=9), query_frames=np.array([3, 0, 8, -1, -1], np.int32))
    busy = AugmentConfig(homography=1.0, flip_horizontal=0.5, crop=0.5)
    shape, frames = replace(SHAPE, frames=9), set()
    for augmentation in (AugmentConfig(), busy):
        source = TrainExamples(ListedClips((asked,)), shape, augmentation)
        for index in range(20):
            example = source[index]
            for point in np.flatnonzero(example["valid"]):
                t, *place = example["query_tyx"][point]
                assert example["visible"][point, int(t)]
                assert np.array_equal(example["tracks_yx"][point, int(t)], place)
                frames.add(int(t))
    assert len(frames) > 5
    plain = TrainExamples(ListedClips((asked,)), shape)[0]
    assert plain["query_tyx"][:3, 0].tolist() == [3, 0, 8]


def test_frames_are_scaled_and_places_with_them() -> None:
    clip = moving_clip()
    example = TrainExamples(ListedClips((clip,)), replace(SHAPE, height=48, width=96))[0]
    assert example["video"].shape == (6, 48, 96, 3)
    assert np.allclose(example["tracks_yx"], clip.tracks_yx * (2, 3))
    # The bright pixel is where its point is.
    y, x = example["tracks_yx"][0, 0].astype(int)
    assert example["video"][0, y, x].min() > 150


def test_fewer_points_are_filled_up_and_more_are_drawn() -> None:
    clip = moving_clip(points=5)
    few = TrainExamples(ListedClips((clip,)), replace(SHAPE, tracks=8))[0]
    assert few["valid"].tolist() == [True] * 5 + [False] * 3
    assert not few["visible"][5:].any()
    assert not few["tracks_yx"][5:].any()
    many = TrainExamples(ListedClips((clip,)), replace(SHAPE, tracks=3))
    drawn = {tuple(many[i]["tracks_yx"][:, 0, 0]) for i in range(20)}
    assert len(drawn) > 3
    assert all(set(rows) <= set(clip.tracks_yx[:, 0, 0]) for rows in drawn)


def test_points_that_are_never_visible_are_left_out() -> None:
    clip = moving_clip()
    seen = clip.visible.copy()
    seen[3] = False
    query = np.full(5, -1, np.int32)
    example = TrainExamples(ListedClips((replace(clip, visible=seen, query_frames=query),)), SHAPE)[0]
    assert example["valid"].sum() == 4
    kept = np.delete(clip.tracks_yx, 3, axis=0)
    assert np.array_equal(np.sort(example["tracks_yx"][:4, 0], axis=0), np.sort(kept[:, 0], axis=0))
    blind = replace(clip, visible=np.zeros_like(seen), query_frames=query)
    assert not make_example(np.random.default_rng(0), blind, 5)["valid"].any()
    with pytest.raises(VideoError, match="no point is visible in any frame"):
        check_clip(blind, "x")


def test_a_draw_without_points_is_no_fault_of_the_clip() -> None:
    """A point in one corner, which most crops cut off: drawn again, at last without a crop."""
    clip = moving_clip(points=1)
    corner = np.full((1, 6, 2), 0.5, np.float32)
    clip = replace(clip, tracks_yx=corner, visible=np.ones((1, 6), bool))
    source = TrainExamples(ListedClips((clip,)), SHAPE, AugmentConfig(crop=1.0, least_area=0.3))
    assert all(source[index]["valid"].sum() == 1 for index in range(20))
    assert source.report.read() == {}
    # Visible for one frame of a long clip: windows without it are examples without a valid point.
    late = moving_clip(frames=40, points=1, width=64)
    seen = np.zeros((1, 40), bool)
    seen[0, 39] = True
    late = replace(late, visible=seen, query_frames=np.array([-1], np.int32))
    source = TrainExamples(ListedClips((late,)), replace(SHAPE, width=64))
    assert {int(source[index]["valid"].sum()) for index in range(20)} == {0, 1}
    assert source.report.read() == {}


def test_query_frames_are_visible_and_mostly_early() -> None:
    clip = moving_clip(frames=20, points=1, width=64)
    seen = np.zeros((2000, 20), bool)
    seen[:, [4, 5, 9, 15, 18]] = True
    many = replace(
        clip,
        tracks_yx=np.repeat(clip.tracks_yx, 2000, 0),
        visible=seen,
        query_frames=np.full(2000, -1, np.int32),
    )
    at = draw_query_frames(np.random.default_rng(0), many)
    counts = np.bincount(at, minlength=20)
    assert counts.sum() == counts[[4, 5, 9, 15, 18]].sum() == 2000
    assert 0.4 < counts[4] / 2000 < 0.55
    assert counts[18] > 100
    fixed = replace(many, query_frames=np.full(2000, 9, np.int32))
    assert set(draw_query_frames(np.random.default_rng(0), fixed)) == {9}


def test_windows_of_longer_clips() -> None:
    clip = replace(moving_clip(frames=11), query_frames=np.array([0, 2, 3, 4, 10], np.int32))
    cut = cut_frames(clip, replace(SHAPE, frames=4, stride=2), 0.5, "x")  # frames 2, 4, 6, 8
    assert np.array_equal(cut.video, clip.video[2:9:2])
    assert np.array_equal(cut.tracks_yx, clip.tracks_yx[:, 2:9:2])
    assert cut.query_frames.tolist() == [-1, 0, -1, 1, -1]
    assert len(cut_frames(clip, replace(SHAPE, frames=11), 0.9, "x").video) == 11
    last = cut_frames(clip, SHAPE, 0.999999, "x")
    assert np.array_equal(last.video, clip.video[5:])
    with pytest.raises(VideoError, match="11 frames; 7 at stride 2 need 13"):
        cut_frames(clip, replace(SHAPE, frames=7, stride=2), 0.0, "x")


def test_a_clip_that_cannot_be_used_is_replaced_and_reported(tmp_path) -> None:
    good, short = moving_clip(seed=1), moving_clip(frames=3)
    nan = replace(
        good, tracks_yx=np.where(np.arange(5)[:, None, None] == 1, np.float32("nan"), good.tracks_yx)
    )
    report = SkipReport(tmp_path / "left_out.jsonl")
    source = TrainExamples(ListedClips((None, short, nan, good)), SHAPE, report=report)
    for index in range(4):
        assert np.array_equal(source[index]["video"], good.video)
    found = SkipReport(tmp_path / "left_out.jsonl").read()
    assert sorted(found) == ["clip 0", "clip 1", "clip 2"]
    assert found["clip 0"] == "is broken"
    assert "3 frames; 6 at stride 1 need 6" in found["clip 1"]
    assert "coordinates must be finite" in found["clip 2"]
    with pytest.raises(VideoDataError, match=r"clip 0 and the 1 clips after it cannot be used; .*is broken"):
        TrainExamples(ListedClips((None, None)), SHAPE)[0]
    with pytest.raises(VideoDataError, match="no clips to train on"):
        TrainExamples(ListedClips(()), SHAPE)


def test_held_out_examples_are_the_same_every_time() -> None:
    clip = moving_clip(frames=9, points=9)
    source = HeldOutExamples(ListedClips((clip, None)), SHAPE)
    first, again = source[0], pickle.loads(pickle.dumps(source))[0]
    assert all(np.array_equal(first[k], again[k]) for k in first)
    assert np.array_equal(first["video"], clip.video[:6])
    black = source[1]
    assert {k: v.shape for k, v in black.items()} == {k: v.shape for k, v in first.items()}
    assert not black["valid"].any()
    assert not black["video"].any()
    assert source.report.known("clip 1")


def test_batches_are_a_pure_function_of_seed_and_number() -> None:
    clips = ListedClips(tuple(moving_clip(seed=i, points=9) for i in range(5)))
    busy = AugmentConfig(
        roll=0.5, homography=0.5, flip_horizontal=0.5, flip_vertical=0.5, crop=0.5, colour=0.5
    )

    def batches(seed: int) -> Batches:
        return Batches(TrainExamples(clips, SHAPE, busy, seed), 3, seed, EpochOrder(5, 3, seed))

    first = [batches(0)[k] for k in range(4)]
    with batches(0).iterate(start=2) as iterator:
        for k in (2, 3):
            read = next(iterator)
            assert all(np.array_equal(read[name], first[k][name]) for name in read)
    assert not np.array_equal(first[0]["video"], batches(1)[0]["video"])
    # Clip 0 again, an epoch later: other draws.
    examples = TrainExamples(clips, SHAPE, busy, 0)
    assert not np.array_equal(examples[0]["video"], examples[5]["video"])


@pytest.mark.slow
def test_worker_processes_read_the_same_batches() -> None:
    clips = ListedClips(tuple(moving_clip(seed=i) for i in range(4)))
    batches = Batches(TrainExamples(clips, SHAPE, AugmentConfig(roll=1.0)), 2, 0, EpochOrder(4, 2, 0))
    with batches.iterate(num_workers=2) as iterator:
        for k in range(3):
            read = next(iterator)
            assert all(np.array_equal(read[name], batches[k][name]) for name in read)


@pytest.mark.parametrize("options", [{"frames": 0}, {"tracks": 0}, {"stride": 0}, {"height": 8}])
def test_impossible_shapes(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1|at least 16 x 16"):
        replace(SHAPE, **options)


@dataclass(frozen=True)
class CountedClips(ListedClips):
    """Notes which are opened."""

    opened: list[int] = field(default_factory=list)

    def open(self, index: int) -> PointClip:
        self.opened.append(index)
        return super().open(index)


def test_a_clip_shown_again_is_not_opened_again() -> None:
    """And a batch holds what it would hold if it were: here, in other threads, and in another process."""
    clips = CountedClips((moving_clip(points=12, frames=9), None, moving_clip(points=12, frames=9, seed=1)))
    busy = AugmentConfig(homography=0.5, flip_horizontal=0.5, colour=0.5)
    order = EpochOrder(3, 6, seed=3, repeats=4)
    kept = TrainExamples(LatestKept(clips), SHAPE, busy, seed=3)
    found = [Batches(kept, 6, 3, order)[k] for k in range(2)]
    # Three clips four times each; the one that cannot be read is replaced, and known from then on.
    assert sorted(set(clips.opened)) == [0, 1, 2]
    assert len(clips.opened) <= 4
    plain = Batches(TrainExamples(clips, SHAPE, busy, seed=3), 6, 3, order)
    copied = Batches(pickle.loads(pickle.dumps(kept)), 6, 3, order)
    with ThreadPoolExecutor(3) as pool:
        threads = list(pool.map(Batches(kept, 6, 3, order).__getitem__, [0, 1, 0, 1]))
    for k, batch in enumerate(found):
        for other in (plain[k], copied[k], *threads[k::2]):
            assert all(np.array_equal(batch[key], other[key]) for key in batch)
    # Drawn anew each time: other points of the twelve, other augmentations.
    assert len({row.tobytes() for batch in found for row in batch["tracks_yx"]}) == 12


def test_clips_are_kept_as_long_as_they_fit() -> None:
    """And examples are what they would be without; a clip that cannot be read is tried again."""
    good = [moving_clip(points=12, frames=9, seed=seed) for seed in range(3)]
    clips = CountedClips((good[0], None, *good[1:]))
    kept = Kept(clips, most_bytes=2 * good[0].video.nbytes)
    examples = HeldOutExamples(kept, SHAPE)
    plain = HeldOutExamples(ListedClips((good[0], None, *good[1:])), SHAPE)
    for _ in range(2):
        for index in range(4):
            found, wanted = examples[index], plain[index]
            assert all(np.array_equal(found[key], wanted[key]) for key in wanted)
    assert clips.opened == [0, 1, 2, 3, 1, 3], "two fit, the third is opened every time"
    with pytest.raises(ValueError, match="read-only"):
        kept.open(0).video[:] = 0
    copied = pickle.loads(pickle.dumps(kept))
    assert (copied.most_bytes, copied.name(1)) == (kept.most_bytes, kept.name(1))
