"""Writes PyTorch's zip format (data.pkl, data/N, version, byteorder) without PyTorch: for its reader's tests.

The pickle is emitted opcode by opcode, as `torch.save` emits it (protocol 2):
`torch._utils._rebuild_tensor_v2` called on a persistent reference ("storage", torch.XStorage, key, "cpu",
numel), offset, size, stride, False, OrderedDict().
"""

import dataclasses
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor as a view of a shared storage; offset and strides in elements."""

    storage: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def op_int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def op_text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def op_global(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def op_tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def op_call(function: bytes, *args: bytes) -> bytes:
    return function + op_tuple(*args) + b"R"


EMPTY_ORDERED_DICT = op_call(op_global("collections", "OrderedDict"))


def op_tensor(view: View, storage: np.ndarray, numel: int | None = None) -> bytes:
    size = storage.size if numel is None else numel
    kind = op_global("torch", STORAGES[storage.dtype.name])
    reference = op_tuple(op_text("storage"), kind, op_text(view.storage), op_text("cpu"), op_int(size)) + b"Q"
    return op_call(
        op_global("torch._utils", "_rebuild_tensor_v2"),
        reference,
        op_int(view.offset),
        op_tuple(*map(op_int, view.shape)),
        op_tuple(*map(op_int, view.strides)),
        b"\x89",
        EMPTY_ORDERED_DICT,
    )


def op_state_dict(entries: dict[str, bytes]) -> bytes:
    """An OrderedDict with PyTorch's `_metadata` attribute set on it."""
    items = b"".join(op_text(name) + value for name, value in entries.items())
    metadata = b"}" + op_text("_metadata") + EMPTY_ORDERED_DICT + b"s"
    return EMPTY_ORDERED_DICT + b"(" + items + b"u" + metadata + b"b"


def write_archive(
    path: Path, program: bytes, storages: dict[str, np.ndarray], compression: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle.PROTO + b"\x02" + program + pickle.STOP)
        archive.writestr("archive/byteorder", "little")
        for key, storage in storages.items():
            archive.writestr(f"archive/data/{key}", storage.tobytes())
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/.data/serialization_id", "0")
    return path


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """What `torch.save(state_dict, path)` writes: one storage per tensor, contiguous."""
    storages = {str(i): np.array(array, order="C") for i, array in enumerate(tensors.values())}
    entries = {}
    for (key, storage), (name, array) in zip(storages.items(), tensors.items(), strict=True):
        strides = tuple(stride // storage.itemsize for stride in storage.strides)
        entries[name] = op_tensor(View(key, 0, array.shape, strides), storage)
    return write_archive(path, op_state_dict(entries), storages)
