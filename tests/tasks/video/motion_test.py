"""Generated clips: that only the order of frames tells the members of a pair apart, and that it does."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tasks.common import photographs
from tasks.common.photographs import SPLITS, Texturer
from tasks.common.video.decoding import VideoFile
from tasks.common.video.encoding import encode_mp4
from tasks.common.video.errors import VideoDataError
from tasks.video.data import generated
from tasks.video.data.generated import MANIFEST, MotionConfig, cached, generate, make_clip, verify_generated
from tasks.video.data.motion import PAIRS, class_names, render_clip, state_order

SIZE, FRAMES = 32, 16


def clips_of(pair: str, member: int, count: int, seed: int) -> np.ndarray:
    """[count, T, S, S, 3], each with textures, places and phases of its own."""
    rngs = [np.random.default_rng([seed, member, i]) for i in range(count)]
    return np.stack([render_clip(pair, member, Texturer("train"), rng, SIZE, FRAMES) for rng in rngs])


def decoded(frames: np.ndarray) -> np.ndarray:
    with VideoFile(encode_mp4(frames)) as video:
        return np.stack(video.read(range(len(frames))))


@pytest.mark.parametrize("pair", PAIRS)
def test_members_of_a_pair_show_the_same_pictures_byte_for_byte(pair: str) -> None:
    """For equal textures and places both are the same bag of T frames, also after coding and decoding."""
    for seed in range(4):
        bags, clips = [], []
        for member in (0, 1):
            clip = render_clip(pair, member, Texturer("train"), np.random.default_rng(seed), SIZE, FRAMES)
            clips.append(clip)
            bags.append(sorted(frame.tobytes() for frame in decoded(clip)))
        assert bags[0] == bags[1]
        assert not np.array_equal(clips[0], clips[1])


@pytest.mark.parametrize("frames", [8, 12, 16, 24, 32, 60])
@pytest.mark.parametrize("pair", PAIRS)
def test_every_state_is_shown_once_and_at_any_time(pair: str, frames: int) -> None:
    for member in (0, 1):
        orders = [state_order(pair, member, frames, np.random.default_rng(i)) for i in range(40 * frames)]
        assert all(sorted(order) == list(range(frames)) for order in orders[:50])
        # Uniform over states at every time: chi-squared with frames - 1 degrees of freedom, 5 sigma.
        for time in (0, frames // 2, frames - 1):
            counts = np.bincount([order[time] for order in orders], minlength=frames)
            statistic = float(((counts - 40) ** 2 / 40).sum())
            assert statistic < frames - 1 + 5 * np.sqrt(2 * (frames - 1))


def probe_accuracy(first: np.ndarray, second: np.ndarray) -> float:
    """Held-out accuracy of a ridge classifier of two equally large sets of feature rows."""
    x = np.concatenate([first, second]).astype(np.float64)
    y = np.repeat([-1.0, 1.0], len(first))
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    train = np.arange(len(x)) % 2 == 0
    weights = np.linalg.solve(x[train].T @ x[train] + 10.0 * np.eye(x.shape[1]), x[train].T @ y[train])
    return float(np.mean(np.sign(x[~train] @ weights) == y[~train]))


def small(frames: np.ndarray) -> np.ndarray:
    """[..., 8 * 8 * 3] averages of 4 x 4 pixels."""
    parts = frames.reshape(*frames.shape[:-3], 8, SIZE // 8, 8, SIZE // 8, 3).astype(np.float64)
    return parts.mean((-4, -2)).reshape(*frames.shape[:-3], -1)


@pytest.mark.parametrize(
    ("pair", "count"),
    [
        ("horizontal", 160),
        *(pytest.param(pair, 1200, marks=pytest.mark.slow) for pair in PAIRS),
    ],
)
def test_a_probe_of_frames_without_order_is_at_chance(pair: str, count: int) -> None:
    """Statistical: probes of the first, middle and last frame, of the mean and spread over time (a bag), and
    of grey-level histograms are at chance on clips with textures of their own."""
    a, b = clips_of(pair, 0, count, 5), clips_of(pair, 1, count, 5)
    bound = 0.5 + 4 * 0.5 / np.sqrt(count)  # `count` clips are held out: four standard errors
    histograms = [
        np.stack([np.histogram(clip, 32, (0, 256))[0] for clip in clips]) / clips[0].size for clips in (a, b)
    ]
    views = {
        "first": (small(a[:, 0]), small(b[:, 0])),
        "middle": (small(a[:, FRAMES // 2]), small(b[:, FRAMES // 2])),
        "last": (small(a[:, -1]), small(b[:, -1])),
        "bag": tuple(np.concatenate([small(x).mean(1), small(x).std(1)], 1) for x in (a, b)),
        "histogram": tuple(histograms),
    }
    for name, (first, second) in views.items():
        assert 1 - bound < probe_accuracy(first, second) < bound, name


@pytest.mark.parametrize(("pair", "lag"), [("horizontal", 1), ("count", 4), ("speed", 1)])
def test_the_order_of_frames_does_tell(pair: str, lag: int) -> None:
    """The same kind of probe, given one statistic of neighbouring frames, is far above chance: the test above
    has the power to find a difference."""

    def features(clips: np.ndarray) -> np.ndarray:
        x = small(clips) - small(clips).mean(1, keepdims=True)
        before, after = x[:, :-lag], x[:, lag:]
        image = x.reshape(len(x), FRAMES, 8, 8, 3)
        shifted = np.roll(image, 1, 3).reshape(x.shape)
        reds = image[..., 0].mean((2, 3)) - image[..., 2].mean((2, 3))
        change = np.abs(after - before).mean(2)
        return np.stack(
            [
                (shifted[:, :-lag] * after).sum((1, 2)) - (before * shifted[:, lag:]).sum((1, 2)),
                (np.diff(reds, axis=1) ** 3).sum(1),
                change.mean(1) / (x.std((1, 2)) + 1e-6),
                (np.diff(np.abs(x).mean(2), axis=1) ** 3).sum(1),
                (np.diff((small(clips) - small(clips).min(1, keepdims=True)).mean(2), axis=1) ** 3).sum(1),
                _skew_against_quietest(x),
            ],
            1,
        )

    def _skew_against_quietest(x: np.ndarray) -> np.ndarray:
        return (np.diff(((x[:, :, None] - x[:, None]) ** 2).sum(3).max(2), axis=1) ** 3).sum(1)

    a, b = features(clips_of(pair, 0, 80, 7)), features(clips_of(pair, 1, 80, 7))
    ranks = [np.sign(f) * np.abs(f) ** (1 / 3) for f in (a, b)]
    assert probe_accuracy(*ranks) > 0.65


def test_training_and_validation_have_no_photograph_in_common() -> None:
    files = {split: set(photographs.photograph_files(split)) for split in SPLITS}
    assert not files["train"] & files["validation"]
    assert min(map(len, files.values())) >= 4


def test_bad_pairs_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown pair 'tempo': there are horizontal"):
        class_names(("speed", "tempo"))
    with pytest.raises(ValueError, match="each once"):
        MotionConfig(pairs=("speed", "speed"))
    with pytest.raises(ValueError, match="at least one of each of the 10 classes"):
        MotionConfig(train=5)
    for options in ({"size": 33}, {"frames": 10}, {"frames": 4}):
        with pytest.raises(ValueError, match="need a multiple of 4, at least 8, and an even number"):
            MotionConfig(**options)


def test_the_set_is_balanced_listed_and_the_same_however_the_work_is_divided(
    motion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MotionConfig(train=60, validation=20, size=SIZE)
    manifest = json.loads((motion / MANIFEST).read_text())
    labels = [f["label"] for f in manifest["files"] if f["path"].startswith("train/")]
    assert {labels.count(name) for name in config.classes} == {6}
    rows = (motion / "train.csv").read_text().splitlines()
    assert rows[:2] == ["path,label", "train/00000.mp4,moves right"]
    assert verify_generated(motion) == 80
    monkeypatch.setattr(generated, "_UNIT", 7)
    again = generate(config, tmp_path / "again", workers=1)
    assert again["files"] == manifest["files"]
    label, frames = make_clip(config, "train", 13)
    with VideoFile(motion / "train" / "00013.mp4") as video:
        shown = np.stack(video.read(range(16)))
        assert (video.info.frames, video.info.height, video.info.width) == (16, SIZE, SIZE)
    assert labels[13] == config.classes[label]
    assert np.abs(shown.astype(int) - frames).mean() < 6
    other = make_clip(MotionConfig(train=60, validation=20, size=SIZE, seed=1), "train", 13)[1]
    assert not np.array_equal(other, frames)


def test_a_set_is_made_once_and_again_when_its_version_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MotionConfig(pairs=("speed",), train=4, validation=2, size=16, frames=8)
    folder = cached(config, tmp_path, workers=1)
    stamp = (folder / MANIFEST).stat().st_mtime_ns
    assert cached(config, tmp_path, workers=1) == folder
    assert (folder / MANIFEST).stat().st_mtime_ns == stamp
    monkeypatch.setattr(generated, "VERSION", generated.VERSION + 1)
    assert cached(config, tmp_path, workers=1) != folder
    # In a folder that the user names, the old version makes room for the new one.
    assert generate(config, folder, workers=1)["version"] == generated.VERSION
    assert (folder / MANIFEST).stat().st_mtime_ns != stamp


def test_what_a_killed_run_left_is_cleared_and_other_folders_are_not(motion: Path, tmp_path: Path) -> None:
    config = MotionConfig(pairs=("speed",), train=4, validation=2, size=16, frames=8)
    (tmp_path / ".clips.part" / "train").mkdir(parents=True)
    (tmp_path / ".clips.part" / "train" / "99999.mp4").write_bytes(b"half")
    manifest = generate(config, tmp_path / "clips", workers=1)
    assert {p.name for p in (tmp_path / "clips" / "train").iterdir()} == {f"0000{i}.mp4" for i in range(4)}
    assert len(manifest["files"]) == 6
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(VideoDataError, match="mine: holds something that `generate` has not made"):
        generate(config, other)
    damaged = tmp_path / "damaged"
    shutil.copytree(motion, damaged)
    (damaged / "train" / "00007.mp4").write_bytes(b"x")
    with pytest.raises(VideoDataError, match=r"00007\.mp4: missing or damaged"):
        verify_generated(damaged)


def test_a_missing_package_of_photographs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'skimage', which is not installed: pip install .foxtrot\[v"):
        photographs.photograph_files("train")
