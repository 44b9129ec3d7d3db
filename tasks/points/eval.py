"""Evaluate point trackers on TAP-Vid, on your own videos and on clips: AJ, delta_avg, OA, thresholds, AJ_RD.

    python -m tasks.points.eval --dataset=davis --data_path=tapvid_davis.pkl --workdir=RUN
    python -m tasks.points.eval --dataset=robotap --data_path=DIR --query_mode=strided --checkpoint=FILE.npz
    python -m tasks.points.eval --dataset=folder --data_path=DIR --predictor=lucas_kanade
    python -m tasks.points.eval --dataset=records --data_path=DIR --workdir=RUN        (held-out clips)

The same command continues where it was stopped, at any time. It writes per_video.csv, summary.json,
worst.png and the predicted tracks of every video.
"""

import argparse
import dataclasses
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from models.tapnext import TAPNextConfig, TAPNextRuntime
from tasks.common.config import CommandLine, make_parser, parse_command_line, to_json
from tasks.common.errors import ConfigError, RunError, run_main, writing
from tasks.common.video.errors import VideoDataError
from tasks.points.config import SCHEMA, freeze_all
from tasks.points.controls import LucasKanade, static
from tasks.points.data.clip_sets import CLIP_SOURCES, open_clip_set
from tasks.points.data.sets import FOLDER, OFFICIAL, official_videos, open_set
from tasks.points.data.tracked_video import TrackedSet
from tasks.points.evaluation_store import POOLED, EvaluationStore, set_fingerprint, summarize
from tasks.points.evaluators import VideoResult, evaluate_video
from tasks.points.metrics import (
    AVERAGE_JACCARD,
    AVERAGE_WITHIN,
    METRIC_SIZE,
    OCCLUSION_ACCURACY,
    THRESHOLDS,
    Mean,
    QueryMode,
)
from tasks.points.model_predictor import ModelPredictor
from tasks.points.predictors import Predictor
from tasks.points.reappearance import AJ_RD
from tasks.points.trained import open_model
from tasks.points.weight_files import chosen_weights
from tasks.points.worst_cases import write_worst_cases

