"""Every source of clips trains a tracker by the real command, from its official format, to known figures."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.points.data import PointsDataConfig
from tasks.points.data.__main__ import main as data_command
from tasks.points.data.assemble import generated_clips
from tasks.points.data.clip_records import RecordClips
from tasks.points.data.clips import PointClip
from tasks.points.data.movi import find_movi
from tasks.points.data.simulated import SimulatedClips, SimulationConfig
from tests.integration.points_runs import (
    FRAMES,
    HELD_OUT,
    SIDE,
    STEPS,
    TRACKS,
    TRAINING,
    Written,
    check_examples,
    check_run,
    evaluated,
    film,
    films,
    frozen,
    held_out_examples,
    losses,
    run,
    write_films,
)
from tests.integration.video_runs import decode
from tests.tasks.common.video.video_files import write_video
from tests.tasks.points.data.movi_files import BoxScene, write_movi
from tests.tasks.points.data.point_clips import write_npz, write_odyssey
from tests.tasks.points.data.rooms import require_egl

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("programs")]
SIZE = (f"--height={SIDE}", f"--width={SIDE}")


def check(tmp_path: Path, written: Written, hits: bool = False) -> list[dict]:
    """20 steps, finite and downwards; then every figure. hits: whether some places must have been
    found."""
    records = run(tmp_path / "run", *written.options, args=written.args)
    found = losses(records)
    assert len(found) == STEPS
    assert all(map(math.isfinite, found))
    # Three read-outs of 2 x 32 bins and of visibility know nothing yet; Huber's loss comes on top.
    assert 0.95 < found[0] / (3 * (2 * math.log(SIDE) + math.log(2))) < 1.5
    assert sum(found[-5:]) / 5 < found[0] - 1
    for picture in ("training.png", "evaluation/clips.png"):
        assert (tmp_path / "run" / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    examples = held_out_examples(written.args, *written.options)
    check_examples(examples, written.held_out)
    check_run(tmp_path / "run", records, examples)
    if hits:  # or equal figures would say little
        assert 0 < evaluated(records)["delta_avg"] < 1
    return records


def test_npz_files(tmp_path: Path) -> None:
    """train/ and validation/ of a file a clip."""
    check(tmp_path, Written(write_films(tmp_path / "clips"), (), films("validation")), hits=True)


def test_npz_files_without_a_split(tmp_path: Path) -> None:
    """Coordinates as (x, y), occlusion instead of visibility, no queries; every fifth file is held out."""
    clips = [film(seed) for seed in range(TRAINING)]
    for number, clip in enumerate(clips):
        changes = {"tracks_yx": None, "visible": None, "query_frames": None}
        flipped = {"tracks_xy": clip.tracks_yx[..., ::-1], "occluded": ~clip.visible}
        write_npz(tmp_path / "clips" / f"{number}.npz", clip, **changes, **flipped)
    held_out = [asked_anywhere(clips[number]) for number in (4, 9)]
    options = ("--config.data.held_out_fraction=0.2",)
    check(tmp_path, Written(f"data=npz,path={tmp_path / 'clips'}", options, held_out), hits=True)


def asked_anywhere(clip: PointClip) -> PointClip:
    """A clip that does not say when its points are asked for."""
    return PointClip(clip.video, clip.tracks_yx, clip.visible, np.full(TRACKS, -1, np.int32))


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    """Films and folders of frames of 40 x 48 pixels with tracks as .npz and .csv: 8 frames, of which a clip
    has 6, brought to 32 x 32."""
    held_out = []
    for kind in ("train", "validation"):
        folder = tmp_path / "own" / kind
        folder.mkdir(parents=True)
        for number, clip in enumerate(films(kind, frames=8, height=40, width=48)):
            frames = write_own_clip(folder, f"clip {number}", clip, number)
            if kind == "validation":
                held_out.append(squashed(frames, clip))
    check(tmp_path, Written(f"data=folder,path={tmp_path / 'own'}", (), held_out), hits=True)


def write_own_clip(folder: Path, name: str, clip: PointClip, number: int) -> np.ndarray:
    """A clip in the layout of OWN_VIDEOS.md, each in another of its forms; its frames as they are decoded."""
    tracks_xy = clip.tracks_yx[..., ::-1].astype(np.float64)
    if number % 2:
        np.savez(folder / f"{name}.npz", tracks_xy=tracks_xy, visible=clip.visible)
        write_video(folder / f"{name}.mp4", clip.video, codec="mpeg4")
        return decode(folder / f"{name}.mp4")
    lines = ["track,frame,x,y,visible"]
    for track, frame in np.argwhere(clip.visible):
        lines.append(f"{track},{frame},{tracks_xy[track, frame, 0]},{tracks_xy[track, frame, 1]},1")
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    (folder / name).mkdir()
    for index, frame in enumerate(clip.video):
        Image.fromarray(frame).save(folder / name / f"{index:05d}.png")
    return clip.video


def squashed(frames: np.ndarray, clip: PointClip) -> PointClip:
    """The first 6 frames at the model's size, and the tracks there."""
    height, width = frames.shape[1:3]
    small = [Image.fromarray(f).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for f in frames[:FRAMES]]
    tracks = (clip.tracks_yx[:, :FRAMES] * (SIDE / height, SIDE / width)).astype(np.float32)
    video = np.stack([np.asarray(frame) for frame in small])
    return asked_anywhere(PointClip(video, tracks, clip.visible[:, :FRAMES], clip.query_frames))


