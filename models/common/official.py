"""Official checkpoints: arrays by official names to and from a table of parameters, and .npz files.

The names come from the parameter table (`ParamSpec.official`); every array is a reshape of ours, or its
transpose.
"""

import contextlib
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from models.common.params import ParamSpec, flatten_names, list_differences, unflatten_names
from models.common.shapes import Params
from models.common.vit import Grid

Arrays = Mapping[str, np.ndarray]


def read_exactly(specs: Mapping[str, ParamSpec], flat: Arrays, refusal: str) -> Params:
    """The parameters of a table out of official arrays, float32 (exact for 16 bits).

    Args:
      flat: official name -> array of any floating dtype.
      refusal: starts the message about wrong arrays.

    Raises:
      ValueError: names or shapes that are not the table's, all differences listed; an array of integers.
    """
    expected = {spec.official: spec.stored_shape for spec in specs.values()}
    if difference := list_differences(expected, {name: array.shape for name, array in flat.items()}):
        raise ValueError(f"{refusal}:\n{difference}")
    return read_leaves(specs, flat)


def read_leaves(specs: Mapping[str, ParamSpec], flat: Arrays) -> Params:
    """`read_exactly` of arrays whose names and shapes are known to be right; further arrays are left out."""
    params = {}
    for name, spec in specs.items():
        array = np.asarray(flat[spec.official])
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{spec.official} has dtype {array.dtype}; floating point was expected")
        ours = array.T if spec.transposed else array.reshape(spec.shape)
        params[name] = jnp.asarray(ours.astype(np.float32))
    return unflatten_names(params)


def write_leaves(
    specs: Mapping[str, ParamSpec], params: Params, dtype: DTypeLike = jnp.float32
) -> dict[str, np.ndarray]:
    """Inverse of `read_leaves`."""
    flat, arrays = flatten_names(params), {}
    for name, spec in specs.items():
        array = np.asarray(jax.device_get(flat[name])).astype(dtype)
        stored = array.T if spec.transposed else array.reshape(spec.stored_shape)
        arrays[spec.official] = np.ascontiguousarray(stored)
    return arrays


@contextlib.contextmanager
def naming_file(path: str | Path) -> Iterator[None]:
    """A ValueError about what is in a file names it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def shape_of(flat: Arrays, name: str, ndim: int, model: str) -> tuple[int, ...]:
    """Shape of an array that every checkpoint of `model` has.

    Raises:
      ValueError: it is missing, or has another number of axes.
    """
    if name not in flat:
        found = ", ".join(sorted(flat)[:4]) + (f" and {len(flat) - 4} more" if len(flat) > 4 else "")
        raise ValueError(f"no array {name!r}: not a {model} checkpoint (found {found})")
    if flat[name].ndim != ndim:
        raise ValueError(f"{name} has shape {flat[name].shape}; {ndim} axes were expected")
    return flat[name].shape


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
