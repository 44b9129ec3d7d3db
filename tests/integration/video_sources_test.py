"""Every source of video trains through the real command, from its official format, to known figures."""

import io
import json
import math
import sys
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration.video_runs import (
    CLASSES,
    HELD_OUT,
    STEPS,
    TRAIN,
    Written,
    arguments,
    check_run,
    decode,
    decoded,
    film,
    losses,
    run,
    write_films,
    write_folder,
)
from tests.tasks.common.video.video_files import write_video

pytestmark = pytest.mark.usefixtures("programs")
BOTH = (("train", TRAIN), ("validation", HELD_OUT))


def check(tmp_path: Path, written: Written) -> None:
    """20 steps, finite and downwards; then every figure."""
    records = run(tmp_path / "run", *written.options, args=written.args)
    found = losses(records)
    assert len(found) == STEPS
    assert all(map(math.isfinite, found))
    assert found[0] == pytest.approx(math.log(len(CLASSES)), abs=0.3)
    assert sum(found[-5:]) / 5 < found[0] - 0.2
    assert (tmp_path / "run" / "classes.txt").read_text().splitlines() == list(written.classes)
    for picture in ("training.png", "evaluation/confusion.png"):
        assert (tmp_path / "run" / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    check_run(tmp_path / "run", records, written)


@pytest.mark.slow
def test_a_folder_with_csv_lists(tmp_path: Path) -> None:
    check(tmp_path, write_folder(tmp_path / "films"))


@pytest.mark.slow
def test_a_folder_with_json_lists(tmp_path: Path) -> None:
    """Labels are numbers, whose names stand in classes.txt."""
    root = tmp_path / "films"
    for kind, videos in BOTH:
        names = [f"{kind}-{i}.mp4" for i in range(len(videos))]
        write_films(root, names, [seen for seen, _ in videos])
        records = [{"path": n, "label": label} for n, (_, label) in zip(names, videos, strict=True)]
        (root / f"{kind}.json").write_text(json.dumps(records))
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    check(tmp_path, Written(arguments("folder", root), (), decoded(root, names)))


@pytest.mark.slow
def test_a_folder_per_class(tmp_path: Path) -> None:
    """A share of the videos is held out by a hash of their names."""
    root, share = tmp_path / "films", 0.3
    names = [f"{CLASSES[label]}/{i}.mp4" for i in range(4) for label in range(len(CLASSES))]
    write_films(root, names, [*range(len(CLASSES))] * 4)
    held_out = [
        (str(root / name), decode(root / name), CLASSES.index(name.partition("/")[0]))
        for name in sorted(names)
        if int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") < share * 2**64
    ]
    assert 3 <= len(held_out) <= 12
    options = (f"--config.data.validation_fraction={share}",)
    check(tmp_path, Written(arguments("folder", root), options, held_out))


@pytest.mark.slow
def test_something_something(tmp_path: Path) -> None:
    """labels.json, train.json, validation.json, and VP9 in WebM by number; a frame of each segment."""
    root, videos = tmp_path / "ssv2", "20bn-something-something-v2"
    (root / "labels").mkdir(parents=True)
    number = {name: len(CLASSES) - 1 - i for i, name in enumerate(CLASSES)}
    (root / "labels" / "labels.json").write_text(json.dumps({n: str(i) for n, i in number.items()}))
    ids = {kind: [1000 * len(kind) + i for i in range(len(listed))] for kind, listed in BOTH}
    for kind, listed in BOTH:
        write_films(
            root / videos, [f"{i}.webm" for i in ids[kind]], [seen for seen, _ in listed],
            codec="libvpx-vp9", options={"cpu-used": "8", "deadline": "realtime"},
        )  # fmt: skip
        entries = [
            {
                "id": str(i),
                "label": CLASSES[label].replace("something", "a cup"),
                "template": CLASSES[label].replace("something", "[something]"),
                "placeholders": ["a cup"],
            }
            for i, (_, label) in zip(ids[kind], listed, strict=True)
        ]
        (root / "labels" / f"{kind}.json").write_text(json.dumps(entries))
    held_out = [
        (name, frames, number[CLASSES[label]])
        for name, frames, label in decoded(root / videos, [f"{i}.webm" for i in ids["validation"]])
    ]
    options = ("--config.data.sampling=uniform",)
    check(
        tmp_path,
        Written(f"data=ssv2,path={root},classes=6,videos=12", options, held_out, CLASSES[::-1], True),
    )


@pytest.mark.slow
def test_kinetics(tmp_path: Path) -> None:
    """train.csv and val.csv with the official columns; H.264 clips by identifier and times."""
    root = tmp_path / "k400"
    names: dict[str, list[str]] = {}
    for (kind, listed), split in zip(BOTH, ("train", "val"), strict=True):
        places = [f"{split}/{CLASSES[label]}/" if i % 2 else "" for i, (_, label) in enumerate(listed)]
        names[kind] = [f"{place}-{split}_{i:06d}_{i + 10:06d}.mp4" for i, place in enumerate(places)]
        write_films(root, names[kind], [seen for seen, _ in listed], codec="libx264")
        rows = [f'"{CLASSES[label]}",-{split},{i},{i + 10},{split}\n' for i, (_, label) in enumerate(listed)]
        (root / f"{split}.csv").write_text("label,youtube_id,time_start,time_end,split\n" + "".join(rows))
    written = Written(arguments("kinetics", root), (), decoded(root, names["validation"]))
    check(tmp_path, written)


@pytest.mark.slow
def test_records_that_prepare_made(tmp_path: Path) -> None:
    """JPEG frames in ArrayRecord shards: what is seen is what the JPEG coder leaves."""
    from tasks.video.data.__main__ import main

    written, records = write_folder(tmp_path / "films"), tmp_path / "records"
    source = ["--source=folder", f"--path={tmp_path / 'films'}", f"--output={records}"]
    assert main(["prepare", *source, "--short-side=32", "--quality=80", "--per-shard=5", "--workers=1"]) == 0

    def coded(frame: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=80)
        return np.asarray(Image.open(file))

    held_out = [(name, np.stack([*map(coded, frames)]), label) for name, frames, label in written.held_out]
    check(tmp_path, Written(arguments("records", records), (), held_out))


BUILDER = """
import numpy as np
import tensorflow_datasets as tfds

CLASSES = []
VIDEOS = {}


class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({
            "video": tfds.features.Tensor(shape=(), dtype=np.object_),
            "label": tfds.features.ClassLabel(names=CLASSES),
        })
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(videos) for split, videos in VIDEOS.items()}

    def _generate_examples(self, videos):
        for i, (content, label) in enumerate(videos):
            yield i, {"video": content, "label": label}
"""


def _tfds(root: Path) -> Path:
    """A data set of encoded video in ArrayRecord files, made by TFDS itself."""
    package = root / "code" / "tiny_clips"
    package.mkdir(parents=True)
    texts = {"__init__.py": "", "CITATIONS.bib": "", "README.md": "Tiny.", "TAGS.txt": ""}
    for name, text in (texts | {"tiny_clips_dataset_builder.py": BUILDER}).items():
        (package / name).write_text(text)
    sys.path.insert(0, str(root / "code"))
    try:
        from tiny_clips import tiny_clips_dataset_builder as builder

        builder.CLASSES += CLASSES
        for kind, videos in BOTH:
            builder.VIDEOS[kind] = [
                (write_video(root / f"{i}.mp4", film(seen, i), codec="mpeg4").read_bytes(), label)
                for i, (seen, label) in enumerate(videos)
            ]
        builder.Builder(data_dir=root / "data", file_format="array_record").download_and_prepare()
    finally:
        sys.path.remove(str(root / "code"))
        for name in [n for n in sys.modules if n.startswith("tiny_clips")]:
            del sys.modules[name]
    return root / "data"


@pytest.mark.slow
def test_tfds(tmp_path: Path) -> None:
    """Encoded video in a TFDS data set stored as ArrayRecord, without TensorFlow."""
    import tensorflow_datasets as tfds

    folder = _tfds(tmp_path / "tfds")
    # TFDS decides on the order.
    stored = tfds.builder_from_directory(str(folder / "tiny_clips" / "1.0.0")).as_data_source("validation")
    held_out = [
        (f"tfds:tiny_clips:validation:{i}", decode(bytes(example["video"])), int(example["label"]))
        for i, example in enumerate(stored)
    ]
    assert sorted(label for _, _, label in held_out) == sorted(label for _, label in HELD_OUT)
    options = ("--config.data.tfds_name=tiny_clips", "--config.data.tfds_eval_split=validation")
    check(tmp_path, Written(arguments("tfds", folder), options, held_out))
    assert "tensorflow" not in sys.modules
