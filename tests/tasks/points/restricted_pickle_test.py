"""The restricted reader: right values from every protocol, and refusal of all else with nothing run."""

import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tasks.points import restricted_pickle
from tasks.points.numpy_pickle import PickleError
from tasks.points.restricted_pickle import read_pickle

VALUES = {
    "float": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "strided": np.arange(40)[::3],
    "flags": np.array([[True, False]]),
    "big_endian": np.arange(3, dtype=">i4"),
    "bytes": np.array([b"abc", b"\xff\xd8\xff\xd9"]),
    "text": np.array(["a", "äö"]),
    "empty": np.zeros((0, 3)),
    "no_axes": np.array(2.5),
    "scalar": np.float64(3.25),
    "flag": np.bool_(True),
    "long": np.arange(50_000, dtype=np.uint16),
    "plain": ("ä\n\\x", 1, -5, 70_000, 2**40, -(2**70), 1.5, None, True, False, "x" * 300),
    "frames": [b"\xff\xd8\x00\n" * 200, b"", b"z"],
    "nested": [{"a": [], "b": {}, 3: ()}],
}


def same(found: object, expected: object) -> bool:
    if isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray)
        assert found.dtype == expected.dtype
        return found.shape == expected.shape and np.array_equal(found, expected)
    if isinstance(expected, bytes):
        return bytes(found) == expected  # type: ignore[call-overload]
    if isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected and type(found) is type(expected)