PREDICTORS = ("model", "static", "lucas_kanade")
WORST = "worst.png"
_SHORT = {AVERAGE_JACCARD: "AJ", AVERAGE_WITHIN: "delta_avg", OCCLUSION_ACCURACY: "OA"}


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
      RunError: any wrong option or unusable file, in one line; or the evaluation was interrupted.
    """
    parser = make_parser("Evaluate point trackers on TAP-Vid, on your own videos, and on clips.")
    _add_options(parser)
    command = parse_command_line(parser, argv, schema=SCHEMA)
    console = Console(highlight=False)
    try:
        # The data first: no weights are read for a set that cannot be.
        videos = _open_data(command, console)
        _describe(command.options.dataset, videos, console)
        evaluate(command, videos, console)
    except VideoDataError as error:
        raise ConfigError(str(error)) from error
    except KeyboardInterrupt:
        raise RunError(
            "interrupted; the same command continues after the last video that was finished"
        ) from None


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    clips = f"{', '.join(CLIP_SOURCES)} (held-out clips)"
    add("--dataset", required=True, help=f"{', '.join(OFFICIAL)}, {FOLDER} (your own), a folder, {clips}")
    add("--data_path", metavar="FILE_OR_FOLDER", help="pickle, folder of pickles, CSV, your folder, clips")
    add("--clips", type=int, default=0, metavar="N", help="of held-out clips: the first N (default: all)")
    add("--query_mode", choices=("first", "strided"), default="first", help="(default: first)")
    add(
        "--predictor",
        choices=PREDICTORS,
        default="model",
        help="a control instead of a model (default: model)",
    )
    add("--checkpoint", metavar="FILE", help="weights: .safetensors, or an official .npz, .pt or .ckpt file")
    add("--step", type=int, help="for --workdir: the checkpoint of this step (default: the newest)")
    add("--size", type=int, help="pixels of a side that are seen (default: the model's, if square; or 256)")
    add("--dtype", choices=("float32", "bfloat16"), help="of matmuls (default: the run's, or float32)")
    add("--certainty", type=float, metavar="RADIUS", help="gate visibility by certainty within this radius")
    add("--chunk", type=int, default=16, help="frames on the device at a time (default: 16)")
    add("--worst", type=int, default=6, metavar="N", help="videos in worst.png; 0: no picture (default: 6)")
    add("--output", metavar="DIR", help="(default: evaluation/DATASET-MODE-... in WORKDIR or here)")


def _open_data(command: CommandLine, console: Console) -> TrackedSet:
    """What is evaluated on; raises VideoDataError, ConfigError."""
    options = command.options
    if options.dataset not in CLIP_SOURCES:
        if options.clips:
            raise ConfigError(f"--clips belongs to --dataset={'|'.join(CLIP_SOURCES)}")
        return open_set(options.dataset, options.data_path)
    trained_on = None if command.config is None else freeze_all(command.config).data
    with console.status("reading the tracks"):
        clips = open_clip_set(options.dataset, options.data_path, trained_on, options.clips)
    console.print(f"{options.dataset}: {clips.described}", markup=False, soft_wrap=True)
    return clips.videos


def _describe(dataset: str, videos: TrackedSet, console: Console) -> None:
    """What will be evaluated on, and what is not there."""
    frames = sum(map(len, videos.videos))
    console.print(f"{dataset}: {len(videos.videos)} videos, {frames} frames", soft_wrap=True)
    complete = official_videos(dataset)
    if complete is not None and complete != len(videos.videos):
        console.print(
            f"  the complete set has {complete} videos: results are not comparable with published ones"
        )
    if videos.missing:
        shown = ", ".join(map(escape, videos.missing[:3]))
        console.print(f"  {len(videos.missing)} annotated videos are missing ({shown}, ...)", soft_wrap=True)


def evaluate(command: CommandLine, videos: TrackedSet, console: Console) -> dict[str, Mean]:
    """Evaluates what the command line asks for, and writes and prints the results.

    Raises:
      ConfigError: options that do not fit together, weights that cannot be read, another evaluation in the
        output folder.
      CheckpointError: results cannot be written.
      VideoDataError: a video cannot be read; those before it are kept.
    """
    options = command.options
    for name in ("size", "chunk"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}={value}: must be at least 1")
    predictor, identity, name = open_predictor(command)
    dataset = options.dataset if options.dataset in (*OFFICIAL, *CLIP_SOURCES) else FOLDER
    identity = {
        "dataset": dataset,
        "annotations": set_fingerprint(videos),
        "query_mode": options.query_mode,
        "size": options.size or METRIC_SIZE,
        **identity,
    }
    # Clips of one source are of many folders.
    source = [Path(options.data_path).resolve().name] if dataset in CLIP_SOURCES and options.data_path else []
    folder = "-".join([dataset, *source, options.query_mode, name])
    default = (command.workdir or Path()) / "evaluation" / folder
    store = EvaluationStore(Path(options.output).expanduser() if options.output else default, identity)
    results = _run(store, videos, predictor, options.query_mode, identity["size"], console)
    means = store.finish(videos, results)
    if options.worst > 0:
        with writing(store.folder, WORST):
            path = store.folder / WORST
            write_worst_cases(path, videos.videos, results, options.query_mode, options.worst)
    print_means(means, len(results), console)
    console.print(f"  {store.folder}", soft_wrap=True)
    return means


def open_predictor(command: CommandLine) -> tuple[Predictor, dict[str, Any], str]:
    """(what is evaluated, what identifies it, its name in file names).

    Raises:
      ConfigError, CheckpointError: options that do not fit together, or weights that cannot be read.
    """
    options, backward = command.options, command.options.query_mode == "strided"
    if options.predictor != "model":
        # With clips, a run says which it held out.
        if options.checkpoint or (command.workdir and options.dataset not in CLIP_SOURCES):
            raise ConfigError(
                f"--predictor={options.predictor} has no weights: leave out --workdir and --checkpoint"
            )
        control = static if options.predictor == "static" else LucasKanade(backward=backward)
        return control, {"predictor": options.predictor}, options.predictor
    model = open_model(chosen_weights(command.workdir, options.checkpoint), options.step)
    runtime = TAPNextRuntime() if model.run is None else model.run.runtime
    if options.dtype:
        runtime = dataclasses.replace(runtime, compute_dtype=options.dtype, residual_dtype=options.dtype)
    height, width = model.config.image_size
    size = options.size or (height if height == width else METRIC_SIZE)
    _check_size(size, model.config)
    predictor = ModelPredictor(
        model.config,
        runtime,
        model.params,
        backward=backward,
        chunk=options.chunk,
        certainty_radius=options.certainty,
    )
    identity = {
        "size": size,
        "predictor": "model",
        "model": to_json(model.config),
        "weights": _checksum(model.params),
        "dtype": runtime.compute_dtype,
        "certainty": options.certainty,
    }
    return predictor, identity, model.source.resolve().stem


def _check_size(size: int, config: TAPNextConfig) -> None:
    if any(size % patch for patch in config.patch_size):
        raise ConfigError(f"--size={size}: must be a multiple of the model's patch size {config.patch_size}")


def _checksum(params: Any) -> str:
    value = 0
    for leaf in jax.tree.leaves(params):
        value = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), value)
    return f"{value:08x}"


def _run(
    store: EvaluationStore,
    videos: TrackedSet,
    predictor: Predictor,
    mode: QueryMode,
    size: int,
    console: Console,
) -> list[VideoResult]:
    """The results of all videos, those of an earlier run included."""
    results: list[VideoResult] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("videos", total=len(videos.videos))
        for index, video in enumerate(videos.videos):
            begin, result = time.perf_counter(), store.read(index)
            known = result is not None
            if result is None:
                result = evaluate_video(video, predictor, mode, size)
                store.write(index, result)
            results.append(result)
            bar.update(task, completed=index + 1, description=_running(results))
            if not console.is_terminal:
                seconds = "from before" if known else f"{time.perf_counter() - begin:.1f} s"
                line = (
                    f"[{index + 1}/{len(videos.videos)}] {video.name}: {_figures(result.metrics)}, {seconds}"
                )
                console.print(line, markup=False, soft_wrap=True)
    return results


def _running(results: Sequence[VideoResult]) -> str:
    """The means so far."""
    means = summarize(results)
    return _figures({name: means[name].value for name in _SHORT})


def _figures(metrics: dict[str, float]) -> str:
    return ", ".join(f"{short} {_percent(metrics[name])}" for name, short in _SHORT.items())


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def print_means(means: dict[str, Mean], count: int, console: Console) -> None:
    """A table of the means in per cent, with the number of videos that each is not defined on."""
    table = Table(title=f"means over {count} videos, per cent")
    table.add_column("metric")
    for column in ("mean", "undefined videos"):
        table.add_column(column, justify="right")
    titles = {**_SHORT, AJ_RD: "AJ_RD (per video)", POOLED: "AJ_RD (all events in one pool)"}
    for d in THRESHOLDS:
        titles |= {f"jaccard_{d}": f"Jaccard, {d} px", f"pts_within_{d}": f"within {d} px"}
    for name, title in titles.items():
        table.add_row(title, _percent(means[name].value), str(means[name].undefined or ""))
    console.print(table)


if __name__ == "__main__":
    run_main(main)
