"""Classify a video file of any length frame by frame: what the model says so far, drawn beside the picture.

    python -m tasks.video.classify --video=clip.mp4 --workdir=DIR            a run of tasks.video.train
    python -m tasks.video.classify --video=clip.mp4 --checkpoint=FILE.npz --classes=names.txt

Memory does not grow with the length: a frame (or --chunk frames) is decoded, cut as in evaluation, and given
to the model with the state that the frames before it left. Into --output (default: ./classified) go

    clip.mp4     the pictures with the running top 5, at the video's rate; without its sound
    clip.jsonl   one line per frame the model saw: frame (index in the video), time (seconds), clip (counts
                 restarts), top: [{index, name, probability}, ...], best first
    clip.json    summary, written at the end: video, model, options, frames, prediction, speed, and why it
                 stopped if it did before the end (also by a signal)

The model sees: the middle of each frame at the run's data.height x data.width, of that the middle of its own
size; with an official file 8/7 of its size, that is the short side at 256 for 224. It sees every --stride-th
frame, as it was trained (runs with data.sampling=uniform: about data.frames in the whole video). The
prediction is that of the last frame, which knows all before it; with --restart, the mean over the ends of
the whole clips. Where a file ends early or is damaged, the frames before that are classified.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from models import trecvit
from tasks.common.config import CommandLine, make_parser, parse_command_line
from tasks.common.errors import ConfigError, RunError, run_main, writing
from tasks.common.storage import write_json
from tasks.common.video.command import open_video, output_base
from tasks.common.video.decoding import Limits, VideoFile
from tasks.common.video.frames import Window
from tasks.video.config import SCHEMA, VideoConfig, freeze_all
from tasks.video.evaluators import class_names
from tasks.video.overlay import Overlay
from tasks.video.stream import Classification, Files, Settings, StreamClassifier
from tasks.video.trained import TrainedModel, check, open_model

OUTPUT = "classified"
_SECONDS = 600.0  # for looking through a whole file: nobody else waits for it, and there is Ctrl-C


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
      RunError: any wrong option or unreadable file, in one line; or the command was interrupted.
    """
    parser = make_parser("Classify a video frame by frame and draw the running prediction.")
    _add_options(parser)
    command = parse_command_line(parser, argv, schema=SCHEMA)
    try:
        _classify(command)
    except KeyboardInterrupt:
        raise RunError("interrupted; files that were already written can be read") from None


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--video", metavar="FILE", help="the video to classify")
    add("--checkpoint", metavar="NPZ", help="an official file, in place of --workdir")
    add("--step", type=int, help="for --workdir: the checkpoint of this step (default: the newest)")
    add("--grid", metavar="ROWSxCOLUMNS", help="for --checkpoint: patches of a frame (default: a square)")
    add("--classes", metavar="TXT", help="names of the classes, one a line (default: the run's; or numbers)")
    add("--output", default=OUTPUT, metavar="DIR|MP4", help=f"(default: ./{OUTPUT})")
    add(
        "--stride",
        type=int,
        help="the model sees every so many frames (default: the run's data.stride, or 1)",
    )
    add(
        "--restart",
        default="0",
        metavar="N|auto",
        help="begin a new clip after so many frames that the model saw; auto: the clips it was trained on; "
        "0: never",
    )
    add("--chunk", type=int, default=1, help="frames given to the model at a time")
    add("--top", type=int, default=5, help="classes shown and written")
    add("--dtype", choices=("float32", "bfloat16"), help="of matmuls (default: the run's; float32)")
    add("--no_video", action="store_true", help="write the JSON files only")
    add("--font", metavar="TTF", help="for names in other than Latin letters")