@pytest.mark.parametrize("protocol", range(6))
def test_values_of_every_protocol(tmp_path, protocol):
    content = VALUES | {"again": VALUES["float"]}
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_pickle(path)
    assert list(found) == list(content)
    for name, value in content.items():
        assert same(found[name], value), name
    assert found["again"] is found["float"]
    assert not found["float"].flags.writeable


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_names_of_both_numpy_versions(tmp_path, protocol):
    content = pickle.dumps(VALUES["float"], protocol=protocol)
    if protocol == 4:  # lengths precede the names there
        old = content.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    elif protocol == 5:
        old = content.replace(b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.core.numeric")
    else:
        old = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != content
    for name, data in (("old", old), ("new", content)):
        (tmp_path / name).write_bytes(data)
        np.testing.assert_array_equal(read_pickle(tmp_path / name), VALUES["float"])


class Runs:
    """Runs a command when unpickled by Python."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


class Evaluates(Runs):
    def __reduce__(self) -> tuple[object, ...]:
        return eval, (f"__import__('os').system({self.command!r})",)


class HasState:
    def __init__(self) -> None:
        self.x = 1


# Hand-written: what no pickler writes. {path} is where a command would leave its mark.
PROGRAMS = {
    "reduce os.system": b"cos\nsystem\n(S'touch {path}'\ntR.",
    "reduce posix.system": b"cposix\nsystem\n(V touch {path}\ntR.",
    "stack_global": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x021+\x85R.",
    "inst": b"(S'touch {path}'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nV touch {path}\no.",
    "newobj": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "persistent": b"Pfoo\n.",
    "binpersid": b"\x80\x02Nq\x00Q.",
    "extension": b"\x80\x02\x82\x01.",
    "numpy.load": b"cnumpy\nload\n(V{path}\ntR.",
    "getattr": b"c__builtin__\ngetattr\n(cnumpy\ndtype\nV__reduce__\ntR.",
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.tobyt\x93.",
    "encode by another codec": b"c_codecs\nencode\n(V{path}\nVrot13\ntR.",
    "state of a list": b"\x80\x02]N}b.",
    "state of a function": b"\x80\x02cnumpy\ndtype\n}b.",
    "calls text": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "calls ndarray": b"\x80\x02cnumpy\nndarray\n)R.",
    "attribute of bytes": b"c__builtin__\nbytes\n(I100000000000\ntR.",
    "next buffer": b"\x80\x05\x97.",
    "set": b"\x80\x04\x8f.",
}


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_programs_are_refused(tmp_path, name):
    mark = tmp_path / "mark"
    path = tmp_path / "x.pkl"
    path.write_bytes(PROGRAMS[name].replace(b"{path}", str(mark).encode()))
    with pytest.raises(PickleError, match=r"x\.pkl: "):
        read_pickle(path)
    assert not mark.exists()


@pytest.mark.parametrize("kind", [Runs, Evaluates])
@pytest.mark.parametrize("protocol", range(6))
def test_code_hidden_among_data(tmp_path, kind, protocol):
    """The marks show that Python's own reader would have run it."""
    mark, path = tmp_path / "mark", tmp_path / "x.pkl"
    content = {"clip": {"video": VALUES["float"], "points": [kind(f"touch {mark}")]}}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(
        PickleError, match=r"asks for (posix|nt|builtins|__builtin__)\.(system|eval).*nothing was run"
    ):
        read_pickle(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([None, 1], object), "dtype 'O8' .Python objects"),
        (np.zeros(2, [("a", "f4")]), "dtype 'V4'"),
        (np.zeros(2, "M8[s]"), "dtype 'M8'"),
        (np.zeros(2, complex), "dtype 'c16'"),
        (np.ma.zeros(2), r"numpy\.ma\.core\._mareconstruct"),
        ({1.5: 2}, "a key of a dict is float"),
        ({(1, 2): 3}, "a key of a dict is tuple"),
        ({1, 2}, "holds a set"),
        (HasState(), "asks for|makes objects"),
        (Path("x"), "asks for pathlib"),
        (1 + 2j, r"asks for (__builtin__|builtins)\.complex"),
        (bytearray(b"x"), r"asks for (__builtin__|builtins)\.bytearray"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_objects_are_refused(tmp_path, value, message):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(value, protocol=4))
    with pytest.raises(PickleError, match=message):
        read_pickle(path)


def array_program(shape: tuple[int, ...], code: bytes, content: bytes) -> bytes:
    """A hand-made protocol 2 pickle of one array."""

    def integer(value: int) -> bytes:
        raw = value.to_bytes(16, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    dims = b"(" + b"".join(integer(size) for size in shape) + b"t"
    data = b"B" + struct.pack("<I", len(content)) + content
    return (
        b"\x80\x03cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nI0\n\x85B\x01\x00\x00\x00btR("
        b"I1\n" + dims + b"cnumpy\ndtype\n(V" + code + b"\nI00\nI01\ntR(I3\nV<\nNNNI-1\nI-1\nI0\ntb"
        b"I00\n" + data + b"tb."
    )


def test_the_hand_made_array_is_one(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(array_program((2, 1), b"i2", b"\x01\x00\x02\x00"))
    np.testing.assert_array_equal(read_pickle(path), np.array([[1], [2]], np.int16))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (array_program((2**40,), b"f8", b"12345678"), "needs 8796093022208 bytes; the file has 8"),
        (array_program((2**62, 4), b"f8", b""), "needs"),
        (array_program((0, 2**62), b"f8", b""), "damaged"),
        (array_program((-1,), b"f8", b"12345678"), "shape"),
        (array_program((1,), b"S999999999", b"x"), "needs 999999999 bytes"),
        (array_program((2,), b"O8", b""), "Python objects"),
        (array_program((1,) * 9, b"u1", b"x"), "shape"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.", "truncated: 1152921504606846976 bytes"),
        (b"\x80\x04\x96" + struct.pack("<Q", 2**63) + b"x.", "truncated"),
        (b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"x.", "whole number of 1073741824 bytes"),
        (b"\x80\x02\x8b" + struct.pack("<i", -5) + b"x.", "whole number"),
        (b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".", None),
        (b"I" + b"9" * 10_000 + b"\n.", "line without an end"),
        (b"I" + b"9" * 4_090 + b"\n.", None),
        (b"", "empty file"),
        (b"hello", "not a pickle"),
        (b"\x80\x04" + b"]" * 100, "truncated"),
        (b"\x80\x04(((.", "used before it is complete"),
        (b"\x80\x04.", "too few objects"),
        (b"\x80\x04h\x07.", "damaged"),
        (b"\x80\x04t.", "no mark"),
        (b"\x80\x04(NuN.", "too few|damaged"),
        (b"\x80\x04}(K\x01u.", "damaged"),
        (pickle.dumps(VALUES["long"], 4)[:-1000], "truncated"),
        (b"\x80\x02U\x01a.", "Python 2"),
    ],
)
def test_damage_and_claims_of_huge_sizes(tmp_path, content, message):
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        if message is None:  # odd, but harmless
            read_pickle(path)
        else:
            with pytest.raises(PickleError, match=message):
                read_pickle(path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_text_cannot_be_decoded_over_and_over(tmp_path):
    """One long text, encoded to bytes a hundred times from the memo."""
    text = b"X" + struct.pack("<I", 200_000) + b"a" * 200_000 + b"q\x00"
    again = b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR0"
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02" + text + again * 100 + b".")
    with pytest.raises(PickleError, match="decode to more bytes than the file has"):
        read_pickle(path)


def test_the_number_of_instructions_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(restricted_pickle, "MOST_INSTRUCTIONS", 50)
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04" + b"]" * 60 + b".")
    with pytest.raises(PickleError, match="more than 50 instructions"):
        read_pickle(path)


def test_big_arrays_are_not_read_into_memory(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"video": np.zeros((64, 512, 512), np.uint8)}, protocol=4))
    tracemalloc.start()
    try:
        found = read_pickle(path)
        assert found["video"][63].sum() == 0
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_random_damage_never_runs_or_crashes(tmp_path):
    """Flipped bytes give an error or a value, never another exception."""
    content = bytearray(pickle.dumps(VALUES, protocol=4)[:900] + b".")
    rng = np.random.default_rng(0)
    path = tmp_path / "x.pkl"
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read_pickle(path)
        except PickleError:
            continue
