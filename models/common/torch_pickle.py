"""Reads tensors from PyTorch `.bin`/`.pt` files without PyTorch, and without running anything in them.

Such a file is a zip archive: NAME/data.pkl holds a pickle of the dict, NAME/data/0, /1, ... the raw storages.
A pickle may call any function it names; this reader knows only the handful of names that a dict of tensors
needs (`_ALLOWED`) and gives them meanings of its own, so nothing of PyTorch or of the file is ever executed.
"""

import collections
import dataclasses
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

_STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class TorchFileError(ValueError):
    """The file is not a PyTorch archive of tensors, is damaged, or asks for something this reader refuses."""


class _Inert:
    """Base of all stand-ins: a pickle may set attributes on any object it holds; not on these."""

    def __setstate__(self, state: object) -> None:
        raise TorchFileError("the pickle tries to change an object of this reader; refused")


@dataclasses.dataclass(frozen=True)
class _Function(_Inert):
    """Stands for what the pickle may call; it gets this wrapper, never the function itself."""

    meaning: Callable[..., Any]

    def __call__(self, *args: object) -> Any:
        return self.meaning(*args)


@dataclasses.dataclass(frozen=True)
class _StorageType(_Inert):
    """Stands for a class such as torch.FloatStorage."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Tensor(_Inert):
    """A view of a storage: what the pickle says, checked and read only after unpickling."""

    key: str
    dtype: np.dtype[Any]
    numel: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Storage(_Inert):
    key: str
    dtype: np.dtype[Any]
    numel: int


class _StateDict(collections.OrderedDict[Any, Any]):
    """OrderedDict that ignores attributes a pickle sets on it (PyTorch keeps `_metadata` there)."""

    def __setstate__(self, state: object) -> None:
        """Module versions and the like: of no use here."""


def _rebuild_tensor(
    storage: object, offset: object, shape: object, strides: object, *_unused: object
) -> _Tensor:
    """Meaning of torch._utils._rebuild_tensor_v2 (the rest is requires_grad, hooks, metadata)."""
    if not isinstance(storage, _Storage):
        raise TorchFileError(f"a tensor is built from {type(storage).__name__}, not from a storage")
    return _Tensor(
        storage.key,
        storage.dtype,
        storage.numel,
        _checked_int(offset, "tensor offset"),
        _checked_ints(shape, "tensor shape"),
        _checked_ints(strides, "tensor strides"),
    )


def _rebuild_parameter(data: object, *_unused: object) -> object:
    """Meaning of torch._utils._rebuild_parameter: the tensor itself."""
    return data


_ALLOWED: dict[tuple[str, str], _Function | _StorageType] = {
    ("collections", "OrderedDict"): _Function(lambda: _StateDict()),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    **{("torch", name): _StorageType(name) for name in _STORAGE_DTYPES},
}


def _checked_int(value: object, what: str) -> int:
    if type(value) is not int or value < 0:
        raise TorchFileError(f"{what} is {value!r}; a non-negative integer was expected")
    return value


def _checked_ints(values: object, what: str) -> tuple[int, ...]:
    if not isinstance(values, tuple):
        raise TorchFileError(f"{what} is {values!r}; a tuple was expected")
    return tuple(_checked_int(value, what) for value in values)


class _TensorUnpickler(pickle.Unpickler):
    """Unpickler that resolves the names of `_ALLOWED` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global; called for every global, reduce and extension opcode."""
        if (module, name) not in _ALLOWED:
            raise TorchFileError(
                f"the pickle asks for {module}.{name}, which a file of tensors does not need;"
                " refused, nothing was run"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: object) -> _Storage:
        """A reference to a storage: ("storage", type, key, location, number of elements)."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise TorchFileError(f"unknown reference {pid!r} in the pickle; only storages are supported")
        _, kind, key, _, numel = pid
        if not isinstance(kind, _StorageType) or not isinstance(key, str):
            raise TorchFileError(f"unknown kind of storage {kind!r} in the pickle")
        return _Storage(key, _STORAGE_DTYPES[kind.name], _checked_int(numel, "storage size"))


