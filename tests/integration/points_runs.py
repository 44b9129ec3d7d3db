"""Small clips with tracks, small runs of the point trackers' command on them, their figures by hand."""

import csv
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models import tapnext
from tasks.common.checkpoint import load_params
from tasks.common.config import make_parser, parse_command_line
from tasks.common.writer import read_records
from tasks.points import train
from tasks.points.config import SCHEMA, PointsConfig, freeze_all
from tasks.points.controls import static
from tasks.points.data.clips import PointClip
from tasks.points.metrics import tapvid_metrics
from tasks.points.reports import lucas_kanade_for
from tests.tasks.points.data.point_clips import write_npz

FRAMES, SIDE, TRACKS = 6, 32, 8
STEPS, BATCH = 20, 4
TRAINING, HELD_OUT = 10, 5  # clips; batches of 8 are not filled by those that are held out
EVALUATED = 8

# Layers of width 32 that see 6 frames of 16 patches and 8 points.
MODEL = tapnext.TAPNextConfig(
    image_size=(SIDE, SIDE), patch_size=(8, 8), width=32, depth=2, mlp_size=48, num_heads=2, head_width=32
)
SMALL = (
    "--config.model.patch_size=8x8",
    "--config.model.width=32",
    "--config.model.depth=2",
    "--config.model.mlp_size=48",
    "--config.model.num_heads=2",
    "--config.model.head_width=32",
    f"--config.train.steps={STEPS}",
    "--config.train.eval_every=0",
    "--config.train.initial=official",
    "--config.loss.layers=1.0",
    f"--config.optim.total={STEPS}",
    "--config.optim.peak_lr=0.01",
    "--config.optim.warmup=2",
    "--config.checkpoint.every=1000",
    f"--config.eval.batch_size={EVALUATED}",
    "--config.log.progress=false",
)


def write_films(folder: Path) -> str:
    """Films as .npz files, split; the arguments of configs/tapnext.py."""
    for kind in ("train", "validation"):
        for number, clip in enumerate(films(kind)):
            write_npz(folder / kind / f"{number}.npz", clip)
    return f"data=npz,path={folder}"


class Written(NamedTuple):
    """Clips on disk, or drawn.

    args: of configs/tapnext.py. options: of the command.
    held_out: every held-out clip as the model must see it; places of hidden points are not looked at.
    """

    args: str
    options: tuple[str, ...]
    held_out: list[PointClip]


def film(seed: int, frames: int = FRAMES, height: int = SIDE, width: int = SIDE) -> PointClip:
    """Noise, and 8 bright points that move right and are hidden now and then. They start near the middle, so
    that a few steps are enough to come close to some."""
    rng = np.random.default_rng(seed)
    video = rng.integers(0, 100, (frames, height, width, 3)).astype(np.uint8)
    start = rng.integers((height // 2 - 3, width // 2 - 6), (height // 2 + 3, width // 2), (TRACKS, 2)) + 0.5
    tracks = np.repeat(start[:, None], frames, axis=1).astype(np.float32)
    tracks[..., 1] += np.arange(frames)
    for t in range(frames):
        y, x = tracks[:, t].astype(int).T
        video[t, y, x] = 255
    visible = rng.random((TRACKS, frames)) < 0.8
    query = rng.integers(0, 2, TRACKS).astype(np.int32)
    visible[np.arange(TRACKS), query] = visible[:, 2] = True
    return PointClip(video, tracks, visible, query)


def films(kind: str, **options: int) -> list[PointClip]:
    """Those to train on, or the held-out ones, which are others."""
    seeds = {"train": range(TRAINING), "validation": range(100, 100 + HELD_OUT)}[kind]
    return [film(seed, **options) for seed in seeds]


def config(args: str) -> str:
    """--config of a tiny model."""
    own = {"recipe": "small", "image": SIDE, "frames": FRAMES, "tracks": TRACKS, "batch": BATCH}
    given = {part.partition("=")[0] for part in args.split(",")}
    words = [*filter(None, [args]), *(f"{k}={v}" for k, v in own.items() if k not in given)]
    return f"configs/tapnext.py:{','.join(words)}"


def run(workdir: Path, *options: str, args: str = "") -> list[dict]:
    """`python -m tasks.points.train` in this process: a tiny model, 20 steps unless options say otherwise.

    Returns:
      The records of metrics.jsonl.
    """
    train.main([f"--config={config(args)}", f"--workdir={workdir}", *SMALL, *options])
    return read_records(workdir)


def frozen(args: str, *options: str) -> PointsConfig:
    """A configuration as the command reads it."""
    words = [f"--config={config(args)}", *SMALL, *options]
    return freeze_all(parse_command_line(make_parser(""), words, schema=SCHEMA).config)


def losses(records: list[dict], name: str = "loss") -> list[float]:
    """Training loss (or another metric) of every step, in order."""
    steps = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in steps] == list(range(len(steps)))
    return [r[name] for r in steps]


def evaluated(records: list[dict], name: str = "held_out") -> dict[str, float]:
    """The last evaluation of that name, without its prefix."""
    found = [r for r in records if r["kind"] == "eval" and any(key.startswith(f"{name}/") for key in r)][-1]
    own = {key: value for key, value in found.items() if key.startswith(f"{name}/")}
    return {key.removeprefix(f"{name}/"): float(value) for key, value in own.items()}  # "nan" is a string


# Figures by hand


@functools.lru_cache
def _model(model: tapnext.TAPNextConfig) -> Any:
    def run(params: Any, video: Any, query_tyx: Any) -> Any:
        return tapnext.apply(model, tapnext.TAPNextRuntime(), params, video, query_tyx, layers=True)[0]

    return jax.jit(run)


def outputs_of(
    params: Any, batch: dict[str, np.ndarray], model: tapnext.TAPNextConfig = MODEL
) -> tapnext.TAPNextOutput:
    """What the model alone says of at most 8 clips, as float64 arrays."""
    count = len(batch["video"])
    rows = np.arange(EVALUATED) % count
    output = _model(model)(params, *(jnp.asarray(batch[name][rows]) for name in ("video", "query_tyx")))
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), output)
    layers = jax.tree.map(lambda x: x[:, :count], wide.layers)
    return jax.tree.map(lambda x: x[:count], wide._replace(layers=None))._replace(layers=layers)


