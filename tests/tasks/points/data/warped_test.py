"""Warped frames of films: pictures and tracks agree, everything is seen, bad films are named."""

import dataclasses
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from tasks.common.video.errors import VideoDataError, VideoError
from tasks.points.data.__main__ import main
from tasks.points.data.clip_records import RecordClips
from tasks.points.data.clips import PointClip, check_clip
from tasks.points.data.render import sample
from tasks.points.data.warped import WarpConfig, WarpedClips, find_films, warped_clips
from tests.tasks.common.video.video_files import write_video

SMALL = WarpConfig(
    frames=5, height=48, width=64, points=60, cut=0.0, slowest=0.03, fastest=0.06, exposure=0.0
)
OPTIONS = ["--frames=4", "--height=32", "--width=40", "--points=12", "--workers=1"]


def picture(seed: int, height: int = 96, width: int = 128, low: int = 100) -> np.ndarray:
    """Smooth waves in every direction, of three colours, from `low` to 250."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width][..., None]
    waves = rng.uniform(-0.25, 0.25, (2, 8))
    total = np.sin(y * waves[0] + x * waves[1] + rng.uniform(0, 6.3, 8)) @ rng.normal(size=(8, 3))
    total = (total - total.min()) / np.ptp(total)
    return (low + (250 - low) * total).astype(np.uint8)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three films whose only picture never changes."""
    folder = tmp_path_factory.mktemp("films")
    for seed, name in enumerate(("a.mp4", "b/c.mp4", "d.mp4")):
        write_video(folder / name, np.stack([picture(seed)] * 6), options={"crf": "1"})
    return folder


def clips(films: Path, count: int = 6, **options: object) -> WarpedClips:
    return warped_clips(dataclasses.replace(SMALL, **options), films, {"train": 0, "validation": count})[
        "validation"
    ]


def colours(clip: PointClip) -> np.ndarray:
    """float [N, T, 3]: what the frames show at the places of the tracks."""
    places = clip.tracks_yx[..., ::-1]
    return np.stack(
        [sample(frame, places[:, t : t + 1])[:, 0] for t, frame in enumerate(clip.video)], 1
    ).astype(float)


def off(clip: PointClip) -> np.ndarray:
    """Largest change of colour from a point's query to its other visible frames, over all such."""
    shown = colours(clip)
    there = shown[np.arange(len(shown)), clip.query_frames]
    return np.abs(shown - there[:, None]).max(-1)[clip.visible]


@pytest.mark.parametrize("index", range(3))
def test_a_still_frame_moves_by_one_homography_and_so_do_its_points(films: Path, index: int) -> None:
    clip = check_clip(clips(films).open(index), "clip")
    assert clip.video.shape == (5, 48, 64, 3)
    assert len(clip.tracks_yx) == 60
    assert np.quantile(off(clip), 0.98) < 12  # of 150 grey levels
    first = clip.tracks_yx[:, 0, ::-1].astype(np.float64)
    for t in (2, 4):
        now = clip.tracks_yx[:, t, ::-1].astype(np.float64)
        # The direct linear transform: eight unknowns, 120 equations.
        rows = []
        for (x, y), (u, v) in zip(first, now, strict=True):
            rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y, -u], [0, 0, 0, x, y, 1, -v * x, -v * y, -v]]
        matrix = np.linalg.svd(np.asarray(rows))[2][-1].reshape(3, 3)
        found = np.concatenate([first, np.ones((60, 1))], 1) @ matrix.T
        assert np.abs(found[:, :2] / found[:, 2:] - now).max() < 1e-3
        assert np.abs(now - first).max() > 0.5
    # Nothing beyond the film's picture, which has no dark pixel, is ever seen.
    assert clip.video.min() > 85


def test_points_taken_elsewhere_would_be_noticed(films: Path) -> None:
    clip = clips(films).open(0)
    moved = dataclasses.replace(
        clip, tracks_yx=clip.tracks_yx + np.float32([0, 3]) * np.arange(5)[:, None] ** 0
    )
    late = np.concatenate([clip.tracks_yx[:, :1], moved.tracks_yx[:, 1:]], axis=1)
    assert np.quantile(off(dataclasses.replace(clip, tracks_yx=late.astype(np.float32))), 0.98) > 20


def test_regions_of_another_film_hide_what_is_behind_them(films: Path) -> None:
    """The film behind is blue, that in front red: a point is visible exactly where its own colour is seen."""
    folder = films.parent / "coloured"
    for name, other in (("a.mp4", [0, 1]), ("b.mp4", [1, 2])):
        frame = picture(7)
        frame[..., other] = 0
        write_video(folder / name, np.stack([frame] * 2), options={"crf": "1"})
    source = warped_clips(
        dataclasses.replace(SMALL, frames=12, cut=1.0, fewest=3, points=200),
        folder,
        {"train": 0, "validation": 4},
    )["validation"]
    counted, agree, hidden = 0, 0, 0
    for index in range(4):
        clip = check_clip(source.open(index), "clip")
        own = 2 if index % 2 == 0 else 0  # of the background
        shown = colours(clip)
        query = shown[np.arange(len(shown)), clip.query_frames]
        behind = query[:, own] > query[:, 2 - own]
        assert 10 < behind.sum() < 190  # points on both
        height, width = clip.video.shape[1:3]
        inside = ((clip.tracks_yx >= 1) & (clip.tracks_yx < (height - 1, width - 1))).all(-1)
        seen = shown[..., own] > shown[..., 2 - own]
        used = inside & behind[:, None]
        counted += used.sum()
        agree += (seen == clip.visible)[used].sum()
        hidden += (~clip.visible & used).sum()
    assert hidden > 50
    assert agree / counted > 0.97  # edges are a pixel soft


