"""Prepared shards: what is stored, kill and resume, damage; and TFDS data sets of encoded video."""

import contextlib
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

from tasks.common.video import shards as module
from tasks.common.video.frame_records import pack_record, unpack_record
from tasks.common.video.shards import MANIFEST
from tasks.video.data import VideoDataConfig, VideoDataError, VideoError, open_video_data
from tasks.video.data.prepare import PrepareConfig, prepare
from tasks.video.data.records import RecordVideos
from tasks.video.data.sources import TfdsVideos, Videos
from tests.tasks.common.video.video_files import jpeg, number_of, numbered_frames, write_video

ROOT = Path(__file__).resolve().parents[3]
COUNT = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set")
    for i in range(COUNT):
        write_video(root / f"t{i}.mp4", numbered_frames(10 + i, 32, 64, first=i), codec="mpeg4")
    (root / "bad.mp4").write_bytes(b"bad")
    (root / "train.csv").write_text(
        "bad.mp4,a\n" + "".join(f"t{i}.mp4,{'ab'[i % 2]}\n" for i in range(COUNT))
    )
    (root / "validation.csv").write_text("t0.mp4,a\nt1.mp4,b\n")
    return root


def videos(folder: Path) -> Videos:
    return open_video_data(VideoDataConfig(source="folder", path=str(folder))).train_videos


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("shard-*"))}


def test_prepared_videos_are_the_videos(folder: Path, tmp_path: Path) -> None:
    manifest = prepare(
        videos(folder), tmp_path, PrepareConfig(short_side=16, per_shard=4, quality=95), workers=1
    )
    assert (manifest["videos"], manifest["frames"], len(manifest["shards"])) == (COUNT, sum(range(10, 19)), 3)
    assert [s["name"] for s in manifest["skipped"]] == [str(folder / "bad.mp4")]
    assert "damaged, truncated, or not a video" in manifest["skipped"][0]["reason"]
    stored = pickle.loads(pickle.dumps(RecordVideos(tmp_path)))
    assert stored.classes == ("a", "b")
    assert stored.labels.tolist() == [i % 2 for i in range(COUNT)]
    for index in (8, 0, 5):
        assert stored.name(index) == str(folder / f"t{index}.mp4")
        with stored.open(index) as clip:
            assert (clip.frames, clip.fps) == (10 + index, 10.0)
            frames = clip.read([0, 7])
        assert frames[0].shape == (16, 32, 3)
        assert [number_of(f) for f in frames] == [index, index + 7]
    stored.verify()


def test_fewer_frames_may_be_kept(folder: Path, tmp_path: Path) -> None:
    prepare(videos(folder), tmp_path, PrepareConfig(short_side=0, stride=3, most_frames=4), workers=1)
    with RecordVideos(tmp_path).open(7) as clip:
        assert (clip.frames, clip.fps) == (4, pytest.approx(10 / 3))
        frames = clip.read(range(4))
    assert frames[0].shape == (32, 64, 3)
    assert [number_of(f) for f in frames] == [7, 10, 13, 16]


def test_the_source_records_reads_both_splits(folder: Path, tmp_path: Path) -> None:
    files = open_video_data(VideoDataConfig(source="folder", path=str(folder), frames=4, height=32, width=64))
    for split, source in (("train", files.train_videos), ("validation", files.eval_videos)):
        prepare(source, tmp_path / split, PrepareConfig(quality=98), workers=1)
    config = VideoDataConfig(source="records", path=str(tmp_path), frames=4, height=32, width=64)
    data = open_video_data(config)
    assert data.batches(5)[2]["frames"].shape == (5, 4, 32, 64, 3)
    found, expected = data.views().read([0, 1]), files.views().read([0, 1])
    assert found["label"].tolist() == expected["label"].tolist() == [0, 1]
    assert np.abs(found["frames"].astype(int) - expected["frames"]).mean() < 2
    with pytest.raises(VideoDataError, match="no folder train of prepared videos in it"):
        open_video_data(VideoDataConfig(source="records", path=str(folder)))


def test_what_is_done_is_kept_and_only_what_changed_is_redone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    write = module._Job.__call__
    monkeypatch.setattr(module._Job, "__call__", lambda job, unit: made.append(unit[0]) or write(job, unit))
    config = PrepareConfig(per_shard=4)
    first = prepare(videos(folder), tmp_path, config, workers=1)
    content = shards(tmp_path)
    seen: list[tuple[int, int, int]] = []
    assert prepare(videos(folder), tmp_path, config, workers=1, progress=lambda *a: seen.append(a)) == first
    assert made == [0, 1, 2]
    assert seen == [(10, 10, 10)]
    # Killed half way, or damaged.
    (tmp_path / "shard-00001.json").unlink()
    (tmp_path / MANIFEST).unlink()
    (tmp_path / ".shard-00001.array_record.77.tmp").write_bytes(b"half")
    with pytest.raises(VideoDataError, match="preparing it has not finished: run the same `prepare` command"):
        RecordVideos(tmp_path)
    damaged = bytearray(content["shard-00002.array_record"])
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "shard-00002.array_record").write_bytes(damaged)
    assert prepare(videos(folder), tmp_path, config, workers=1) == first
    assert made == [0, 1, 2, 1, 2]
    assert shards(tmp_path) == content
    assert not list(tmp_path.glob(".*.tmp"))
    # Other settings, fewer shards: nothing of the old ones stays.
    assert len(prepare(videos(folder), tmp_path, PrepareConfig(per_shard=10), workers=1)["shards"]) == 1
    assert [p.name for p in sorted(tmp_path.glob("shard-*"))] == [
        "shard-00000.array_record",
        "shard-00000.json",
    ]


