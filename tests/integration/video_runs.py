"""Small videos in every official layout, small runs of the real commands on them, their figures by hand."""

import csv
import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import jax
import jax.numpy as jnp
import numpy as np

from models import trecvit
from tasks.common.checkpoint import load_params
from tasks.common.writer import read_records
from tasks.video import eval as evaluation
from tasks.video import train
from tests.tasks.common.video.video_files import write_video

CLASSES = (
    "Dropping something",
    "Holding something",
    "Moving something up",
    "Pushing something from left to right",
    "Showing something",
    "Turning something upside down",
)
# Of each class a colour; red, green, blue.
_COLOURS = np.array(
    [[200, 60, 60], [60, 200, 60], [60, 60, 200], [190, 190, 50], [50, 190, 190], [120, 120, 120]]
)
FRAMES, SIDE, WIDTH = 8, 32, 48
STEPS, BATCH = 20, 4
# What is shown and what it is called: of the held-out videos, two have a wrong label.
TRAIN = [(label, label) for _ in range(2) for label in range(len(CLASSES))]
HELD_OUT = [*((label, label) for label in range(len(CLASSES))), (0, 3), (2, 5)]

# A layer of width 32 that sees 8 frames of 16 patches.
MODEL = trecvit.TRecViTConfig(
    image_size=(SIDE, SIDE), patch_size=(8, 8), width=32, depth=1, mlp_size=64, num_heads=2, pool="gap",
    num_classes=len(CLASSES), rep_size=32, frames_per_clip=FRAMES,
)  # fmt: skip
SMALL = (
    "--config.model.width=32",
    "--config.model.depth=1",
    "--config.model.mlp_size=64",
    "--config.model.num_heads=2",
    "--config.model.rep_size=32",
    f"--config.train.steps={STEPS}",
    "--config.train.eval_every=0",
    f"--config.optim.total={STEPS}",
    "--config.optim.warmup=2",
    "--config.checkpoint.every=1000",
    "--config.eval.batch_size=8",
    "--config.log.progress=false",
)


class Written(NamedTuple):
    """A data set on disk.

    args: of configs/trecvit.py. options: of the command.
    held_out: of every held-out video its name in reports, its frames as they are decoded, its label.
    classes: names by label.
    uniform: whether frames are taken from equal segments.
    """

    args: str
    options: tuple[str, ...]
    held_out: list[tuple[str, np.ndarray, int]]
    classes: tuple[str, ...] = CLASSES
    uniform: bool = False


def film(shown: int, seed: int) -> np.ndarray:
    """uint8 [6 to 12, 32, 48, 3]: the colour of a class, and a bright bar that moves to the right."""
    count = (12, 6, 10, 11)[seed % 4]  # 6 are fewer than a clip has
    frames = np.empty((count, SIDE, WIDTH, 3), np.uint8)
    frames[:] = _COLOURS[shown]
    for i, frame in enumerate(frames):
        left = (5 * seed + 4 * i) % (WIDTH - 8)
        frame[8:24, left : left + 8] = 230
    # Grain, or patches of one colour would be standardised rounding errors to a masked auto-encoder.
    grain = np.random.default_rng(seed).integers(-12, 13, frames.shape)
    return (frames + grain).astype(np.uint8)


def decode(source: Path | bytes) -> np.ndarray:
    """All frames of a video, by PyAV alone."""
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_films(folder: Path, names: Sequence[str], shown: Sequence[int], **options: Any) -> None:
    """A video of each name, of what is to be seen in it."""
    for number, (name, seen) in enumerate(zip(names, shown, strict=True)):
        # Held-out videos begin elsewhere.
        seed = number + len(TRAIN) * (len(names) == len(HELD_OUT))
        write_video(folder / name, film(seen, seed), **({"codec": "mpeg4"} | options))


def write_folder(root: Path) -> Written:
    """Video files with CSV lists."""
    names = {"train": [f"train/{i}.mp4" for i in range(len(TRAIN))]}
    names["validation"] = [f"held out/{i}.mp4" for i in range(len(HELD_OUT))]
    for (kind, listed), videos in zip(names.items(), (TRAIN, HELD_OUT), strict=True):
        write_films(root, listed, [seen for seen, _ in videos])
        lines = [f"{name},{CLASSES[label]}\n" for name, (_, label) in zip(listed, videos, strict=True)]
        (root / f"{kind}.csv").write_text("path,label\n" + "".join(lines))
    return Written(arguments("folder", root), (), decoded(root, names["validation"]))


def arguments(source: str, root: Path) -> str:
    """Arguments of configs/trecvit.py for a data set of six classes."""
    return f"data={source},path={root},classes={len(CLASSES)},videos={len(TRAIN)}"


def decoded(root: Path, names: Sequence[str]) -> list[tuple[str, np.ndarray, int]]:
    """`Written.held_out` of video files with the labels of `HELD_OUT`."""
    labels = [label for _, label in HELD_OUT]
    return [(str(root / name), decode(root / name), label) for name, label in zip(names, labels, strict=True)]


def run(workdir: Path, *options: str, args: str = "") -> list[dict]:
    """`python -m tasks.video.train` in this process: a tiny model, 20 steps unless the options say otherwise.

    Returns:
      The records of metrics.jsonl.
    """
    train.main([f"--config={config(args)}", f"--workdir={workdir}", *SMALL, *options])
    return read_records(workdir)


def config(args: str) -> str:
    """--config of a tiny model."""
    own = {"recipe": "small", "size": "mini", "image": SIDE, "frames": FRAMES, "batch": BATCH}
    given = {part.partition("=")[0] for part in args.split(",")}
    return ",".join([f"configs/trecvit.py:{args}", *(f"{k}={v}" for k, v in own.items() if k not in given)])


