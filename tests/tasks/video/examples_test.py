"""From a configuration to batches: batch k is a pure function of (seed, k), whatever reads it."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tasks.common.epochs import EpochOrder
from tasks.common.video.skips import SkipReport
from tasks.video.data import VideoData, VideoDataConfig, VideoDataError, VideoTimeout, open_video_data
from tests.tasks.common.video.video_files import number_of, numbered_frames, write_video

COUNT = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten training videos of 20 + i frames whose first frame is number i, two classes; three to validate."""
    root = tmp_path_factory.mktemp("set")
    for i in range(COUNT):
        write_video(root / f"t{i}.mp4", numbered_frames(20 + i, first=i), codec="mpeg4", gop=5)
    for i in range(3):
        write_video(root / f"v{i}.mp4", numbered_frames(30, first=2 * i), codec="mpeg4", gop=5)
    (root / "train.csv").write_text("".join(f"t{i}.mp4,{'ab'[i % 2]}\n" for i in range(COUNT)))
    (root / "validation.csv").write_text("v0.mp4,b\nv1.mp4,a\nv2.mp4,b\n")
    return root


def opened(folder: Path, seed: int = 5, report: Path | None = None, **options) -> VideoData:
    config = {"source": "folder", "path": str(folder), "frames": 8, "stride": 2, "height": 32, "width": 32}
    return open_video_data(VideoDataConfig(**(config | options)), seed=seed, report=report)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_batches_hold_what_was_asked_for(folder: Path) -> None:
    data = opened(folder)
    batch = data.batches(4)[0]
    assert batch["frames"].shape == (4, 8, 32, 32, 3)
    assert batch["frames"].dtype == np.uint8
    assert batch["label"].dtype == batch["clip"].dtype == np.int32
    assert batch["label"].tolist() == [c % 2 for c in batch["clip"].tolist()]
    for frames, clip in zip(batch["frames"], batch["clip"].tolist(), strict=True):
        numbers = [number_of(f) - clip for f in frames]
        assert 0 <= numbers[0] <= 5 + clip  # 20 + clip frames, a span of 15
        assert np.diff(numbers).tolist() == [2] * 7


def test_every_epoch_shows_every_video_once_and_draws_anew(folder: Path) -> None:
    batches = opened(folder).batches(4)
    rows = [batches[k] for k in range(10)]
    clips = np.concatenate([b["clip"] for b in rows])
    for epoch in range(4):
        assert sorted(clips[epoch * COUNT : (epoch + 1) * COUNT]) == list(range(COUNT))
    assert clips[:COUNT].tolist() != clips[COUNT : 2 * COUNT].tolist()
    frames = np.concatenate([b["frames"] for b in rows])
    starts = [[number_of(frames[j][0]) - c for j in np.flatnonzero(clips == c)] for c in range(COUNT)]
    assert any(len(set(s)) > 1 for s in starts)


def test_repeats_show_a_video_several_times_in_a_row(folder: Path) -> None:
    batch = opened(folder, repeats=2).batches(6)[0]
    assert batch["clip"][::2].tolist() == batch["clip"][1::2].tolist()
    assert len(set(batch["clip"].tolist())) == 3
    assert any(
        not np.array_equal(a, b) for a, b in zip(batch["frames"][::2], batch["frames"][1::2], strict=True)
    )
    order = EpochOrder(7, 5, seed=3, repeats=2)
    rows = [r for k in range(28) for r in order(k)]
    assert len(set(rows)) == len(rows)  # no draw of a video comes twice
    assert pickle.loads(pickle.dumps(order))(4) == order(4)


def test_batch_k_is_the_same_for_any_reader(folder: Path) -> None:
    batches = opened(folder).batches(4)
    expected = [batches[k] for k in range(4)]
    assert same(opened(folder).batches(4)[3], expected[3])
    assert not same(opened(folder, seed=6).batches(4)[3], expected[3])
    for processes in (1, 2):
        shares = []
        for process in range(processes):
            with batches.iterate(1, process_index=process, process_count=processes, prefetch=3) as reader:
                shares.append([next(reader) for _ in range(3)])
        for k in range(3):
            parts = [share[k] for share in shares]
            joined = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
            assert same(joined, expected[1 + k])


@pytest.mark.slow
def test_worker_processes_read_the_same(folder: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "good.mp4", numbered_frames(20), codec="mpeg4")
    (tmp_path / "bad.mp4").write_bytes(b"bad")
    (tmp_path / "train.csv").write_text("bad.mp4,a\ngood.mp4,b\n")
    report = tmp_path / "run" / "left_out.jsonl"
    data = opened(tmp_path, report=report, validation_fraction=0.0)
    expected = opened(tmp_path, validation_fraction=0.0).batches(4)
    with data.batches(4).iterate(0, num_workers=2, prefetch=1) as reader:
        for k in range(3):
            assert same(next(reader), expected[k])
    # What the workers left out reaches the report, and this process.
    assert list(data.report.read()) == [str(tmp_path / "bad.mp4")]


def damaged(folder: Path, tmp_path: Path, names: list[str]) -> Path:
    root = tmp_path / "set"
    root.mkdir()
    for path in folder.iterdir():
        (root / path.name).write_bytes(b"damaged" if path.name in names else path.read_bytes())
    return root


