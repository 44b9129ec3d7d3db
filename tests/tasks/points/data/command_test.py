"""`python -m tasks.points.data`: shards of generated clips, checks, contact sheets, errors of one line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.points.data.__main__ import main
from tasks.points.data.clip_records import RecordClips
from tasks.points.data.sheet import draw_sheet, draw_tracks, write_track_sheet
from tests.tasks.points.data.point_clips import moving_clip, write_npz

SIZE = ["--frames=4", "--height=32", "--width=40", "--tracks=12"]


def test_generate_check_and_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clips"
    command = [
        "generate",
        f"--output={out}",
        "--clips=3",
        "--held-out=2",
        "--workers=1",
        "--generated-most=3",
    ]
    assert main([*command, *SIZE]) == 0
    printed = capsys.readouterr().out
    assert "train: 3 clips, 12 frames, 36 points" in printed
    assert "validation: 2 clips, 8 frames, 24 points" in printed
    assert len(RecordClips(out / "train")) == 3
    assert main(["check", "--source=records", f"--path={out}"]) == 0
    printed = capsys.readouterr().out
    assert "3 read: 4 to 4 frames, 12 to 12 points, 40 x 32 pixels" in printed
    assert printed.count("checksums: all right") == 2
    sheet = tmp_path / "clips.png"
    for more in ([], ["--held-out"]):
        command = [
            "contact-sheet",
            "--source=records",
            f"--path={out}",
            f"--output={sheet}",
            "--rows=2",
            *more,
        ]
        assert main([*command, *SIZE]) == 0
        assert min(np.asarray(Image.open(sheet)).shape[:2]) > 300
        sheet.unlink()


def test_prepare_and_check_name_what_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_npz(tmp_path / "in" / "train" / "good.npz", moving_clip())
    far = moving_clip().tracks_yx + 50
    write_npz(tmp_path / "in" / "train" / "far.npz", moving_clip(), tracks_yx=far)
    (tmp_path / "in" / "train" / "torn.npz").write_bytes(b"PK")
    source = ["--source=npz", f"--path={tmp_path / 'in'}"]
    assert main(["check", *source]) == 2
    printed = capsys.readouterr()
    assert "1 read: 6 to 6 frames" in printed.out
    assert "cannot be used: 2" in printed.out
    assert "far.npz: point 0 is visible at frame 0" in printed.out
    assert "torn.npz: not a readable .npz file" in printed.out
    assert printed.err.strip() == "error: 2 clips cannot be used: see above"
    assert main(["prepare", *source, f"--output={tmp_path / 'out'}", "--workers=1"]) == 0
    printed = capsys.readouterr()
    assert "train: 1 clips, 6 frames" in printed.out
    assert "left out: 2" in printed.out
    assert main(["prepare", *source, f"--output={tmp_path / 'o2'}", "--workers=1", "--on-error=fail"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--source=npz"], "data.source='npz' needs data.path"),
        (["check", "--source=npz", "--path=/nowhere"], "no such folder of clips"),
        (["check", "--source=kubric"], "invalid choice: 'kubric'"),
        (["generate", "--output=x", "--source=npz", "--path=y"], "for others there is `prepare`"),
        (["contact-sheet", "--rows=0"], "--rows=0: need at least 1"),
        (["contact-sheet", "--held-out", "--generated-held-out=0"], "no clips are held out"),
        (["convert-movi", "--path=/nowhere", "--output=x"], "no such folder of TFRecord files"),
        (["draw"], "invalid choice: 'draw'"),
        (["check", "--generated-most=1"], "0 <= fewest <= most"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


def test_tracks_are_drawn_where_they_are() -> None:
    video = np.full((3, 200, 220, 3), 90, np.uint8)
    tracks = np.array([[[50.5, 60.5]] * 3, [[150.5, 100.5]] * 3], np.float32)
    tracks[1, :, 1] += [0, 8, 100]  # a jump is no way that was gone
    visible = np.array([[True, True, False], [True] * 3])
    drawn = draw_tracks(video, tracks, visible, [1, 0])
    assert drawn.shape == video.shape
    changed = (drawn != 90).any(axis=-1)
    for t in range(3):
        ys, xs = np.nonzero(changed[t][:, :90])
        assert abs(ys.mean() - 50.5) < 1.5
        assert abs(xs.mean() - 60.5) < 1.5
    assert changed[0, 50, 60]
    assert changed[0, 51, 60]
    assert not changed[2, 51, 60]  # hidden: a ring
    assert changed[1, 50, 60 - 4]  # asked for here: a cross
    assert not changed[2, 150, 130:190].any()
    assert changed[1, 150, 102]  # its way
    assert draw_tracks(video[:, :20, :20], tracks, visible).shape == (3, 200, 200, 3)


def test_sheets_of_batches(tmp_path: Path) -> None:
    clip = moving_clip()
    batch = {
        "video": clip.video[None], "tracks_yx": clip.tracks_yx[None], "visible": clip.visible[None],
        "query_tyx": np.concatenate([np.zeros((5, 1)), clip.tracks_yx[:, 0]], axis=1, dtype=np.float32)[None],
        "valid": np.array([[True] * 4 + [False]]),
    }  # fmt: skip
    draw_sheet(batch, tmp_path / "a.png", columns=3)
    write_track_sheet(tmp_path / "b.png", [("x", clip.video, clip.tracks_yx, clip.visible)] * 2, columns=3)
    one, two = (np.asarray(Image.open(tmp_path / name)).shape for name in ("a.png", "b.png"))
    assert one[1] == two[1]
    assert two[0] > 1.8 * one[0]
    draw_sheet(batch | {"valid": np.zeros((1, 5), bool)}, tmp_path / "none.png")
