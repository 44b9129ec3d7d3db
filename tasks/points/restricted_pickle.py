"""Reads pickles of numpy arrays and plain containers, without `pickle`, and without running anything.

A pickle is a program for a small stack machine; Python's own `pickle` runs what it says, be it `os.system`.
This machine knows only instructions that build numbers, texts, bytes, lists, tuples and dicts, and it never
imports what a pickle names: the few names that numpy writes (`_MEANINGS`) are given meanings of our own.
Anything else is refused, by name.

The file is mapped, not read. Arrays of protocol 3 and above are read-only views into it: a set of many
gigabytes opens at once, and only the pages of the video at hand are in memory. In older protocols bytes are
spelt as text and have to be decoded; how much, is limited by the size of the file.
"""

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.points import numpy_pickle
from tasks.points.numpy_pickle import LongText, PickleError, Unfinished

# A set of a thousand videos of JPEG frames takes one million; each makes one small object.
MOST_INSTRUCTIONS = 10_000_000
_LONGEST_NAME = 1 << 12  # characters of a line that is not text
_LONGEST_INT = 64  # bytes
_LONG_TEXT = 1 << 16  # bytes from which on text is not decoded at once

_MEANINGS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): numpy_pickle.NDARRAY,
    ("numpy", "dtype"): numpy_pickle.make_dtype,
    ("_codecs", "encode"): numpy_pickle.encode,
    ("__builtin__", "bytes"): numpy_pickle.empty_bytes,
    **{
        (f"numpy.{core}.{module}", name): meaning
        for core in ("core", "_core")  # numpy 1, numpy 2
        for module, name, meaning in (
            ("multiarray", "_reconstruct", numpy_pickle.empty_array),
            ("multiarray", "scalar", numpy_pickle.make_scalar),
            ("numeric", "_frombuffer", numpy_pickle.array_from_buffer),
        )
    },
}
_CALLABLE = tuple(value for value in _MEANINGS.values() if callable(value))

# Instructions that such data do not need, and what they would do.
_REFUSED: dict[int, str] = {
    **dict.fromkeys(b"io\x81\x92", "it makes objects of classes"),
    **dict.fromkeys(b"PQ", "it refers to objects outside of the file"),
    **dict.fromkeys(b"\x82\x83\x84", "it uses registered extensions"),
    **dict.fromkeys(b"\x97\x98", "it refers to buffers outside of the file"),
    **dict.fromkeys(b"\x8f\x90\x91", "it holds a set"),
    **dict.fromkeys(b"STU", "it was written by Python 2; write it anew with Python 3"),
}


