"""Reading and writing .npz checkpoints: exact values, damaged and hostile files."""

import ml_dtypes
import numpy as np
import pytest

from models.common.official import read_npz, save_npz, square_grid


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "model.npz"
    with pytest.raises(FileNotFoundError, match=r"model\.npz: no such file"):
        read_npz(path)
    save_npz(path, {"a": np.arange(1000.0), "b/c": np.ones((3, 4), np.float32)})
    np.testing.assert_array_equal(read_npz(path)["b/c"], np.ones((3, 4)))
    whole = path.read_bytes()
    for content in (b"", b"not a zip", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.npz: not a readable \.npz file"):
            read_npz(path)
    np.savez(path, a=np.array([{"code": "object"}], dtype=object))
    with pytest.raises(ValueError, match=r"model\.npz: not a readable .* allow_pickle=False"):
        read_npz(path)
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(ValueError, match=r"a single array, not an \.npz archive"):
        read_npz(path)


def test_files_keep_their_name_and_bfloat16(tmp_path):
    values = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16)
    save_npz(tmp_path / "half.checkpoint", {"a": values})
    found = read_npz(tmp_path / "half.checkpoint")["a"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, values)


def test_square_grids():
    assert square_grid(1024, "table") == (32, 32)
    with pytest.raises(ValueError, match=r"table: 6 patches are no square; say which grid they are"):
        square_grid(6, "table")
