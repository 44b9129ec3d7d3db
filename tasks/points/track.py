"""Track points in a video, or in front of a camera, and draw them.

    python -m tasks.points.track --video=in.mp4 --workdir=RUN --grid=16
    python -m tasks.points.track --video=in.mp4 --checkpoint=bootstapnext_ckpt.npz --points=points.csv
    python -m tasks.points.track --video=in.mp4 --workdir=RUN --click=320,200,0 --click=100,150,30 --backward
    python -m tasks.points.track --camera=0 --workdir=RUN --grid=8               until ESC or Ctrl-C

Points are x, y, t: pixels of the video as it is shown, to the right and down, (0, 0) being the corner of the
picture and (0.5, 0.5) the middle of its first pixel; t is the frame, from 0. A CSV file has a header: x, y
and t (or time, in seconds), and perhaps id or name. Into --output (default: ./tracked) go

    in.mp4     the pictures, with a disc where a point is seen, a ring where it is hidden, a fading trail
    in.csv     a row per point and frame: track, frame, time, x, y, visible, certainty; grows as it goes
    in.npz     tracks_xy float32 [Q, T, 2] (NaN where there is no track), visible bool [Q, T], certainty
               float32 [Q, T], query_txy [Q, 3], names [Q], time [T] (seconds), fps, size_wh
    in.json    summary: video, model, options, frames, speed, and why it stopped if it did before the end

Memory does not grow with the length of the video. The model is causal: a point is followed from its frame
on; with --backward a second pass over the reversed video follows it to the first frame, too. Points see each
other: up to --group are followed together, more are split into groups, each with a pass of its own, so that
which points are asked for, and in which groups, changes the tracks a little. Where a file ends early or is
damaged, the frames before that are tracked; interrupted, the command leaves what it has.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from models import tapnext
from tasks.common.config import CommandLine, make_parser, parse_command_line
from tasks.common.errors import ConfigError, RunError, run_main, writing
from tasks.common.storage import atomic_write
from tasks.common.video.command import open_video, output_base
from tasks.common.video.decoding import Limits, VideoFile
from tasks.points.config import SCHEMA, freeze_all
from tasks.points.escape import EscapeKey
from tasks.points.frame_sources import CameraSource, FrameSource, VideoSource
from tasks.points.overlay import TrackOverlay
from tasks.points.query_points import QueryPoints, check_points, grid_points, parse_clicks, read_points
from tasks.points.track_files import ENDINGS, SUMMARY, TrackFiles
from tasks.points.trackers import TAPNextModel
from tasks.points.tracking import Settings, Tracking
from tasks.points.trained import open_model
from tasks.points.weight_files import chosen_weights

OUTPUT = "tracked"
CERTAINTY_RADIUS = 8.0  # pixels of the model's image, of certainty
_SECONDS = 600.0  # for looking through a whole file: nobody else waits for it, and there is Ctrl-C


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
      RunError: any wrong option or unreadable file, in one line; or the command was interrupted.
    """
    parser = make_parser("Track points in a video or in front of a camera, and draw them.")
    _add_options(parser)
    command = parse_command_line(parser, argv, schema=SCHEMA)
    _check_options(command)
    try:
        with contextlib.ExitStack() as things:
            _track(command, things)
    except KeyboardInterrupt:
        raise RunError("interrupted; files that were already written can be read") from None


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--video", metavar="FILE", help="the video to track points in")
    add("--camera", metavar="N", help="in place of --video: the N-th camera, or its name, live")
    add("--seconds", type=float, help="for --camera: stop after so long (default: at ESC or Ctrl-C)")
    add("--points", metavar="CSV", help="points to track: columns x, y and t (or time), perhaps id or name")
    add("--click", metavar="X,Y,T", action="append", help="a point to track; may be repeated")
    add("--grid", type=int, metavar="N", help="track N x N points spread over a frame")
    add("--grid_frame", type=int, default=0, metavar="T", help="for --grid: the frame (default: 0)")
    add("--checkpoint", metavar="FILE", help="weights: .safetensors, or official ones (.npz, .pt, .ckpt)")
    add("--step", type=int, help="for --workdir: the checkpoint of this step (default: the newest)")
    add("--output", default=OUTPUT, metavar="DIR|MP4", help=f"(default: ./{OUTPUT})")
    add("--backward", action="store_true", help="also track before the points' frames, by a reversed pass")
    add(
        "--certainty",
        type=float,
        nargs="?",
        const=CERTAINTY_RADIUS,
        metavar="RADIUS",
        help="a point is visible only if it is certain to lie within so many pixels of the model's image, "
        f"too: sigmoid(visible) certainty > 0.5 (default: off; {CERTAINTY_RADIUS:g} without a number)",
    )
    add(
        "--group",
        type=int,
        default=Settings.group,
        metavar="N",
        help=f"most points tracked together (default: {Settings.group}); each group is a pass over the video."
        " Points of a group see each other, so groups change the tracks a little",
    )
    add(
        "--size",
        metavar="N|HxW",
        help="frames as the model sees them, in pixels; tracks and points are as they were (default: the "
        "model's own; 512 for TAPNext++ 512)",
    )
    add(
        "--chunk",
        type=int,
        help=f"frames given to the model at a time (default: {Settings.chunk}; camera: 1)",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="of matmuls (default: the run's; float32)")
    add("--trail", type=int, default=16, metavar="N", help="frames over which trails fade; 0: no trails")
    add("--no_video", action="store_true", help="write the numbers only")
    add("--font", metavar="TTF", help="for names in other than Latin letters")


