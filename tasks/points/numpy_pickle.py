"""What the names that numpy writes into pickles mean to the restricted reader: arrays, dtypes, scalars.

Nothing here is numpy's own unpickling code. Sizes are checked against the bytes that are there before an
array is made, and only booleans, numbers, and bytes or text of fixed length are admitted, never objects.
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np

_DTYPE = re.compile(r"b1|[iu][1248]|f[248]|[SU][1-9]\d{0,9}")
_MOST_AXES = 8

Buffer = bytes | memoryview


class PickleError(ValueError):
    """The file is no pickle, is damaged, or asks for something that the restricted reader refuses."""


@dataclasses.dataclass(frozen=True)
class LongText:
    """Text as it stands in the file: in old pickles the bytes of an array, which nobody reads as text."""

    raw: memoryview
    encoding: str = "utf-8"

    def decode(self) -> str:
        return str(self.raw, self.encoding)


class Unfinished:
    """An object that an instruction made and a later one (BUILD) completes.

    Attributes:
      memo_keys: under which the machine remembers it.
    """

    def __init__(self) -> None:
        self.memo_keys: list[int] = []

    def finish(self, state: Any) -> Any:
        """The object. Raises PickleError for a state it cannot have."""
        raise NotImplementedError


class _NdarrayClass:
    """Stands for the class numpy.ndarray, which `_reconstruct` is told to make."""


NDARRAY = _NdarrayClass()


class _Array(Unfinished):
    def finish(self, state: Any) -> np.ndarray:
        """`state`: version, shape, dtype, whether in Fortran's order, content."""
        if type(state) is not tuple or len(state) != 5:
            raise PickleError("damaged: the state of an array has not 5 parts")
        _, shape, dtype, fortran, content = state
        return _array(content, dtype, shape, "F" if fortran is True else "C")


class _Dtype(Unfinished):
    def __init__(self, code: str):
        super().__init__()
        self._code = code

    def finish(self, state: Any) -> np.dtype[Any]:
        """`state`: version, byte order, three parts of structured dtypes, three numbers the code tells."""
        simple = type(state) is tuple and len(state) == 8 and state[2:5] == (None, None, None)
        if not simple or state[1] not in ("<", ">", "|", "="):
            raise PickleError(
                f"a dtype {self._code!r} with parts: only plain numbers, bytes and text are admitted"
            )
        return np.dtype(self._code).newbyteorder(state[1])


def empty_array(kind: Any = None, shape: Any = None, code: Any = None) -> _Array:
    """Meaning of numpy's `_reconstruct`: an array that its state is still to be given."""
    if kind is not NDARRAY:
        raise PickleError("an array of a class of its own: only numpy.ndarray is admitted")
    return _Array()


def make_dtype(code: Any = None, *_flags: Any) -> _Dtype:
    """Meaning of `numpy.dtype`."""
    if type(code) is not str or not _DTYPE.fullmatch(code):
        objects = " (Python objects; save frames as a list of bytes)" if code in ("O", "O8") else ""
        raise PickleError(
            f"an array of dtype {code!r}{objects}: only booleans, numbers, and bytes or "
            "text of fixed length are admitted"
        )
    return _Dtype(code)


def array_from_buffer(
    content: Any = None, dtype: Any = None, shape: Any = None, order: Any = None
) -> np.ndarray:
    """Meaning of numpy's `_frombuffer` (protocol 5)."""
    if order not in ("C", "F"):
        raise PickleError(f"damaged: an array in order {order!r}")
    return _array(content, dtype, shape, order)


def make_scalar(dtype: Any = None, content: Any = None) -> Any:
    """Meaning of numpy's `scalar`."""
    return _array(content, dtype, (), "C")[()]


def encode(text: Any = None, encoding: Any = None) -> bytes:
    """Meaning of `_codecs.encode`, by which protocols 0 to 2 spell bytes: Latin-1 only."""
    if encoding != "latin1" or not isinstance(text, str | LongText):
        raise PickleError(f"damaged: bytes spelt as {type(text).__name__} in encoding {encoding!r}")
    return (text.decode() if isinstance(text, LongText) else text).encode("latin1")


def empty_bytes() -> bytes:
    """Meaning of `bytes`, by which protocols 0 to 2 spell b""."""
    return b""


def _array(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, np.dtype) or not isinstance(content, bytes | memoryview):
        raise PickleError(f"damaged: an array of dtype {dtype!r} from {type(content).__name__}")
    whole = type(shape) is tuple and all(type(size) is int and size >= 0 for size in shape)
    if not whole or len(shape) > _MOST_AXES:
        raise PickleError(f"damaged: an array of shape {shape!r}")
    needed = math.prod(shape) * dtype.itemsize
    if needed != len(content):
        raise PickleError(
            f"an array of shape {shape} and {dtype} needs {needed} bytes; the file has {len(content)}"
        )
    if not needed:
        return np.zeros(shape, dtype)
    return np.frombuffer(content, dtype).reshape(shape, order=order)
