"""Tracks on disk: what was written comes back by frame and by track, in memory that does not grow."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from tasks.points import track_spool
from tasks.points.track_spool import HIDDEN, TRACK, UNKNOWN, VISIBLE, TrackSpool, track_rows, write_npz


def random_rows(rng: np.random.Generator, frames: int, tracks: int) -> np.ndarray:
    rows = np.zeros((frames, tracks), TRACK)
    rows["xy"], rows["certainty"] = rng.normal(size=(frames, tracks, 2)), rng.uniform(size=(frames, tracks))
    rows["state"] = rng.integers(HIDDEN, VISIBLE + 1, (frames, tracks))
    return rows


@pytest.mark.parametrize("block", [64, 1000, 1 << 24])
def test_arrays_by_track_are_the_rows_by_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(track_spool, "_BLOCK", block)
    rows = random_rows(np.random.default_rng(0), 13, 7)
    with TrackSpool(tmp_path, 7) as spool:
        for first, last in ((4, 7), (0, 4)):  # groups, one after the other
            for frame in range(13):
                spool.write(frame, rows[frame, first:last], first)
        assert spool.frames == 13
        for frame in (12, 0, 5):
            np.testing.assert_array_equal(spool.read(frame), rows[frame])
        write_npz(tmp_path / "tracks.npz", spool, {"fps": np.float64(25), "names": np.array(["a", "ö"])})
    with np.load(tmp_path / "tracks.npz", allow_pickle=False) as found:
        np.testing.assert_array_equal(found["tracks_xy"], np.swapaxes(rows["xy"], 0, 1))
        np.testing.assert_array_equal(found["certainty"], rows["certainty"].T)
        np.testing.assert_array_equal(found["visible"], (rows["state"] == VISIBLE).T)
        assert (float(found["fps"]), found["names"].tolist()) == (25.0, ["a", "ö"])
        assert found["tracks_xy"].flags.c_contiguous
    assert [path.name for path in tmp_path.iterdir()] == ["tracks.npz"]  # the spool is gone


def test_what_was_never_written_is_unknown(tmp_path: Path) -> None:
    rows = random_rows(np.random.default_rng(1), 4, 3)
    with TrackSpool(tmp_path, 3) as spool:
        spool.write(3, rows[3, :1])
        spool.write(1, rows[1, 1:2], 1)
        last = spool.read(3)
        np.testing.assert_array_equal(last[:1], rows[3, :1])
        for nothing in (last[1:], spool.read(0), spool.read(2), spool.read(1)[[0, 2]]):
            assert nothing.tobytes() == track_rows(len(nothing)).tobytes()
            assert np.isnan(nothing["xy"]).all()
            assert (nothing["state"] == UNKNOWN).all()
        write_npz(tmp_path / "tracks.npz", spool, {})
    with np.load(tmp_path / "tracks.npz") as found:
        np.testing.assert_array_equal(
            np.isfinite(found["certainty"]), [[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
        )


def test_there_may_be_no_frames(tmp_path: Path) -> None:
    with TrackSpool(tmp_path, 3) as spool:
        write_npz(tmp_path / "tracks.npz", spool, {})
    with np.load(tmp_path / "tracks.npz") as found:
        assert found["tracks_xy"].shape == (3, 0, 2)


def test_an_array_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tracks.npz").write_bytes(b"an earlier one")

    def full(self: zipfile.ZipFile, *args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with TrackSpool(tmp_path, 2) as spool:
        spool.write(0, track_rows(2))
        monkeypatch.setattr(zipfile.ZipFile, "open", full)
        with pytest.raises(OSError, match="No space left"):
            write_npz(tmp_path / "tracks.npz", spool, {})
    assert (tmp_path / "tracks.npz").read_bytes() == b"an earlier one"
    assert [path.name for path in tmp_path.iterdir()] == ["tracks.npz"]