def test_a_clip_is_decided_by_films_seed_and_index(films: Path) -> None:
    one, again = clips(films, cut=0.5), pickle.loads(pickle.dumps(clips(films, cut=0.5)))
    a, b, c = one.open(1), again.open(1), clips(films, cut=0.5, seed=1).open(1)
    assert np.array_equal(a.video, b.video)
    assert np.array_equal(a.tracks_yx, b.tracks_yx)
    assert not np.array_equal(a.tracks_yx, c.tracks_yx)
    assert not np.array_equal(a.tracks_yx, one.open(4).tracks_yx)
    assert [one.name(i) for i in range(4)] == ["a.mp4[0]", "b/c.mp4[1]", "d.mp4[2]", "a.mp4[3]"]
    before = one.key(0)
    os.utime(films / "d.mp4", (1, 1))
    assert one.key(0) != before
    with pytest.raises(IndexError, match="clip 6 of 6"):
        one.open(6)


def test_motion_blur_moves_nothing(films: Path) -> None:
    fast = {"slowest": 0.2, "fastest": 0.2}
    sharp_clips, blurred_clips = clips(films, **fast), clips(films, **fast, exposure=1.0)
    changed = 0
    for index in range(5):
        sharp, blurred = sharp_clips.open(index), blurred_clips.open(index)
        assert np.array_equal(sharp.tracks_yx, blurred.tracks_yx)
        changed += not np.array_equal(sharp.video, blurred.video)
        assert np.quantile(off(blurred), 0.9) < 20
    assert changed  # slow motion is sharp


def test_films_are_split_by_folder_or_by_name(films: Path, tmp_path: Path) -> None:
    both = find_films(films, ["train", "validation"])
    assert both == {"train": ("b/c.mp4", "d.mp4"), "validation": ("a.mp4",)}
    assert find_films(films, ["validation"]) == {"validation": ("a.mp4", "b/c.mp4", "d.mp4")}
    frames = np.stack([picture(0)] * 2)
    for split in ("train", "validation"):
        write_video(tmp_path / split / "x.mp4", frames)
    assert find_films(tmp_path, ["validation"]) == {"validation": ("validation/x.mp4",)}
    with pytest.raises(VideoDataError, match=r"x\.mp4: training and validation need different ones"):
        find_films(tmp_path / "train", ["train", "validation"])


def test_films_that_show_nothing_or_cannot_be_read_are_named(films: Path, tmp_path: Path) -> None:
    grey = np.full((3, 64, 64, 3), 90, np.uint8)
    write_video(tmp_path / "grey.mp4", grey)
    (tmp_path / "torn.mp4").write_bytes(b"no film")
    source = clips(tmp_path, cut=0.0)
    with pytest.raises(VideoError, match=r"grey\.mp4: 8 frames at random, all of \(nearly\) one colour"):
        source.open(0)
    with pytest.raises(VideoError, match=r"torn\.mp4: damaged"):
        source.open(1)


def test_the_command_writes_records(films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["warp", f"--path={films}", f"--output={out}", *OPTIONS]
    assert main([*command, "--clips=2", "--held-out=3"]) == 0
    printed = capsys.readouterr().out
    assert "train: 2 clips, 8 frames, 24 points" in printed
    assert "validation: 3 clips, 12 frames, 36 points" in printed
    records = RecordClips(out / "validation")
    assert [records.name(i) for i in range(3)] == ["a.mp4[0]", "a.mp4[1]", "a.mp4[2]"]
    assert records.open(0).video.shape == (4, 32, 40, 3)
    assert main([*command[:2], f"--output={tmp_path / 'eval'}", *OPTIONS, "--held-out=3"]) == 0
    assert not (tmp_path / "eval" / "train").exists()
    assert RecordClips(tmp_path / "eval" / "validation").name(1) == "b/c.mp4[1]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--path=nowhere"], "nowhere: no such folder of videos"),
        (["--path=FILMS", "--held-out=0"], "need at least 1 in all"),
        (["--path=FILMS", "--clips=-1"], "none below 0"),
        (["--path=FILMS", "--cut=2"], "cut = 2.0: a share is between 0 and 1"),
        (["--path=FILMS", "--fewest=0"], "fewest = 0: need at least 1 region"),
        (["--path=FILMS", "--fewest=4"], "4 to 3 layers"),
        (["--path=FILMS", "--height=8"], "frames of 8 x 256 pixels: need 16 to 4096"),
        (["--path=FILMS", "--points=0"], "need at least 1 of each"),
        ([], "required: --path"),
    ],
)
def test_wrong_options_are_one_line(
    films: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("FILMS", str(films)) for word in options]
    assert main(["warp", f"--output={tmp_path / 'out'}", *words]) == 2
    assert message in capsys.readouterr().err