def test_point_odyssey(tmp_path: Path) -> None:
    """Sequences of 13 frames are two clips, both held out if their sequence is; frames are JPEG files."""
    root, sequences = tmp_path / "odyssey", [film(seed, frames=13) for seed in range(6)]
    for number, clip in enumerate(sequences):
        write_odyssey(root / f"sequence {number}", clip)
    held_out = []
    for number in (2, 5):
        files = sorted((root / f"sequence {number}" / "rgbs").iterdir())
        video = np.stack([np.asarray(Image.open(file)) for file in files])
        for first in (0, FRAMES):
            window, clip = slice(first, first + FRAMES), sequences[number]
            cut = PointClip(
                video[window], clip.tracks_yx[:, window], clip.visible[:, window], clip.query_frames
            )
            held_out.append(asked_anywhere(cut))
    options = ("--config.data.held_out_fraction=0.34",)
    check(tmp_path, Written(f"data=pointodyssey,path={root}", options, held_out), hits=True)


GENERATED = ("--config.data.generated_clips=30", f"--config.data.generated_held_out={HELD_OUT}")


def generated(split: str, count: int, settings: PointsDataConfig | None = None) -> list[PointClip]:
    """Clips of the embedded generator by themselves; the recipe's unless settings say otherwise."""
    clips = generated_clips(settings or frozen("data=generated").data, split, count)
    return [clips.open(index) for index in range(count)]


def test_generated_clips(tmp_path: Path) -> None:
    check(tmp_path, Written("data=generated", GENERATED, generated("validation", HELD_OUT)))


def test_generated_clips_that_are_kept(tmp_path: Path) -> None:
    """8 clips are stored at the first start, and read again at the second."""
    kept = ("--config.data.generated_cached=8", f"--config.data.cache_dir={tmp_path / 'cache'}")
    options = (*GENERATED, *kept, "--config.data.generated_held_out=2")
    records = check(tmp_path, Written("data=generated", options, generated("validation", 2)))
    (folder,) = (tmp_path / "cache").iterdir()
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
    assert stamps
    assert len(RecordClips(folder)) == 8
    short = ("--config.train.steps=2", "--config.eval.lucas_kanade=false", "--config.eval.pictures=0")
    assert losses(run(tmp_path / "again", *options, *short, args="data=generated")) == losses(records)[:2]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.array_record")} == stamps


def coded(clip: PointClip, quality: int = 95) -> PointClip:
    """A clip as the JPEG coder leaves it."""

    def code(frame: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    video = np.stack([code(frame) for frame in clip.video])
    return PointClip(video, clip.tracks_yx, clip.visible, clip.query_frames)


def test_records_that_generate_made(tmp_path: Path) -> None:
    """Two folders of records, mixed; what is seen is what the JPEG coder leaves."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, quality in zip(folders, (95, 60), strict=True):
        counts = ("--clips=6", f"--held-out={HELD_OUT}", f"--quality={quality}", "--per-shard=4")
        size = (f"--frames={FRAMES}", *SIZE, f"--tracks={TRACKS}", "--workers=1")
        assert data_command(["generate", f"--output={folder}", *counts, *size]) == 0
    settings = PointsDataConfig(frames=FRAMES, height=SIDE, width=SIDE, tracks=TRACKS)
    clips = generated("validation", HELD_OUT, settings)
    held_out = [coded(clip, quality) for quality in (95, 60) for clip in clips]
    options = (f"--config.data.path={folders[0]},{folders[1]}",)
    check(tmp_path, Written(f"data=records,path={folders[0]}", options, held_out))


def test_records_that_convert_movi_made(tmp_path: Path) -> None:
    """TFRecords of a falling box; tracks by TAP-Vid-Kubric's rule."""
    source = write_movi(tmp_path / "movi", {"train": 6, "validation": 3}, frames=FRAMES, size=SIDE)
    points = (f"--points={TRACKS}", "--seed=3", "--quality=0", "--workers=1")
    command = ["convert-movi", f"--path={source}", f"--output={tmp_path / 'records'}", *points]
    assert data_command(command) == 0
    clips = find_movi(source, TRACKS, 3)["validation"]
    video = BoxScene(frames=FRAMES, size=SIDE).pictures()[0]
    held_out = []
    for index in range(len(clips)):
        clip = clips.open(index)
        held_out.append(PointClip(video, clip.tracks_yx, clip.visible, clip.query_frames))
    assert len(held_out) == 3
    check(tmp_path, Written(f"data=records,path={tmp_path / 'records'}", (), held_out))


def test_records_that_simulate_made(tmp_path: Path) -> None:
    """MuJoCo's rooms."""
    require_egl()
    size = (f"--frames={FRAMES}", *SIZE, f"--points={TRACKS}", "--fewest=2", "--most=3")
    counts = ("--clips=8", "--held-out=3", "--quality=0", "--workers=1")
    assert data_command(["simulate", f"--output={tmp_path / 'records'}", *counts, *size]) == 0
    settings = SimulationConfig(
        frames=FRAMES, height=SIDE, width=SIDE, points=TRACKS, fewest=2, most=3
    )  # fmt: skip
    clips = SimulatedClips(settings, "validation", 3)
    held_out = [clips.open(index) for index in range(3)]
    check(tmp_path, Written(f"data=records,path={tmp_path / 'records'}", (), held_out))


def test_records_that_prepare_made(tmp_path: Path) -> None:
    """Any source once read, and stored with its split."""
    root = tmp_path / "odyssey"
    for number in range(6):
        write_odyssey(root / f"{number}", film(number))
    source = ("--source=pointodyssey", f"--path={root}", "--held-out-fraction=0.34", f"--frames={FRAMES}")
    command = ["prepare", f"--output={tmp_path / 'records'}", *source, "--quality=0", "--workers=1"]
    assert data_command(command) == 0
    held_out = [asked_anywhere(coded(film(number))) for number in (2, 5)]
    check(tmp_path, Written(f"data=records,path={tmp_path / 'records'}", (), held_out))