def evaluate(workdir: Path, *options: str) -> dict[str, Any]:
    """`python -m tasks.video.eval` on a run in this process; summary.json."""
    output = workdir / "evaluated"
    evaluation.main([f"--workdir={workdir}", f"--output={output}", *options])
    return json.loads((output / "summary.json").read_text())


def losses(records: list[dict]) -> list[float]:
    """Training loss of every step, in order."""
    steps = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in steps] == list(range(len(steps)))
    return [r["loss"] for r in steps]


def held_out(records: list[dict], name: str = "held_out") -> dict[str, float]:
    """The last evaluation of that name, without its prefix."""
    found = [r for r in records if r["kind"] == "eval" and any(key.startswith(f"{name}/") for key in r)][-1]
    return {key.removeprefix(f"{name}/"): value for key, value in found.items() if key.startswith(f"{name}/")}


# Figures by hand


def cut(
    frames: np.ndarray, clips: int, crops: int, length: int = FRAMES, uniform: bool = False
) -> np.ndarray:
    """uint8 [clips * crops, length, 32, 32, 3]: clips evenly spaced in time, windows from left to right."""
    count, spare = len(frames), WIDTH - SIDE
    if uniform:  # a frame of each of `length` equal segments, evenly spaced places in it
        places = [(np.arange(length) + (k + 0.5) / clips) * count / length for k in range(clips)]
    else:  # the last frame is repeated
        room = max(count - length, 0)
        starts = [room * k / (clips - 1) for k in range(clips)] if clips > 1 else [room / 2]
        places = [round(start) + np.arange(length) for start in starts]
    shown = [np.minimum(place.astype(int), count - 1) for place in places]
    lefts = [round(spare * k / (crops - 1)) for k in range(crops)] if crops > 1 else [spare // 2]
    return np.stack([frames[i][:, :, left : left + SIDE] for i in shown for left in lefts])


@functools.lru_cache
def _model(model: trecvit.TRecViTConfig) -> Any:
    return jax.jit(
        lambda params, frames: (
            trecvit.apply(model, trecvit.TRecViTRuntime(), params, frames, output="clip")[0].logits
        )
    )


def logits_of(params: Any, clips: np.ndarray, model: trecvit.TRecViTConfig = MODEL) -> np.ndarray:
    """[rows, C] of uint8 clips, by the model alone; eight at a time."""
    found = []
    for first in range(0, len(clips), 8):
        rows = clips[first : first + 8]
        padded = np.zeros((8, *clips.shape[1:]), np.float32)
        padded[: len(rows)] = rows / np.float32(255)
        found.append(np.asarray(_model(model)(params, jnp.asarray(padded)))[: len(rows)])
    return np.concatenate(found).astype(np.float64)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of every row."""
    grown = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return grown / grown.sum(axis=-1, keepdims=True)


def scores_by_hand(
    params: Any, written: Written, clips: int = 1, crops: int = 1, model: trecvit.TRecViTConfig = MODEL
) -> np.ndarray:
    """[videos, C]: probabilities averaged over the views of each held-out video."""
    views = [cut(frames, clips, crops, uniform=written.uniform) for _, frames, _ in written.held_out]
    each = softmax(logits_of(params, np.concatenate(views), model))
    return each.reshape(len(views), clips * crops, -1).mean(axis=1)


def figures_by_hand(scores: np.ndarray, labels: Sequence[int]) -> dict[str, float]:
    """top1, top5 and mean_class of scores that are all different."""
    order = np.argsort(-scores, axis=1)
    right = order[:, 0] == np.asarray(labels)
    per_class = [right[np.asarray(labels) == label].mean() for label in sorted(set(labels))]
    top5 = (order[:, :5] == np.asarray(labels)[:, None]).any(axis=1)
    return {"top1": right.mean(), "top5": top5.mean(), "mean_class": float(np.mean(per_class))}


def check_evaluation(
    workdir: Path, summary: dict[str, Any], scores: np.ndarray, written: Written, views: int
) -> None:
    """The files of `evaluate` against scores computed by hand."""
    labels = [label for _, _, label in written.held_out]
    for name, value in figures_by_hand(scores, labels).items():
        assert abs(summary[name] - value) < 1e-9, name
    assert (summary["clips"], summary["views"]) == (len(labels), views)
    with (workdir / "evaluated" / "predictions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["video"] for row in rows] == [name for name, _, _ in written.held_out]
    assert [row["true"] for row in rows] == [written.classes[label] for label in labels]
    for row, own in zip(rows, scores, strict=True):
        found = {row[f"class{n}"]: float(row[f"score{n}"]) for n in range(1, 6)}
        best = np.argsort(-own)[:5]
        # Four decimals are written.
        assert np.abs([found[written.classes[c]] - own[c] for c in best]).max() < 1e-4
    with (workdir / "evaluated" / "per_class.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == list(written.classes)
    assert [int(row["clips"]) for row in table] == np.bincount(labels, minlength=len(table)).tolist()


def check_run(workdir: Path, records: list[dict], written: Written, *, averaged: bool = True) -> None:
    """A run that saw every held-out video by one view, and the command with one and with 4 x 3, by hand."""
    params = load_params(workdir, averaged=averaged)
    scores = scores_by_hand(params, written)
    expected = figures_by_hand(scores, [label for _, _, label in written.held_out])
    found = held_out(records)
    assert {name: found[name] for name in expected} == expected
    assert (found["count/clips"], found["count/views"]) == (len(written.held_out), 1)
    check_evaluation(workdir, evaluate(workdir), scores, written, 1)
    many = scores_by_hand(params, written, 4, 3)
    assert np.abs(many - scores).max() > 1e-4  # or the views would not matter
    check_evaluation(workdir, evaluate(workdir, "--views=4x3"), many, written, 12)