def read_pickle(path: str | Path) -> Any:
    """What a pickle holds, if that is numpy arrays and scalars in lists, tuples and dicts.

    Args:
      path: pickle of any protocol, written by Python 3 with numpy 1 or 2.

    Returns:
      dict, list, tuple, str, int, float, bool, None, and numpy arrays and scalars (of booleans, numbers, or
      bytes and text of fixed length). Arrays are read-only. Bytes come as `bytes` or as a `memoryview` of the
      mapped file, which stays open as long as one of these or an array lives.

    Raises:
      FileNotFoundError: no such file.
      PickleError: (a ValueError) names the file and what it asks for that such data do not need, or where it
        is damaged. Nothing of it was run.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise PickleError("empty file")
            return _Machine(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).run()
    except PickleError as error:
        raise PickleError(f"{path}: {error}") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError, struct.error) as error:
        # Whatever a damaged or hostile file does to the machine.
        raise PickleError(f"{path}: damaged, or not a pickle ({type(error).__name__}: {error})") from error


class _Mark:
    """What MARK puts on the stack."""


_MARK = _Mark()


class _Machine:
    """Runs one pickle, the content of a mapped file."""

    def __init__(self, content: mmap.mmap):
        self._map, self._bytes, self._at = content, memoryview(content), 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._decoded = 0  # bytes copied out of text so far

    def run(self) -> Any:
        """The object on top of the stack at the end."""
        for _ in range(MOST_INSTRUCTIONS):
            where = self._at
            code = self.take(1)[0]
            if code == ord("."):
                return self.pop(1)[0]
            if code in _REFUSED:
                raise PickleError(f"instruction {bytes([code])!r} at byte {where}: {_REFUSED[code]}; refused")
            if code not in _INSTRUCTIONS:
                raise PickleError(f"damaged, or not a pickle: {bytes([code])!r} at byte {where}")
            _INSTRUCTIONS[code](self)
        raise PickleError(f"more than {MOST_INSTRUCTIONS} instructions; refused")

    def take(self, count: int) -> memoryview:
        """The next bytes of the file."""
        left = len(self._bytes) - self._at
        if not 0 <= count <= left:
            raise PickleError(f"truncated: {count} bytes are announced at byte {self._at}, {left} are left")
        self._at += count
        return self._bytes[self._at - count : self._at]

    def number(self, form: str) -> Any:
        """The next number, in a format of `struct`."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self, most: int = _LONGEST_NAME) -> memoryview:
        """The rest of the line."""
        stop = min(self._at + most, len(self._bytes))
        end = self._map.find(b"\n", self._at, stop)
        if end < 0:
            raise PickleError(f"damaged: a line without an end at byte {self._at}")
        start, self._at = self._at, end + 1
        return self._bytes[start:end]

    def word(self) -> str:
        """The rest of the line, ASCII."""
        return str(self.line(), "ascii")

    def text_line(self) -> memoryview:
        """The rest of the line, of any length."""
        return self.line(len(self._bytes))

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self, count: int) -> list[Any]:
        """The topmost objects, complete ones only."""
        if count > len(self._stack):
            raise PickleError("damaged: too few objects on the stack")
        start = len(self._stack) - count
        items = self._stack[start:]
        del self._stack[start:]
        for item in items:
            if item is _MARK or isinstance(item, Unfinished):
                raise PickleError("damaged: an object is used before it is complete")
        return items

    def pop_to_mark(self) -> list[Any]:
        """All above the last mark, which is taken off, too."""
        for count, item in enumerate(reversed(self._stack)):
            if item is _MARK:
                items = self.pop(count)
                del self._stack[-1]
                return items
        raise PickleError("damaged: no mark on the stack")

    def remember(self, key: int) -> None:
        """PUT: the topmost object stays at hand under a number."""
        value = self._stack[-1]
        if isinstance(value, Unfinished):
            value.memo_keys.append(key)
        self._memo[key] = value

    def memoize(self) -> None:
        self.remember(len(self._memo))

    def recall(self, key: int) -> None:
        self.push(self._memo[key])

    def extend(self, items: list[Any]) -> None:
        """Adds to the list on top."""
        target = self._stack[-1]
        if type(target) is not list:
            raise PickleError(f"damaged: items are added to {type(target).__name__}, not to a list")
        target.extend(items)

    def update(self, items: list[Any]) -> None:
        """Adds keys and values to the dict on top."""
        target = self._stack[-1]
        if type(target) is not dict:
            raise PickleError(f"damaged: keys are set in {type(target).__name__}, not in a dict")
        target.update(_pairs(items))

    def name(self, module: Any, name: Any) -> None:
        """GLOBAL: the meaning of a name. Nothing is imported."""
        if type(module) is not str or type(name) is not str or (module, name) not in _MEANINGS:
            raise PickleError(
                f"asks for {module}.{name}, which numpy arrays in plain containers do not need; refused, "
                "nothing was run"
            )
        self.push(_MEANINGS[module, name])

    def reduce(self) -> None:
        """REDUCE: a call, of one of the meanings only."""
        function, args = self.pop(2)
        if not any(function is known for known in _CALLABLE) or type(args) is not tuple:
            raise PickleError(f"calls {type(function).__name__}; refused")
        result = function(*args)
        if isinstance(result, bytes):
            self._decoded += len(result)
            if self._decoded > len(self._bytes):
                raise PickleError("its texts decode to more bytes than the file has; refused")
        self.push(result)

    def build(self) -> None:
        """BUILD: completes the object on top."""
        (state,) = self.pop(1)
        target = self._stack[-1]
        if not isinstance(target, Unfinished):
            raise PickleError(f"sets the state of {type(target).__name__}; refused")
        finished = target.finish(state)
        self._stack[-1] = finished
        for key in target.memo_keys:
            self._memo[key] = finished


