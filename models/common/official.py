"""Official checkpoints: arrays by official names to and from a table of parameters, and .npz files.

The names come from the parameter table (`ParamSpec.official`); every array is a reshape of ours.
"""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from models.common.params import flatten_names, unflatten_names
from models.common.shapes import Params
from models.common.vit import Grid, ParamSpec

Arrays = Mapping[str, np.ndarray]


def read_leaves(specs: Mapping[str, ParamSpec], flat: Arrays) -> Params:
    """The parameters of a table out of official arrays (whose names and shapes were checked), float32.

    Raises:
      ValueError: an array that is not of floating point.
    """
    params = {}
    for name, spec in specs.items():
        array = np.asarray(flat[spec.official])
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{spec.official} has dtype {array.dtype}; floating point was expected")
        params[name] = jnp.asarray(array.astype(np.float32).reshape(spec.shape))
    return unflatten_names(params)


def write_leaves(
    specs: Mapping[str, ParamSpec], params: Params, dtype: DTypeLike = jnp.float32
) -> dict[str, np.ndarray]:
    """Inverse of `read_leaves`."""
    flat = flatten_names(params)
    arrays = {
        spec.official: np.asarray(jax.device_get(flat[name])).astype(dtype).reshape(spec.stored_shape)
        for name, spec in specs.items()
    }
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def square_grid(patches: int, name: str) -> Grid:
    """The square grid of this many patches.

    Raises:
      ValueError: there is none; `name` says whose.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{name}: {patches} patches are no square; say which grid they are (height, width)")
    return side, side


def save_npz(path: str | Path, arrays: Arrays) -> None:
    """Writes an .npz file under exactly this name."""
    with Path(path).open("wb") as file:  # numpy would append .npz to another name
        np.savez(file, allow_pickle=False, **arrays)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Name -> array of an .npz file. Nothing in it is executed: pickled objects are refused.

    bfloat16 arrays, which NumPy stores as raw 2-byte records, come back as bfloat16.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not an .npz file, cut short, damaged, or with objects in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array, not an .npz archive")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable .npz file of arrays: {error}") from error
    return {
        name: array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
        for name, array in arrays.items()
    }