def loss_by_hand(
    output: tapnext.TAPNextOutput,
    batch: dict[str, np.ndarray],
    *,
    final: float = 1.0,
    layers: Sequence[float] = (1.0, 1.0),
    occluded: float = 0.0,
    weights: tuple[float, float, float] = (0.1, 1.0, 1.0),
) -> float:
    """Huber's loss, cross-entropy of the place, and of visibility, of every read-out, from the query's frame
    on."""
    at = batch["query_tyx"][..., 0].astype(int)[..., None]
    counts = batch["valid"][..., None] & (np.arange(FRAMES) >= at)
    target, visible = batch["tracks_yx"].astype(np.float64), batch["visible"]
    inside = ((target >= 0) & (target <= SIDE)).all(axis=-1)
    share = counts * np.where(visible, 1.0, occluded * inside)

    def of(read_out: Any) -> float:
        gap = np.linalg.norm(read_out.tracks_yx - np.clip(target, 0, SIDE - 1), axis=-1)
        huber = np.where(gap < 1, gap**2 / 2, gap - 0.5)
        label = np.round(np.clip(target - 0.5, 0, SIDE - 1)).astype(int)
        place = 0.0
        for axis, logits in enumerate(np.split(read_out.track_logits, 2, axis=-1)):
            chosen = np.take_along_axis(logits, label[..., axis, None], axis=-1)[..., 0]
            place = place + np.log(np.exp(logits).sum(axis=-1)) - chosen
        seen = np.log1p(np.exp(np.where(visible, -1, 1) * read_out.visible_logits))
        of_places = (weights[0] * huber + weights[1] * place) * share
        of_visibility = weights[2] * seen * counts
        return float(of_places.sum() / share.sum() + of_visibility.sum() / counts.sum())

    blocks = [of(jax.tree.map(lambda x, i=i: x[i], output.layers)) for i in range(MODEL.depth)]
    return final * of(output) + float(np.dot(layers, blocks))