def read_tensors(path: str | Path, inside: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Name -> array for every tensor of a state dict saved by `torch.save`.

    Args:
      path: file in PyTorch's zip format (the default since PyTorch 1.6).
      inside: of a file that holds a dict under one of these keys, the first of them that is there is read,
        and nothing else (a trainer's checkpoint: moments of the optimiser, steps, options are skipped).

    Returns:
      Arrays of the stored dtypes (bfloat16 through ml_dtypes), contiguous, each with memory of its own.

    Raises:
      FileNotFoundError: no such file.
      TorchFileError: (a ValueError) not that format, truncated or damaged, not a flat dict of tensors, or a
        pickle that names anything but tensors, storages and OrderedDict. Nothing named in the file is
        executed.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read_archive(file, inside)
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from error


def _read_archive(file: BinaryIO, inside: Sequence[str]) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(file):
        raise TorchFileError(
            "not a PyTorch zip archive, or cut short (files of PyTorch before 1.6 must be saved again, or"
            " converted to safetensors)"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            root = _archive_root(archive)
            _check_byte_order(archive, root)
            tree = _unpickle(_record(archive, f"{root}data.pkl"))
            if isinstance(tree, dict):
                groups = [tree[key] for key in inside if isinstance(tree.get(key), dict)]
                tree = groups[0] if groups else tree
            return _read_all(archive, root, _state_dict(tree))
    except TorchFileError:
        raise
    except Exception as error:  # zipfile raises half a dozen kinds on damaged input
        raise TorchFileError(f"damaged archive: {type(error).__name__}: {error}") from error


def _read_all(archive: zipfile.ZipFile, root: str, tensors: dict[str, _Tensor]) -> dict[str, np.ndarray]:
    """Storage by storage, so that no more than one is in memory beside the result."""
    sharing: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        sharing.setdefault(tensor.key, []).append(name)
    arrays: dict[str, np.ndarray] = {}
    for names in sharing.values():
        storage = _storage(archive, root, tensors[names[0]])
        arrays |= {name: _view(name, tensors[name], storage) for name in names}
    return {name: arrays[name] for name in tensors}


def _archive_root(archive: zipfile.ZipFile) -> str:
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise TorchFileError(f"expected one data.pkl in the archive, found {len(roots)}")
    return roots[0]


def _record(archive: zipfile.ZipFile, name: str) -> bytes:
    """One member, its checksum verified. PyTorch never compresses; a compressed one could be a bomb."""
    try:
        info = archive.getinfo(name)
    except KeyError as error:
        raise TorchFileError(f"the archive has no member {name}") from error
    if info.compress_type != zipfile.ZIP_STORED:
        raise TorchFileError(f"member {name} is compressed, which PyTorch never does; refused")
    return archive.read(info)


def _check_byte_order(archive: zipfile.ZipFile, root: str) -> None:
    name = f"{root}byteorder"
    if name in archive.namelist() and _record(archive, name).strip() != b"little":
        raise TorchFileError("the file was written on a big-endian machine, which is not supported")


def _unpickle(data: bytes) -> object:
    try:
        return _TensorUnpickler(io.BytesIO(data)).load()
    except TorchFileError:
        raise
    except Exception as error:  # whatever a damaged or hostile pickle does to the stand-ins
        raise TorchFileError(f"damaged pickle: {type(error).__name__}: {error}") from error


def _state_dict(tree: object) -> dict[str, _Tensor]:
    if not isinstance(tree, dict):
        raise TorchFileError(f"holds {type(tree).__name__}, not a state dict")
    for name, value in tree.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise TorchFileError(
                f"entry {name!r} is {type(value).__name__}, not a tensor; save the model's state_dict() alone"
            )
    return dict(tree)


def _storage(archive: zipfile.ZipFile, root: str, tensor: _Tensor) -> np.ndarray:
    data = _record(archive, f"{root}data/{tensor.key}")
    expected = tensor.numel * tensor.dtype.itemsize
    if len(data) != expected:
        raise TorchFileError(f"storage {tensor.key} has {len(data)} bytes, {expected} were expected")
    return np.frombuffer(data, tensor.dtype)


def _view(name: str, tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    """The tensor's elements out of its storage, copied; strides are in elements and may overlap."""
    if len(tensor.shape) != len(tensor.strides):
        raise TorchFileError(f"tensor {name!r} has shape {tensor.shape} but strides {tensor.strides}")
    if storage.dtype != tensor.dtype:
        raise TorchFileError(
            f"tensor {name!r} reads its storage as {tensor.dtype}, others as {storage.dtype}"
        )
    if math.prod(tensor.shape) == 0:
        return np.zeros(tensor.shape, tensor.dtype)
    last = tensor.offset + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    # More elements than the storage holds (an expanded view) is a way to fill memory from a tiny file.
    if last >= storage.size or math.prod(tensor.shape) > storage.size:
        raise TorchFileError(
            f"tensor {name!r} (shape {tensor.shape}, strides {tensor.strides}, offset {tensor.offset}) needs"
            f" more than its storage of {storage.size} elements"
        )
    itemsize = tensor.dtype.itemsize
    view = np.lib.stride_tricks.as_strided(
        storage[tensor.offset :],
        shape=tensor.shape,
        strides=tuple(stride * itemsize for stride in tensor.strides),
        writeable=False,
    )
    return np.array(view, order="C")
