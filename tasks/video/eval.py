"""Evaluate video classifiers: top-1 and top-5 over several views, table per class, confusion matrix.

    python -m tasks.video.eval --workdir=DIR
    python -m tasks.video.eval --workdir=DIR --views=4x3 --compare=DIR2,DIR3 --names=full,single,shuffled
    python -m tasks.video.eval --checkpoint=FILE.npz --config=configs/trecvit.py:data=kinetics,path=k400

A run is evaluated on its own held-out videos, cut as its own configuration says; --config.data.path=DIR and
the like choose others.
"""

import argparse
import csv
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from models import trecvit
from models.common.sharding import ShardingRules, param_shardings
from tasks.common.config import CommandLine, make_parser, parse_command_line, to_json
from tasks.common.errors import ConfigError, RunError, bad_input, run_main, writing
from tasks.common.mesh import MeshConfig, make_mesh
from tasks.common.storage import replacing, write_json
from tasks.common.writer import read_records
from tasks.video import metrics
from tasks.video.config import SCHEMA, VideoConfig, freeze_all
from tasks.video.evaluators import Classifier, class_names, judge, write_judgement
from tasks.video.metrics import Judged
from tasks.video.plots import plot_runs
from tasks.video.reports import EVALUATION, print_figures
from tasks.video.train import UNREADABLE, open_data
from tasks.video.trained import TrainedModel, check, open_model, run_config


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
      RunError: any wrong option or unreadable file, in one line; or the evaluation was interrupted.
    """
    parser = make_parser("Evaluate video classifiers: top-1, top-5, per class, confusion matrix.")
    _add_options(parser)
    command = parse_command_line(parser, argv, schema=SCHEMA)
    try:
        _evaluate(command)
    except KeyboardInterrupt:
        raise RunError("interrupted; files that were already written are complete") from None


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", metavar="NPZ", help="an official file; its data are those of --config")
    add("--step", type=int, help="for --workdir: the checkpoint of this step (default: the newest)")
    add("--views", metavar="CLIPSxCROPS", help="views of a video, such as 4x3 (default: the run's)")
    add("--videos", type=int, default=0, help="so many held-out videos, drawn once (default: all)")
    add("--average", choices=("probabilities", "logits"), help="over the views (default: the run's)")
    add("--batch", type=int, help="views at a time (default: the run's eval.batch_size)")
    add("--dtype", choices=("float32", "bfloat16"), help="of matmuls (default: the run's)")
    add("--compare", default="", metavar="DIR,DIR", help="more runs, each on its own data, side by side")
    add("--names", default="", metavar="NAME,NAME", help="of this run, then of those compared")
    add("--output", metavar="DIR", help="(default: WORKDIR/evaluation, or ./evaluation for --checkpoint)")


def _evaluate(command: CommandLine) -> None:
    options, console, runs = command.options, Console(highlight=False), _subjects(command)
    output = Path(options.output or (command.workdir or Path()) / EVALUATION)
    found, logs = {}, {}
    for name, (source, cfg) in runs.items():
        folder = output if len(runs) == 1 else output / name
        found[name] = evaluate(cfg, source, folder, options.step, options.videos, console)
        if source.is_dir():
            logs[name] = read_records(source)
    print_figures(found, console)
    if len(runs) > 1 and logs:
        with writing(output, "the evaluation"):
            plot_runs(logs, output / "comparison.png")
    console.print(f"  {output}", soft_wrap=True)


def _subjects(command: CommandLine) -> dict[str, tuple[Path, VideoConfig]]:
    """Name -> (where the weights are, the configuration they are evaluated with)."""
    options = command.options
    if (command.workdir is None) == (options.checkpoint is None):
        raise ConfigError("give one of --workdir=DIR (a run of ours) and --checkpoint=NPZ (an official file)")
    if command.config is None:
        what = "--checkpoint needs --config=FILE[:args], which says what videos it is evaluated on"
        raise ConfigError(what if options.checkpoint else f"{command.workdir} is not the workdir of a run")
    source = command.workdir or Path(options.checkpoint).expanduser()
    others = [Path(path).expanduser() for path in options.compare.split(",") if path]
    names = [name for name in options.names.split(",") if name]
    names = names or [path.resolve().name for path in (source, *others)]
    if len(names) != len(others) + 1 or len(set(names)) != len(names):
        raise ConfigError(f"--names={options.names}: {len(others) + 1} different names are needed")
    configs = [freeze_all(command.config), *(run_config(path) for path in others)]
    return {
        name: (path, _with_options(cfg, options))
        for name, path, cfg in zip(names, (source, *others), configs, strict=True)
    }


def _with_options(cfg: VideoConfig, options: argparse.Namespace) -> VideoConfig:
    if options.views:
        clips, _, crops = options.views.partition("x")
        if not (clips.isdigit() and crops.isdigit()):
            raise ConfigError(f"--views={options.views}: expected clips x crops, such as 4x3")
        try:
            data = dataclasses.replace(cfg.data, eval_clips=int(clips), eval_crops=int(crops))
        except ValueError as error:
            raise ConfigError(f"--views={options.views}: {error}") from error
        cfg = cfg._replace(data=data)
    given = {"batch_size": options.batch, "average": options.average}
    cfg = cfg._replace(
        eval=dataclasses.replace(cfg.eval, **{k: v for k, v in given.items() if v is not None}),
        mesh=MeshConfig(),
    )
    if options.dtype:
        cfg = cfg._replace(runtime=dataclasses.replace(cfg.runtime, compute_dtype=options.dtype))
    return cfg


def evaluate(
    cfg: VideoConfig, source: Path, folder: Path, step: int | None, videos: int, console: Console
) -> dict[str, float]:
    """Judges the held-out videos of a configuration by one model and writes the tables.

    Args:
      cfg: data, views and how the model is run; of an official file also its image size and frames per clip.
      source: a run's workdir, or an official .npz.
      folder: gets summary.json, per_class.csv, confusion.png, predictions.csv.
      step: of a run's checkpoint; None = the newest good one.
      videos: so many of them; 0: all.

    Returns:
      top1, top5, mean_class (shares), clips and views (counts).

    Raises:
      ConfigError, CheckpointError: see `open_model` and `open_data`.
    """
    model = _open(cfg, source, step)
    mesh = make_mesh(cfg.mesh)
    (folder / UNREADABLE).unlink(missing_ok=True)  # of an evaluation before
    data = open_data(cfg._replace(model=model.config), folder / UNREADABLE)
    if data.eval_videos is None:
        raise ConfigError("no videos are held out: give a validation list or split")
    classifier = Classifier(
        model.config, cfg.runtime, cfg.augment, mesh, cfg.eval.batch_size, cfg.eval.average
    )
    with jax.set_mesh(mesh):
        shardings = param_shardings(model.params, trecvit.param_axes(model.config), mesh, ShardingRules())
        params = jax.device_put(model.params, shardings)

    def progress(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        return track(items, what, total, console=console, transient=True)

    views = data.views(classifier.batch_size, most=videos)
    judged = judge(classifier, params, views, num_workers=cfg.train.num_workers, progress=progress)
    summary = metrics.summarize(judged)
    names = class_names(data.classes, classifier.num_classes)
    write_judgement(folder, judged, names)
    with writing(folder, "the evaluation"):
        _write_predictions(
            folder / "predictions.csv", judged, [views.videos.name(int(c)) for c in judged.clips], names
        )
        record = {"source": str(source), "step": step, **summary, "data": to_json(cfg.data)}
        write_json(folder / "summary.json", record)
    return summary


def _write_predictions(path: Path, judged: Judged, videos: Sequence[str], names: Sequence[str]) -> None:
    """One line per video: its name, true class, and the five best classes with their scores."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["video", "true", *(f"{kind}{n}" for n in range(1, 6) for kind in ("class", "score"))])
        for video, label, scores in zip(videos, judged.labels, judged.scores, strict=True):
            best = np.argsort(-scores, kind="stable")[:5]
            table.writerow([video, names[label], *(x for c in best for x in (names[c], f"{scores[c]:.4f}"))])


def _open(cfg: VideoConfig, source: Path, step: int | None) -> TrainedModel:
    own = {} if source.is_dir() else {"frames_per_clip": cfg.model.frames_per_clip}
    model = open_model(source, step, **own)
    config, params, size = model.config, model.params, cfg.model.image_size
    if config.image_size != size:
        with bad_input(str(source)):
            config, params = trecvit.resize_params(jax.tree.map(jnp.asarray, params), config, size)
    config = cfg.model if source.is_dir() else config
    check(config, params, source)
    return model._replace(config=config, params=params)


if __name__ == "__main__":
    run_main(main)