def _pairs(items: list[Any]) -> dict[Any, Any]:
    keys, values = items[::2], items[1::2]
    for key in keys:
        if type(key) not in (str, int):
            raise PickleError(f"a key of a dict is {type(key).__name__}; text or whole numbers were expected")
    return dict(zip(keys, values, strict=True))


def _text(raw: memoryview, encoding: str = "utf-8") -> str | LongText:
    return LongText(raw, encoding) if len(raw) > _LONG_TEXT else str(raw, encoding)


def _integer(word: str) -> int | bool:
    return {"00": False, "01": True}[word] if word in ("00", "01") else int(word)


def _long(machine: _Machine, size: int) -> int:
    if not 0 <= size <= _LONGEST_INT:
        raise PickleError(f"a whole number of {size} bytes; refused")
    return int.from_bytes(machine.take(size), "little", signed=True)


def _two_words(machine: _Machine) -> None:
    module = machine.word()
    machine.name(module, machine.word())


_Instruction = Callable[[_Machine], Any]

# By their codes, which the standard library's pickletools documents.
_INSTRUCTIONS: dict[int, _Instruction] = {
    code[0]: instruction
    for code, instruction in {
        b"\x80": lambda m: m.take(1),  # PROTO: the codes below are those of all protocols
        b"\x95": lambda m: m.take(8),  # FRAME: how much to read at once
        b"(": lambda m: m.push(_MARK),
        b"0": lambda m: m.pop(1),
        b"1": lambda m: m.pop_to_mark(),
        b"N": lambda m: m.push(None),
        b"\x88": lambda m: m.push(True),
        b"\x89": lambda m: m.push(False),
        b"I": lambda m: m.push(_integer(m.word())),
        b"J": lambda m: m.push(m.number("<i")),
        b"K": lambda m: m.push(m.number("<B")),
        b"M": lambda m: m.push(m.number("<H")),
        b"L": lambda m: m.push(int(m.word().removesuffix("L"))),
        b"\x8a": lambda m: m.push(_long(m, m.number("<B"))),
        b"\x8b": lambda m: m.push(_long(m, m.number("<i"))),
        b"F": lambda m: m.push(float(m.word())),
        b"G": lambda m: m.push(m.number(">d")),
        b"V": lambda m: m.push(_text(m.text_line(), "raw-unicode-escape")),
        b"X": lambda m: m.push(_text(m.take(m.number("<I")))),
        b"\x8c": lambda m: m.push(_text(m.take(m.number("<B")))),
        b"\x8d": lambda m: m.push(_text(m.take(m.number("<Q")))),
        b"B": lambda m: m.push(m.take(m.number("<I"))),
        b"C": lambda m: m.push(m.take(m.number("<B"))),
        b"\x8e": lambda m: m.push(m.take(m.number("<Q"))),
        b"\x96": lambda m: m.push(m.take(m.number("<Q"))),
        b"]": lambda m: m.push([]),
        b"l": lambda m: m.push(m.pop_to_mark()),
        b"a": lambda m: m.extend(m.pop(1)),
        b"e": lambda m: m.extend(m.pop_to_mark()),
        b")": lambda m: m.push(()),
        b"t": lambda m: m.push(tuple(m.pop_to_mark())),
        b"\x85": lambda m: m.push(tuple(m.pop(1))),
        b"\x86": lambda m: m.push(tuple(m.pop(2))),
        b"\x87": lambda m: m.push(tuple(m.pop(3))),
        b"}": lambda m: m.push({}),
        b"d": lambda m: m.push(_pairs(m.pop_to_mark())),
        b"s": lambda m: m.update(m.pop(2)),
        b"u": lambda m: m.update(m.pop_to_mark()),
        b"g": lambda m: m.recall(int(m.word())),
        b"h": lambda m: m.recall(m.number("<B")),
        b"j": lambda m: m.recall(m.number("<I")),
        b"p": lambda m: m.remember(int(m.word())),
        b"q": lambda m: m.remember(m.number("<B")),
        b"r": lambda m: m.remember(m.number("<I")),
        b"\x94": lambda m: m.memoize(),
        b"c": _two_words,
        b"\x93": lambda m: m.name(*m.pop(2)),
        b"R": lambda m: m.reduce(),
        b"b": lambda m: m.build(),
    }.items()
}