@pytest.mark.slow
def test_any_number_of_workers_makes_the_same_shards(folder: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        prepare(videos(folder), tmp_path / str(workers), PrepareConfig(per_shard=3), workers=workers)
    assert shards(tmp_path / "1") == shards(tmp_path / "2")


def test_bad_options_and_unreadable_sets(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"bad\.mp4: damaged"):
        prepare(videos(folder), tmp_path, PrepareConfig(on_error="fail"), workers=1)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "train.csv").write_text("bad.mp4,a\n")
    (tmp_path / "x" / "bad.mp4").write_bytes(b"bad")
    source = open_video_data(
        VideoDataConfig(source="folder", path=str(tmp_path / "x"), validation_fraction=0.0)
    ).train_videos
    with pytest.raises(VideoDataError, match=r"no video could be read \(.*bad\.mp4: damaged"):
        prepare(source, tmp_path / "y", workers=1)
    for options, message in (
        ({"quality": 0}, r"need a quality of 1\.\.100"),
        ({"short_side": -1}, "need at least 0"),
        ({"on_error": "stop"}, "on_error must be 'skip' or 'fail'"),
    ):
        with pytest.raises(ValueError, match=message):
            PrepareConfig(**options)


def test_damaged_shards_are_named(folder: Path, tmp_path: Path) -> None:
    prepare(videos(folder), tmp_path, PrepareConfig(per_shard=4), workers=1)
    path = tmp_path / "shard-00001.array_record"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    stored = RecordVideos(tmp_path)
    with pytest.raises(VideoDataError, match=r"shard-00001\.array_record: damaged \(checksum differs\)"):
        stored.verify()
    refused = []
    for index in range(COUNT):
        try:
            with stored.open(index) as clip:
                clip.read(range(clip.frames))
        except VideoError as error:
            refused.append(error.name)
    assert 0 < len(refused) < COUNT
    assert all("shard-00001" in name for name in refused)
    path.write_bytes(content[:-5])
    with pytest.raises(VideoDataError, match=r"missing or not \d+ bytes long: damaged"):
        RecordVideos(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    for change, message in (
        ({"classes": ["a"]}, "a label beyond the 1 classes"),
        ({"shards": [{"videos": []}]}, r"manifest\.json: damaged \(KeyError: 'name'\)"),
        ({"shards": 3}, r"manifest\.json: damaged \(TypeError"),
        ({"shards": [{"name": "../x", "size": 1}]}, r"'\.\./x' is no name of a shard"),
    ):
        path.write_bytes(content)
        (tmp_path / MANIFEST).write_text(json.dumps(manifest | change))
        with pytest.raises(VideoDataError, match=message):
            RecordVideos(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": "other"}')
    with pytest.raises(VideoDataError, match="not a manifest of foxtrot-video-shards version 1"):
        RecordVideos(tmp_path)


def test_records_are_parsed_with_suspicion() -> None:
    frames = [b"one", b"", b"three"]
    record = pack_record(frames, 12.5)
    assert unpack_record(record, "x") == (frames, 12.5)
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(record[: rng.integers(len(record) + 1)])
        if broken:
            broken[rng.integers(len(broken))] = rng.integers(256)
        with contextlib.suppress(VideoError):  # and nothing else
            unpack_record(bytes(broken), "x")
    for bad in (record[:-1], record + b"x", b"", b"XXXX" + record[4:], pack_record(frames, float("nan"))):
        with pytest.raises(VideoError, match=r"^x: "):
            unpack_record(bad, "x")
    huge = record[:4] + (2**32 - 1).to_bytes(4, "little") + record[8:]
    with pytest.raises(VideoError, match="not a record of frames, or damaged"):
        unpack_record(huge, "x")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_time_it_resumes_to_the_same_bytes(tmp_path: Path, workers: int) -> None:
    source = tmp_path / "in"
    noise = np.random.default_rng(0).integers(0, 256, (60, 128, 128, 3)).astype(np.uint8)
    for i in range(24):
        write_video(source / "a" / f"{i}.mp4", np.roll(noise, i, 0), codec="mpeg4")

    def command(out: Path) -> list[str]:
        return [
            sys.executable, "-m", "tasks.video.data", "prepare", "--source=folder", f"--path={source}",
            "--validation-fraction=0", f"--output={out}", "--per-shard=1", f"--workers={workers}",
        ]  # fmt: skip

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    subprocess.run(command(undisturbed), cwd=ROOT, check=True, capture_output=True, timeout=300)
    for target in (1, 10):
        process = subprocess.Popen(command(killed), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while len(list(killed.glob("train/shard-*.json"))) < target and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.communicate()
        time.sleep(1.5)  # its workers notice, and leave
    subprocess.run(command(killed), cwd=ROOT, check=True, capture_output=True, timeout=300)
    assert shards(killed / "train") == shards(undisturbed / "train")
    assert len(json.loads((killed / "train" / MANIFEST).read_text())["shards"]) == 24


# TFDS

BUILDER = """
import numpy as np
import tensorflow_datasets as tfds

CONTENT = {}


class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({
            "video": tfds.features.Tensor(shape=(), dtype=np.object_),
            "jpegs": tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.object_)),
            "label": tfds.features.ClassLabel(names=["down", "up"]),
            "number": np.int64,
            "text": tfds.features.Text(),
        })
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {**CONTENT[i], "label": i % 2, "number": i % 3, "text": "words"}
"""


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set `tiny_video`, prepared as ArrayRecord by a builder in a package. Returns its data_dir."""
    root = tmp_path_factory.mktemp("tfds")
    package = root / "code" / "tiny_video"
    package.mkdir(parents=True)
    (package / "tiny_video_dataset_builder.py").write_text(BUILDER)
    for name, content in (
        ("__init__.py", ""),
        ("CITATIONS.bib", ""),
        ("README.md", "Tiny."),
        ("TAGS.txt", ""),
    ):
        (package / name).write_text(content)
    sys.path.insert(0, str(root / "code"))
    try:
        from tiny_video import tiny_video_dataset_builder as builder

        for i in range(10):
            frames = numbered_frames(8 + i, first=i)
            path = write_video(root / f"{i}.mp4", frames, codec="mpeg4")
            builder.CONTENT[i] = {"video": path.read_bytes(), "jpegs": [jpeg(f) for f in frames]}
        builder.Builder(data_dir=root / "data", file_format="array_record").download_and_prepare()
    finally:
        sys.path.remove(str(root / "code"))
        for name in [n for n in sys.modules if n.startswith("tiny_video")]:
            del sys.modules[name]
    return root / "data"


@pytest.mark.parametrize("field", ["video", "jpegs"])
@pytest.mark.parametrize("by", ["name", "folder"])
def test_tfds_video_as_bytes_without_tensorflow(tfds_folder: Path, by: str, field: str) -> None:
    path = tfds_folder if by == "name" else tfds_folder / "tiny_video" / "1.0.0"
    config = VideoDataConfig(
        source="tfds", tfds_name="tiny_video" if by == "name" else "", path=str(path), tfds_eval_split="test",
        video_field=field, frames=4, height=32, width=48,
    )  # fmt: skip
    data = open_video_data(config)
    assert data.classes == ("down", "up")
    assert (len(data.train_videos), len(data.eval_videos)) == (10, 3)
    videos = pickle.loads(pickle.dumps(data.train_videos))
    order = [json.loads(json.dumps(int(label))) for label in videos.labels]
    assert sorted(order) == [0] * 5 + [1] * 5
    with videos.open(2) as clip:
        first = number_of(clip.read([0])[0])
        assert clip.frames == 8 + first
    assert videos.labels[2] == first % 2
    assert data.batches(2)[0]["frames"].shape == (2, 4, 32, 48, 3)
    assert "tensorflow" not in sys.modules


def test_a_part_of_a_tfds_split_is_held_out(tfds_folder: Path) -> None:
    config = VideoDataConfig(
        source="tfds", tfds_name="tiny_video", path=str(tfds_folder), label_field="number",
        validation_fraction=0.2,
    )  # fmt: skip
    data = open_video_data(config)
    assert (len(data.train_videos), len(data.eval_videos)) == (8, 2)
    assert data.classes == ("0", "1", "2")
    names = [v.name(i) for v in (data.train_videos, data.eval_videos) for i in range(len(v))]
    assert len(set(names)) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation"}, "tfds:tiny_video:validation: "),
        ({"name": "no_such_set"}, "tfds:no_such_set:train: "),
        ({"video_field": "film"}, r"no feature 'film' \(there is: jpegs, label, number, text, video\)"),
        ({"label_field": "text"}, "feature 'text' is no whole number"),
        (
            {"video_field": "label"},
            r"expected the bytes of a video file, or of JPEG or PNG frames in feature",
        ),
        ({"name": "", "data_dir": "/nowhere"}, "no prepared TFDS data set: there is no dataset_info.json"),
    ],
)
def test_what_tfds_does_not_have_is_named(tfds_folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(VideoDataError, match=message):
        TfdsVideos(**({"name": "tiny_video", "data_dir": str(tfds_folder)} | options))