def _classify(command: CommandLine) -> None:
    options, console = command.options, Console(highlight=False)
    subject = read_subject(command)
    with open_video(options.video, subject.limits) as video:
        settings = _settings(command, subject, video.info.frames)
        model = subject.load(_grid(options.grid))
        names = _names(options.classes, model)
        settings = dataclasses.replace(settings, top=min(settings.top, len(names)))
        font, info = Path(options.font).expanduser() if options.font else None, video.info
        overlay = None if options.no_video else Overlay(info.height, info.width, settings.top, font)
        classifier = StreamClassifier(
            model.config,
            subject.runtime,
            model.params,
            subject.window(model.config),
            chunk=settings.chunk,
            restart=settings.restart,
        )
        described = _described(command, subject, model, video, settings)
        with writing(settings.base.parent, "the classification"):
            with Files(settings.base, info, overlay) as files:
                done = Classification(video, classifier, names, settings, files, console)
                done.run()
            if not files.frames:
                raise ConfigError(f"--video={options.video}: {done.stopped}")
            record = described | done.report()
            write_json(files.summary, record, ensure_ascii=False)
    if done.interrupted:
        raise RunError(f"{done.stopped}; what was classified until then is in {settings.base.parent}")
    if problems := "; ".join(filter(None, (video.cut_short, done.stopped))):
        print(f"warning: {options.video}: {problems}; what is before that was classified", file=sys.stderr)
    _print(record, files, console)


class Subject(NamedTuple):
    """A model before its weights are read, and how it is used.

    Attributes:
      source: a run's workdir, or an official file.
      step: of the checkpoint in the workdir; None = the newest good one.
      cfg: the configuration, of the run or of --config; None = there is none.
      runtime: how the model is run.
      limits: on the video file.
    """

    source: Path
    step: int | None
    cfg: VideoConfig | None
    runtime: trecvit.TRecViTRuntime
    limits: Limits

    def load(self, grid: tuple[int, int] | None) -> TrainedModel:
        """Reads the weights.

        Args:
          grid: patches of a frame (rows, columns), of an official file; None: a square.

        Raises:
          ConfigError, CheckpointError: they cannot be read, and why; or they are no classifier's.
        """
        if not self.source.is_dir():
            model = open_model(self.source, grid=grid)
        elif grid is not None:
            raise ConfigError("--grid belongs to --checkpoint: a run knows its own")
        else:
            model = open_model(self.source, self.step)
            if self.cfg is not None and self.cfg.model != model.config:
                check(self.cfg.model, model.params, self.source)
                model = model._replace(config=self.cfg.model)
        if model.config.head not in ("classes", "readout"):
            raise ConfigError(f"{self.source}: its head is {model.config.head!r}; a classifier is needed")
        if self.cfg is not None and self.cfg.augment.size != model.config.image_size:
            raise ConfigError(
                f"augment.size = {self.cfg.augment.size}, but {self.source} was made for frames of "
                f"{model.config.image_size}"
            )
        return model

    def window(self, model: trecvit.TRecViTConfig) -> Window:
        """The part of a frame that the loader would give at test, and its size."""
        if self.cfg is not None:
            return Window(self.cfg.data.height, self.cfg.data.width, self.cfg.data.fit)
        height, width = (round(8 / 7 * side) for side in model.image_size)
        return Window(height, width)


def read_subject(command: CommandLine) -> Subject:
    """The model a command line asks for.

    Raises:
      ConfigError: neither or both of --workdir and --checkpoint, or options that do not fit together.
    """
    options, workdir = command.options, command.workdir
    if not options.video:
        raise ConfigError("--video=FILE is missing: the video to classify")
    if (workdir is None) == (options.checkpoint is None):
        raise ConfigError("give one of --workdir=DIR (a run of ours) and --checkpoint=NPZ (an official file)")
    cfg = None if command.config is None else freeze_all(command.config)
    if workdir is not None and cfg is None:
        raise ConfigError(f"{workdir} is not the workdir of a run: it has no config.json")
    if workdir is None and options.step is not None:
        raise ConfigError("--step belongs to --workdir")
    source = workdir or Path(options.checkpoint).expanduser()
    if workdir is None and source.is_dir():
        raise ConfigError(f"--checkpoint={source} is a folder: an .npz file is needed; or is it a --workdir?")
    runtime = trecvit.TRecViTRuntime() if cfg is None else cfg.runtime
    if options.dtype:
        try:
            runtime = dataclasses.replace(runtime, compute_dtype=options.dtype)
        except ValueError as error:
            raise ConfigError(f"--dtype={options.dtype}: {error}") from error
    limits = Limits() if cfg is None else cfg.data.limits()
    limits = dataclasses.replace(limits, seconds=max(limits.seconds, _SECONDS))
    return Subject(source, options.step, cfg, runtime, limits)


