"""`tf.train.Example` messages without TensorFlow or protobuf: the named features, as NumPy arrays.

    Example  { Features features = 1; }         Features { map<string, Feature> feature = 1; }
    Feature  { oneof { BytesList = 1; FloatList = 2; Int64List = 3; } }      each { repeated value = 1; }

A small reader of protobuf's wire format that only knows these. What is not asked for is skipped unread.
"""

from collections.abc import Collection, Iterator

import numpy as np

Feature = list[bytes] | np.ndarray  # byte strings; float32; int64
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MOST_VALUES = 1 << 28


class ExampleError(ValueError):
    """Bytes that are not such a message."""


def parse_example(content: bytes, names: Collection[str]) -> dict[str, Feature]:
    """The features of the given names that are in a message.

    Raises:
        ExampleError: not a `tf.train.Example`.
    """
    found: dict[str, Feature] = {}
    view = memoryview(content)
    for number, wire, features in _fields(view):
        if (number, wire) != (1, _BYTES):
            continue
        for inner, inner_wire, entry in _fields(_bytes(features)):
            if (inner, inner_wire) == (1, _BYTES):
                name, value = _entry(_bytes(entry))
                if name in names:
                    found[name] = _feature(value)
    return found


def _entry(view: memoryview) -> tuple[str, memoryview]:
    """(key, value) of a map."""
    key, value = b"", memoryview(b"")
    for number, wire, content in _fields(view):
        if (number, wire) == (1, _BYTES):
            key = bytes(_bytes(content))
        elif (number, wire) == (2, _BYTES):
            value = _bytes(content)
    try:
        return key.decode(), value
    except UnicodeDecodeError as error:
        raise ExampleError(f"a feature's name is not UTF-8: {key[:40]!r}") from error


def _feature(view: memoryview) -> Feature:
    for number, wire, content in _fields(view):
        if wire == _BYTES and number in (1, 2, 3):
            return (_byte_list, _float_list, _int_list)[number - 1](_bytes(content))
    return np.zeros(0, np.float32)  # a feature without a value


def _byte_list(view: memoryview) -> list[bytes]:
    return [bytes(_bytes(v)) for number, wire, v in _fields(view) if (number, wire) == (1, _BYTES)]


def _float_list(view: memoryview) -> np.ndarray:
    parts = []
    for number, wire, content in _fields(view):
        if number != 1 or wire not in (_BYTES, _FIXED32):
            continue
        packed = _bytes(content)
        if len(packed) % 4:
            raise ExampleError(f"a list of floats of {len(packed)} bytes")
        parts.append(np.frombuffer(packed, "<f4"))
    return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)


def _int_list(view: memoryview) -> np.ndarray:
    values: list[int] = []
    for number, wire, content in _fields(view):
        if number != 1:
            continue
        if wire == _VARINT and isinstance(content, int):
            values.append(content)
        elif wire == _BYTES:
            packed, at = _bytes(content), 0
            while at < len(packed):
                value, at = _varint(packed, at)
                values.append(value)
        if len(values) > _MOST_VALUES:
            raise ExampleError(f"a list of more than {_MOST_VALUES} numbers")
    return np.array(values, np.uint64).astype(np.int64)


def _bytes(content: int | memoryview) -> memoryview:
    assert isinstance(content, memoryview)
    return content


def _fields(view: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """(field number, wire type, value) of a message; values other than varints as their bytes."""
    at = 0
    while at < len(view):
        tag, at = _varint(view, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(view, at)
            yield number, wire, value
            continue
        if wire == _BYTES:
            length, at = _varint(view, at)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise ExampleError(f"wire type {wire} at byte {at}")
        if length > len(view) - at:
            raise ExampleError(f"a field of {length} bytes at byte {at} of {len(view)}")
        yield number, wire, view[at : at + length]
        at += length


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """(value below 2^64, place after it)."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            raise ExampleError("cut off in a number")
        byte = view[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1), at
    raise ExampleError("a number of more than 10 bytes")