def _check_options(command: CommandLine) -> None:
    options = command.options
    if bool(options.video) == bool(options.camera):
        raise ConfigError("give one of --video=FILE and --camera=N: what points are tracked in")
    asked = [n for n in ("points", "click", "grid") if getattr(options, n) is not None]
    if len(asked) != 1:
        raise ConfigError(
            f"{'--' + ' and --'.join(asked) if asked else 'no points'}: give one of --points=CSV, --grid=N "
            "and --click=X,Y,T (which may be repeated): the points to track"
        )
    for name, least in (("group", 1), ("chunk", 1), ("trail", 0), ("grid_frame", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} = {value}: must be at least {least}")
    for name in ("certainty", "seconds"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} = {value:g}: must be positive")
    if options.camera and options.backward:
        raise ConfigError("--backward needs a --video: what a camera saw is gone")
    if options.seconds is not None and not options.camera:
        raise ConfigError("--seconds belongs to --camera")
    chosen_weights(command.workdir, options.checkpoint)
    if command.workdir is None and options.step is not None:
        raise ConfigError("--step belongs to --workdir")
    if command.workdir is not None and command.config is None:
        raise ConfigError(f"{command.workdir} is not the workdir of a run: it has no config.json")


class Opened(NamedTuple):
    """What is tracked in.

    Attributes:
      source: of its pictures.
      option: as it was given, for messages.
      stem: name of the files that are written.
      video: the file; None: a camera.
    """

    source: FrameSource
    option: str
    stem: str
    video: VideoFile | None

    def described(self) -> dict[str, Any]:
        """For the summary."""
        if self.video is None:
            size = {"height": self.source.height, "width": self.source.width}
            return {"camera": self.option, "fps": self.source.fps, **size}
        info = dataclasses.asdict(self.video.info)
        return {"path": self.video.name, **info, "cut_short": self.video.cut_short}


def _open(options: argparse.Namespace, things: contextlib.ExitStack) -> Opened:
    """Opens the video or camera; `things` closes it."""
    if options.camera:
        camera = things.enter_context(CameraSource(options.camera, options.seconds))
        return Opened(camera, f"--camera={options.camera}", "camera", None)
    video = things.enter_context(open_video(options.video, Limits(seconds=_SECONDS)))
    if video.info.frames < 2:
        raise ConfigError(f"--video={options.video}: it has one frame: there is nothing to track")
    return Opened(VideoSource(video), f"--video={options.video}", Path(options.video).stem, video)


def _query_points(options: argparse.Namespace, source: FrameSource) -> QueryPoints:
    """The points asked for, inside the video."""
    if options.points is not None:
        points = read_points(Path(options.points).expanduser(), source.fps)
    elif options.click is not None:
        points = parse_clicks(options.click)
    else:
        points = grid_points(options.grid, source.height, source.width, options.grid_frame)
    check_points(points, source.height, source.width, source.frames)
    if source.frames is None and len(points.names) > options.group:
        raise ConfigError(
            f"{len(points.names)} points, but --group={options.group}: what a camera shows is seen once, "
            "so all of its points must be followed together"
        )
    return points


def _overlay(options: argparse.Namespace, source: FrameSource, points: QueryPoints) -> TrackOverlay | None:
    if options.no_video:
        return None
    font = Path(options.font).expanduser() if options.font else None
    names = points.names if points.named else [f"point {name}" for name in points.names]
    start_xy = points.query_txy[:, 1:]
    return TrackOverlay(source.height, source.width, start_xy, names, options.trail, font)


def _frame_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, times, width = text.lower().partition("x")
    width = width if times else height
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ConfigError(f"--size={text}: must be a number of pixels, or height x width, such as 512x512")
    return int(height), int(width)


def _open_tracker(command: CommandLine) -> tuple[TAPNextModel, dict[str, Any]]:
    """The model, and what the summary says of it."""
    options, cfg = command.options, None if command.config is None else freeze_all(command.config)
    frame_size = _frame_size(options.size)
    model = open_model(chosen_weights(command.workdir, options.checkpoint), options.step)
    runtime = tapnext.TAPNextRuntime() if cfg is None else cfg.runtime
    if options.dtype:
        runtime = dataclasses.replace(runtime, compute_dtype=options.dtype, residual_dtype=options.dtype)
    try:
        tracker = TAPNextModel(
            model.config, runtime, model.params, frame_size, options.certainty or CERTAINTY_RADIUS
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return tracker, {
        "source": str(model.source),
        "step": options.step,
        "parameters": tapnext.count_params(model.config),
        "numerics": model.config.numerics,
        "image_size": list(tracker.units),
        "frame_size": list(tracker.frame_size),
        "compute_dtype": runtime.compute_dtype,
    }


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        group=options.group,
        chunk=options.chunk or (1 if options.camera else Settings.chunk),
        backward=options.backward,
        gate=options.certainty is not None,
        draw=not options.no_video,
    )


def _track(command: CommandLine, things: contextlib.ExitStack) -> None:
    options, console = command.options, Console(highlight=False)
    opened = _open(options, things)
    source = opened.source
    points = _query_points(options, source)
    read = {"the video": options.video, "the points": options.points}
    sources = {what: path for what, path in read.items() if path}
    base = output_base(options.output, opened.stem, ENDINGS, sources)
    # What can be wrong with the video and the points comes first: weights take long to read.
    overlay = _overlay(options, source, points)
    tracker, described = _open_tracker(command)
    settings = _settings(options)
    with writing(base.parent, "the tracks"):
        with TrackFiles(base, source, points, overlay) as files, EscapeKey() as escape:
            stop = escape.hit if options.camera else _never
            done = Tracking(source, tracker, points, settings, files, console, stop)
            done.run()
        if not files.frames:
            raise ConfigError(f"{opened.option}: {done.stopped or 'it ended before its first frame'}")
        given = {name: value for name, value in vars(options).items() if name not in ("config", "workdir")}
        record = {
            "video": opened.described(),
            "model": described,
            "options": {**given, "chunk": settings.chunk, "command": list(command.argv)},
            **done.report(),
        }
        atomic_write(files.path(SUMMARY), json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    if done.interrupted:
        raise RunError(f"{done.stopped}; what was tracked until then is in {base.parent}")
    _warn(opened, done.stopped, record["points"]["not_reached"])
    _print(record, files, console)


def _never() -> bool:
    return False


def _warn(opened: Opened, stopped: str, not_reached: int) -> None:
    cut_short = "" if opened.video is None else opened.video.cut_short
    if problems := "; ".join(filter(None, (cut_short, stopped))):
        print(f"warning: {opened.option}: {problems}; what is before that was tracked", file=sys.stderr)
    if not_reached:
        print(f"warning: points for frames that were not reached: {not_reached}", file=sys.stderr)


def _print(record: dict[str, Any], files: TrackFiles, console: Console) -> None:
    frames, points, speed = record["frames"]["tracked"], record["points"], record["speed"]
    share = points["visible_share"]
    seen = "" if share is None else f", visible {100 * share:.0f} % of the time"
    console.print(
        f"  {points['count']:,} points in {frames:,} frames{seen}; {speed['seconds']:.1f} s: "
        f"{speed['frames_per_second']:.1f} frames/s; the model alone {speed['model_frames_per_second']:.1f}",
        soft_wrap=True,
    )
    for path in (*files.written(), files.path(SUMMARY)):
        console.print(f"  {path}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_main(main)
