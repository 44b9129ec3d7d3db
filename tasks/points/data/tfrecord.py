"""TFRecord files without TensorFlow: where the records are, and their content with its checksum compared.

A record is uint64 length, uint32 checksum of these 8 bytes, the content, uint32 checksum of that;
little-endian. The checksum is CRC-32C, rotated right by 15 bits, plus a constant.
"""

import struct
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt32

from tasks.common.video.errors import VideoError

MOST_BYTES = 2 << 30  # of a record
_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
_HEAD = struct.Struct("<QI")
_FOOT = struct.Struct("<I")
_LANES = 1 << 14  # parts of a long content whose checksums are computed side by side
_SHORT = 1 << 12  # bytes below which that is not worth it


@lru_cache(maxsize=1)
def _table() -> UInt32[np.ndarray, " 256"]:
    """The state after each byte, from a state of 0."""
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, (values >> 1) ^ np.uint32(_POLYNOMIAL), values >> 1)
    return values.astype(np.uint32)


@lru_cache(maxsize=64)
def _zeros(count: int) -> UInt32[np.ndarray, "4 256"]:
    """What `count` zero bytes after a state do to it, as four tables, one for each byte of the state."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    power = (bits >> 8) ^ _table()[bits & 255]  # where one zero byte takes each bit; the map is linear
    result = bits
    while count:
        if count & 1:
            result = _apply(power, result)
        power = _apply(power, power)
        count >>= 1
    values = np.arange(256, dtype=np.uint32)
    return np.stack([_apply(result, values << np.uint32(8 * byte)) for byte in range(4)])


def _apply(columns: np.ndarray, states: np.ndarray) -> UInt32[np.ndarray, " n"]:
    """A linear map, by where it takes each of the 32 bits, of states."""
    total = np.zeros_like(states)
    for bit in range(32):
        total ^= np.where((states >> np.uint32(bit)) & 1, columns[bit], np.uint32(0))
    return total


def _through(tables: np.ndarray, states: np.ndarray) -> np.ndarray:
    """States after the zero bytes that the tables are of."""
    return (
        tables[0][states & 255]
        ^ tables[1][(states >> 8) & 255]
        ^ tables[2][(states >> 16) & 255]
        ^ tables[3][states >> 24]
    )


def crc32c(content: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of bytes."""
    data = np.frombuffer(content, np.uint8)
    state = 0xFFFFFFFF
    if len(data) >= _SHORT:
        # A power of two of lanes side by side, joined in pairs: what comes before a lane goes through as many
        # zero bytes as the lane has.
        count = min(_LANES, 1 << ((len(data) // 64).bit_length() - 1))
        span = len(data) // count
        states, table = np.zeros(count, np.uint32), _table()
        states[0] = state
        for row in np.ascontiguousarray(data[: count * span].reshape(count, span).T):
            states = (states >> 8) ^ table[(states & 255) ^ row]
        data = data[count * span :]
        while len(states) > 1:
            states = _through(_zeros(span), states[0::2]) ^ states[1::2]
            span *= 2
        state = int(states[0])
    values = _table().tolist()
    for byte in data.tolist():
        state = (state >> 8) ^ values[(state ^ byte) & 255]
    return state ^ 0xFFFFFFFF


def masked_crc32c(content: bytes | memoryview) -> int:
    """The checksum as TFRecord files have it."""
    value = crc32c(content)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def find_records(path: Path) -> list[tuple[int, int]]:
    """(offset of the content, its length) of every record of a file, by the lengths, whose checksums are
    compared.

    Raises:
        VideoError: not a TFRecord file, damaged, cut off, or with a record that is too long.
    """
    found: list[tuple[int, int]] = []
    size = path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while at < size:
            length = _read_length(file, at, str(path))
            end = at + _HEAD.size + length + _FOOT.size
            if end > size:
                raise VideoError(str(path), f"cut off in record {len(found)}")
            found.append((at + _HEAD.size, length))
            at = end
            file.seek(at)
    return found


def _read_length(file: BinaryIO, at: int, name: str) -> int:
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise VideoError(name, f"cut off at byte {at}")
    length, checksum = _HEAD.unpack(head)
    if masked_crc32c(head[:8]) != checksum:
        raise VideoError(name, f"not a TFRecord file, or damaged at byte {at} (checksum of a length differs)")
    if length > MOST_BYTES:
        raise VideoError(name, f"a record of {length} bytes at byte {at}; the limit is {MOST_BYTES}")
    return int(length)


def read_record(path: Path, offset: int, length: int) -> bytes:
    """The content of a record that `find_records` found.

    Raises:
        VideoError: cut off, or its checksum differs.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content, foot = file.read(length), file.read(_FOOT.size)
    except OSError as error:
        raise VideoError(str(path), error.strerror or str(error)) from error
    if len(content) != length or len(foot) != _FOOT.size:
        raise VideoError(str(path), f"cut off in the record at byte {offset}")
    if masked_crc32c(content) != _FOOT.unpack(foot)[0]:
        raise VideoError(str(path), f"damaged record at byte {offset} (checksum differs)")
    return content
