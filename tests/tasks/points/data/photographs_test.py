"""Photographs out of packages: which, how large, what is written down of them, and what is refused."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.points.data import photographs
from tasks.points.data.__main__ import main
from tasks.points.data.photographs import COLLECTIONS, fetch_photographs
from tasks.points.data.textures import LONGEST, open_photographs
from tests.tasks.common.package_files import write_deb

DEB = "lomiri-wallpapers-16.04_1_all.deb"


def picture(height: int, width: int, kind: str = "JPEG", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One collection of two files, its package in DIR/packages."""
    small = dataclasses.replace(COLLECTIONS["lomiri"], files=("a/one.jpg", "two.png"))
    monkeypatch.setattr(photographs, "COLLECTIONS", {"lomiri": small})
    (tmp_path / "packages").mkdir()
    files = {
        "usr/a/one.jpg": picture(800, 1600),
        "usr/b/a/two.png": picture(160, 96, "PNG", 1),
        "usr/other/one.jpg": picture(64, 64),
        "usr/bone.jpg": b"not asked for",
    }
    write_deb(tmp_path / "packages" / DEB, files)
    return tmp_path


def test_the_named_files_become_textures(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["photographs", f"--output={registry}"]) == 0
    folder = registry / "photographs"
    assert f"generated_photographs={folder}" in capsys.readouterr().out
    sizes = {path.name: Image.open(path).size for path in folder.iterdir()}
    assert sizes == {"lomiri-one.jpg": (LONGEST, LONGEST // 2), "lomiri-two.jpg": (96, 160)}
    listed = json.loads((registry / "sources.json").read_text())["photographs"]
    assert [(r["file"], r["member"], r["package"]) for r in listed] == [
        ("lomiri-one.jpg", "usr/a/one.jpg", DEB),
        ("lomiri-two.jpg", "usr/b/a/two.png", DEB),
    ]
    assert all(len(r["sha256"]) == 64 and r["licence"].startswith("CC-BY") for r in listed)
    assert open_photographs("train", str(folder))[0].shape == (160, 96, 3)
    assert open_photographs("validation", str(folder))[0].shape == (LONGEST // 2, LONGEST, 3)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"usr/a/one.jpg": picture(64, 64)}, r"holds no two\.png: another version of lomiri"),
        ({"usr/a/one.jpg": b"GIF89a" + bytes(50)}, r"one\.jpg: cannot be read as a picture"),
    ],
    ids=["missing", "damaged"],
)
def test_packages_of_another_version_are_refused(
    registry: Path, capsys: pytest.CaptureFixture[str], files: dict[str, bytes], message: str
) -> None:
    write_deb(registry / "packages" / DEB, files)
    assert main(["photographs", f"--output={registry}"]) == 2
    with pytest.raises(ValueError, match=message):
        fetch_photographs(registry)
    assert not (registry / "sources.json").exists()


def test_a_picture_of_too_many_pixels_is_refused(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "_MOST_PIXELS", 800 * 1600 - 1)
    with pytest.raises(ValueError, match=r"one\.jpg: 1600 x 800 pixels: too large"):
        fetch_photographs(registry)


def test_unknown_collections_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["photographs", f"--output={tmp_path}", "--collections=opencv,mars"]) == 2
    assert "unknown collection 'mars': there are opencv, lomiri, skimage" in capsys.readouterr().err