def figures_of(clip: dict[str, np.ndarray], tracks_yx: np.ndarray, visible: np.ndarray) -> dict[str, float]:
    """AJ, delta_avg and OA by TAP-Vid, in pixels of 256 x 256; and delta_avg of the tracks that get hidden,
    and of the frames after that."""
    used = clip["valid"]
    truth, seen, asked = (clip[name][used] for name in ("tracks_yx", "visible", "query_tyx"))
    truth, guess = (np.where(seen[..., None], x * 256.0 / SIDE, 0.0) for x in (truth, tracks_yx[used]))
    hidden = ~visible[used]
    found = tapvid_metrics(asked[None], ~seen[None], truth[None], hidden[None], guess[None], "first")
    of_occluded, after = [], []
    for point, start in enumerate(asked[:, 0].astype(int)):
        later = [t for t in range(start + 1, FRAMES) if seen[point, t]]
        gaps = {t: np.linalg.norm(truth[point, t] - guess[point, t]) for t in later}
        shares = {t: np.mean([gap < d for d in (1, 2, 4, 8, 16)]) for t, gap in gaps.items()}
        of_occluded += [] if seen[point, start:].all() else shares.values()
        after += [share for t, share in shares.items() if not seen[point, start:t].all()]
    return {
        "average_jaccard": float(found["average_jaccard"][0]),
        "delta_avg": float(found["average_pts_within_thresh"][0]),
        "occlusion_accuracy": float(found["occlusion_accuracy"][0]),
        "delta_avg_of_occluded": float(np.mean(of_occluded)) if of_occluded else math.nan,
        "delta_avg_after_occlusion": float(np.mean(after)) if after else math.nan,
    }


def training_batch(step: int, args: str, *options: str) -> dict[str, np.ndarray]:
    """What a run sees at a step."""
    cfg = frozen(args, *options)
    return train.batches(cfg, train.open_data(cfg))[step]


def stacked(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Examples as a batch."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def scores_by_hand(
    params: Any, examples: Sequence[dict[str, np.ndarray]], model: tapnext.TAPNextConfig = MODEL
) -> list[dict[str, float]]:
    """Figures of the model on each clip."""
    found = []
    for part in (examples[i : i + EVALUATED] for i in range(0, len(examples), EVALUATED)):
        output = outputs_of(params, stacked(part), model)
        answers = zip(part, output.tracks_yx, output.visible_logits > 0, strict=True)
        found += [figures_of(*answer) for answer in answers]
    return found


def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Plain means over the clips for which there is a value."""
    known = {name: [row[name] for row in rows if not math.isnan(row[name])] for name in rows[0]}
    return {name: float(np.mean(values)) if values else math.nan for name, values in known.items()}


def held_out_examples(args: str, *options: str) -> list[dict[str, np.ndarray]]:
    """The held-out clips as the source gives them."""
    clips = train.open_data(frozen(args, *options)).held_out
    return [clips[index] for index in range(len(clips))]


def check_examples(examples: Sequence[dict[str, np.ndarray]], clips: Sequence[PointClip]) -> None:
    """They are the clips, point by point, asked for where they are seen."""
    assert len(examples) == len(clips)
    for example, clip in zip(examples, clips, strict=True):
        assert example["valid"].all()
        np.testing.assert_array_equal(example["video"], clip.video)
        np.testing.assert_array_equal(example["visible"], clip.visible)
        seen = clip.visible
        np.testing.assert_allclose(example["tracks_yx"][seen], clip.tracks_yx[seen], atol=1e-4)
        at = example["query_tyx"][:, 0].astype(int)
        points = np.arange(len(at))
        np.testing.assert_allclose(example["query_tyx"][:, 1:], clip.tracks_yx[points, at], atol=1e-4)
        assert clip.visible[points, at].all()
        given = clip.query_frames >= 0
        np.testing.assert_array_equal(at[given], clip.query_frames[given])


def check_run(
    workdir: Path,
    records: list[dict],
    examples: Sequence[dict[str, np.ndarray]],
    *,
    averaged: bool = True,
    model: tapnext.TAPNextConfig = MODEL,
) -> None:
    """A finished run's figures on the held-out clips, and those of the trackers that learn nothing."""
    rows = scores_by_hand(load_params(workdir, averaged=averaged), examples, model)
    assert equal(evaluated(records), means(rows))
    for name, predict in (("static", static), ("lucas_kanade", lucas_kanade_for(model.image_size))):
        answers = [predict(clip["video"], clip["query_tyx"]) for clip in examples]
        expected = [figures_of(clip, *answer) for clip, answer in zip(examples, answers, strict=True)]
        assert equal(evaluated(records, name), means(expected)), name
    with (workdir / "evaluation" / "per_clip.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["clip"] for row in table] == [str(number) for number in range(len(examples))]
    official = {"delta_avg": "average_pts_within_thresh"}
    for written, row in zip(table, rows, strict=True):
        found = {name: float(written[official.get(name, name)]) for name in row}
        assert equal(found, row, 1e-5)  # six digits are written


def equal(found: dict[str, float], expected: dict[str, float], tolerance: float = 1e-9) -> bool:
    """Whether all figures are; shares of counts, so that there is nothing between equal and another count."""
    assert found.keys() == expected.keys()
    return bool(np.allclose([found[n] for n in expected], [*expected.values()], 0, tolerance, equal_nan=True))