def test_what_cannot_be_read_is_replaced_by_the_next_and_reported(folder: Path, tmp_path: Path) -> None:
    root = damaged(folder, tmp_path, ["t3.mp4", "t4.mp4", "t9.mp4"])
    report = tmp_path / "left_out.jsonl"
    data, intact = opened(root, report=report), opened(folder)
    for k in range(5):
        rows, whole = data.batches(4)[k], intact.batches(4)[k]
        expected = [{3: 5, 4: 5, 9: 0}.get(c, c) for c in whole["clip"].tolist()]
        assert rows["clip"].tolist() == expected
        assert rows["label"].tolist() == [c % 2 for c in expected]
        for row in range(4):
            if whole["clip"][row] == expected[row]:
                np.testing.assert_array_equal(rows["frames"][row], whole["frames"][row])
    assert same(opened(root).batches(4)[2], data.batches(4)[2])
    names = [json.loads(line)["name"] for line in report.read_text().splitlines()]
    assert sorted(names) == sorted(str(root / f"t{i}.mp4") for i in (3, 4, 9))
    assert all("damaged" in reason for reason in SkipReport(report).read().values())


def test_when_nothing_can_be_read_training_stops(folder: Path, tmp_path: Path) -> None:
    data = opened(damaged(folder, tmp_path, [f"t{i}.mp4" for i in range(COUNT)]))
    with pytest.raises(
        VideoDataError, match=r"t2\.mp4 and the 9 videos after it cannot be read; .*: damaged"
    ):
        data.train[2]


def test_too_slow_a_file_stops_the_run_instead_of_changing_the_batch(folder: Path) -> None:
    with pytest.raises(VideoTimeout, match=r"raise data\.max_seconds"):
        opened(folder, max_seconds=1e-9).batches(4)[0]


def test_views_of_a_video(folder: Path) -> None:
    views = opened(folder, eval_clips=4, eval_crops=3).views(batch_size=8)
    assert len(views) == 40  # 3 videos x 12 views, filled up to 5 batches of 8
    batch = views.read(range(40))
    assert batch["clip"].tolist() == [v for v in range(3) for _ in range(12)] + [-1] * 4
    assert batch["view"][:12].tolist() == list(range(12))
    assert batch["valid"].tolist() == [True] * 36 + [False] * 4
    assert batch["label"][[0, 12, 24]].tolist() == [1, 0, 1]
    firsts = [number_of(batch["frames"][i][0]) - 2 for i in range(12, 24)]
    assert firsts == [0] * 3 + [5] * 3 + [10] * 3 + [15] * 3
    # 48 x 32 pixels: the bright quarter is left, columns 0..23.
    bright = [float((f[0, 0, :, 0] > f[0, -1, -1, 0] + 5).mean()) for f in batch["frames"][:3]]
    assert bright[0] > bright[1] > bright[2]
    for index in (0, 7, 17, 39):
        one = views[index]
        assert all(np.array_equal(one[k], batch[k][index]) for k in one)
    with pytest.raises(IndexError, match="view 40 of 40"):
        views[40]


def test_unreadable_videos_do_not_count_in_evaluation(folder: Path, tmp_path: Path) -> None:
    data = opened(damaged(folder, tmp_path, ["v1.mp4"]), eval_clips=2)
    batch = data.views().read(range(6))
    assert batch["valid"].tolist() == [True, True, False, False, True, True]
    assert batch["clip"].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch["frames"][2].max() == 0
    assert list(data.report.read()) == [str(tmp_path / "set" / "v1.mp4")]


def test_frames_leave_at_one_size(folder: Path) -> None:
    assert opened(folder, height=16, width=24).train[0]["frames"].shape == (8, 16, 24, 3)
    whole = opened(folder, height=32, width=48, fit="stretch").train[0]["frames"]
    assert whole.shape == (8, 32, 48, 3)
    windows = {opened(folder, seed=s).train[0]["frames"].tobytes() for s in range(5)}
    assert len(windows) == 5


def test_bad_configurations_are_refused(unchecked_types: None, tmp_path: Path) -> None:
    for options, message in (
        ({"source": "ssv3"}, "data.source must be one of generated, folder"),
        ({"source": "folder"}, "data.source='folder' needs data.path"),
        ({"source": "tfds"}, "needs data.tfds_name, or data.path"),
        ({"train_list": "a.csv"}, "'a.csv' has no meaning"),
        ({"frames": 0}, "need frames >= 1"),
        ({"repeats": 0}, "data.repeats must be at least 1"),
        ({"fit": "stretch", "eval_crops": 3}, "set data.eval_crops=1"),
        ({"max_seconds": 0.0}, "limit on seconds = 0.0"),
        ({"validation_fraction": 1.0}, r"must be in \[0, 1\)"),
        ({"generated_pairs": ("x",)}, "unknown pair 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            VideoDataConfig(**options)
    with pytest.raises(VideoDataError, match="no such folder of videos"):
        open_video_data(VideoDataConfig(source="folder", path=str(tmp_path / "none")))
    (tmp_path / "validation.csv").write_text("a.mp4,b\n")
    with pytest.raises(VideoDataError, match=r"there is no training list beside it"):
        open_video_data(VideoDataConfig(source="folder", path=str(tmp_path)))


def test_nothing_held_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.mp4").write_bytes((folder / "t0.mp4").read_bytes())
    data = opened(tmp_path, validation_fraction=0.0)
    assert data.eval_videos is None
    with pytest.raises(VideoDataError, match="no videos are held out"):
        data.views()


def test_the_default_is_the_generated_set(tmp_path: Path) -> None:
    config = VideoDataConfig(cache_dir=str(tmp_path), generated_train=20, generated_validation=10)
    small = replace(config, generated_size=16, generated_frames=8, frames=8, height=16, width=16)
    data = open_video_data(small, num_classes=10)
    assert data.batches(5)[0]["frames"].shape == (5, 8, 16, 16, 3)
    assert len(data.views(4)) == 12
    assert sorted(np.unique(data.train_videos.labels)) == list(range(10))