def _settings(command: CommandLine, subject: Subject, frames: int) -> Settings:
    options, cfg = command.options, subject.cfg
    for name in ("stride", "chunk", "top"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} = {value}: must be at least 1")
    stride = options.stride or (1 if cfg is None else cfg.data.stride)
    if not options.stride and cfg is not None and cfg.data.sampling == "uniform":
        stride = max(1, frames // cfg.data.frames)
    if options.restart == "auto":
        clip = trecvit.TRecViTConfig.frames_per_clip
        if cfg is not None:
            clip = trecvit.split_clips(cfg.data.frames, cfg.model.frames_per_clip)[1]
    elif options.restart.isdecimal():
        clip = int(options.restart)
    else:
        raise ConfigError(f"--restart={options.restart}: a number of frames, 0 (never) or 'auto' is needed")
    stem = Path(options.video).stem
    base = output_base(options.output, stem, (".mp4", ".jsonl", ".json"), {"the video": options.video})
    return Settings(base, stride, clip, options.chunk, options.top)


def _grid(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise ConfigError(f"--grid={text}: expected rows x columns, such as 14x14")
    return int(rows), int(columns)


def _names(given: str | None, model: TrainedModel) -> tuple[str, ...]:
    count = model.config.num_classes
    if given is None:
        return class_names(model.classes, count)
    try:
        names = Path(given).expanduser().read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--classes={given}: cannot be read as UTF-8 text: {error}") from error
    if len(names) != count:
        raise ConfigError(f"--classes={given}: {len(names)} lines; the model has {count} classes, one a line")
    return tuple(names)


def _described(
    command: CommandLine, subject: Subject, model: TrainedModel, video: VideoFile, settings: Settings
) -> dict[str, Any]:
    """The part of the summary that is known before anything is classified."""
    given = {
        name: value for name, value in vars(command.options).items() if name not in ("config", "workdir")
    }
    return {
        "video": {
            "path": command.options.video,
            **dataclasses.asdict(video.info),
            "cut_short": video.cut_short,
        },
        "model": {
            "source": str(subject.source),
            "step": subject.step,
            "parameters": trecvit.count_params(model.config),
            "classes": model.config.num_classes,
            "image_size": list(model.config.image_size),
            "compute_dtype": subject.runtime.compute_dtype,
        },
        "options": {
            **given,
            "stride": settings.stride,
            "restart": settings.restart,
            "top": settings.top,
            "command": list(command.argv),
        },
    }


def _print(record: dict[str, Any], files: Files, console: Console) -> None:
    frames, speed = record["frames"], record["speed"]
    for number, each in enumerate(record["prediction"]["top"]):
        line = f"  {100 * each['probability']:5.1f} %  {each['name']}"
        console.print(line, style="bold" if number == 0 else None, markup=False, soft_wrap=True)
    console.print(
        f"  {frames['classified']:,} of {frames['read']:,} frames classified in {speed['seconds']:.1f} s: "
        f"{speed['frames_per_second']:.1f} frames/s; the model alone {speed['model_frames_per_second']:.1f}",
        soft_wrap=True,
    )
    for path in (files.film, files.lines, files.summary):
        if path is not None:
            console.print(f"  {path}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_main(main)
