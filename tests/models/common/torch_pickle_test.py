"""The restricted reader of PyTorch files: right values from real layouts, clear refusal of all else."""

import importlib.util
import pickle
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from models.common.torch_pickle import TorchFileError, read_tensors


def load_sibling(name: str):
    """Test folders are not packages; a helper module is loaded by its path."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"foxtrot_tests_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


writer = load_sibling("torch_writer")
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", list(writer.STORAGES))
def test_values_of_every_storage_type(tmp_path, dtype):
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    tensors = {
        "matrix": (RNG.standard_normal((3, 5)) * 50).astype(kind),
        "scalar": np.array(3).astype(kind),
        "empty": np.zeros((0, 4), kind),
    }
    found = read_tensors(writer.save(tmp_path / "w.bin", tensors))
    assert list(found) == list(tensors)
    for name, array in tensors.items():
        assert found[name].dtype == kind
        np.testing.assert_array_equal(found[name], array)


def test_shared_storages_strides_and_offsets(tmp_path):
    storage = np.arange(24, dtype=np.float32)
    views = {
        "tail": writer.View("0", 20, (4,), (1,)),
        "transposed": writer.View("0", 0, (4, 6), (1, 4)),
        "column": writer.View("0", 2, (6,), (4,)),
        "windows": writer.View("0", 0, (5, 4), (4, 2)),
    }
    entries = {name: writer.op_tensor(view, storage) for name, view in views.items()}
    found = read_tensors(
        writer.write_archive(tmp_path / "w.bin", writer.op_state_dict(entries), {"0": storage})
    )
    np.testing.assert_array_equal(found["tail"], storage[20:])
    np.testing.assert_array_equal(found["transposed"], storage.reshape(6, 4).T)
    np.testing.assert_array_equal(found["column"], storage[2::4])
    np.testing.assert_array_equal(found["windows"][1], [4, 6, 8, 10])
    found["tail"][:] = 0  # memory of its own
    assert found["column"][-1] == 22


def test_parameters_are_read_as_tensors(tmp_path):
    storage = np.ones(2, np.float32)
    tensor = writer.op_tensor(writer.View("0", 0, (2,), (1,)), storage)
    parameter = writer.op_call(
        writer.op_global("torch._utils", "_rebuild_parameter"), tensor, b"\x88", writer.EMPTY_ORDERED_DICT
    )
    program = writer.op_state_dict({"w": parameter})
    found = read_tensors(writer.write_archive(tmp_path / "w.bin", program, {"0": storage}))
    np.testing.assert_array_equal(found["w"], storage)


def command(marker: Path) -> bytes:
    """Pickle code that would create `marker` through os.system."""
    return writer.op_call(writer.op_global("os", "system"), writer.op_text(f"touch {marker}"))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "__builtins__"),
        ("collections", "OrderedDict.__class__"),
        ("numpy", "ndarray"),
    ],
)
def test_other_names_are_refused(tmp_path, module, name):
    program = writer.op_call(writer.op_global(module, name), writer.op_text("1"))
    path = writer.write_archive(tmp_path / "w.bin", program, {})
    with pytest.raises(TorchFileError, match=f"asks for {module}.{name}.*refused, nothing was run"):
        read_tensors(path)


def test_malicious_pickle_runs_nothing(tmp_path):
    marker = tmp_path / "was_here"
    path = writer.write_archive(tmp_path / "w.bin", writer.op_state_dict({"w": command(marker)}), {})
    with pytest.raises(TorchFileError, match="refused"):
        read_tensors(path)
    assert not marker.exists()
    # The same pickle does run under the standard unpickler: the test would notice.
    with zipfile.ZipFile(path) as archive:
        pickle.loads(archive.read("archive/data.pkl"))
    assert marker.exists()


@pytest.mark.parametrize(
    "target",
    [
        writer.op_global("torch._utils", "_rebuild_tensor_v2"),
        writer.op_global("collections", "OrderedDict"),
        writer.op_global("torch", "FloatStorage"),
        writer.op_tensor(writer.View("0", 0, (2,), (1,)), np.ones(2, np.float32)),
    ],
)
def test_objects_of_the_reader_cannot_be_changed(tmp_path, target):
    attributes = b"}" + writer.op_text("__doc__") + writer.op_text("changed") + b"s"
    path = writer.write_archive(tmp_path / "w.bin", target + attributes + b"b", {"0": np.ones(2, np.float32)})
    with pytest.raises(TorchFileError, match="tries to change"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("view", "numel", "message"),
    [
        (writer.View("0", 0, (5,), (1,)), None, "needs more than its storage of 4"),
        (writer.View("0", 2, (3,), (1,)), None, "needs more than its storage of 4"),
        (writer.View("0", 0, (1000, 1000), (0, 0)), None, "needs more than its storage of 4"),
        (writer.View("0", 0, (2,), (1, 1)), None, "strides"),
        (writer.View("0", -1, (2,), (1,)), None, "tensor offset is -1"),
        (writer.View("0", 0, (2,), (-1,)), None, "tensor strides is -1"),
        (writer.View("0", 0, (2,), (1,)), 9, "has 16 bytes, 36 were expected"),
        (writer.View("1", 0, (2,), (1,)), None, "no member archive/data/1"),
        (writer.View("../0", 0, (2,), (1,)), None, "no member"),
    ],
)
def test_tensors_must_fit_their_storage(tmp_path, view, numel, message):
    storage = np.ones(4, np.float32)
    program = writer.op_state_dict({"w": writer.op_tensor(view, storage, numel)})
    with pytest.raises(TorchFileError, match=message):
        read_tensors(writer.write_archive(tmp_path / "w.bin", program, {"0": storage}))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"]", "holds list, not a state dict"),
        (b"}" + writer.op_text("epoch") + writer.op_int(3) + b"s", "entry 'epoch' is int, not a tensor"),
        (b"}" + writer.op_int(3) + writer.op_int(3) + b"s", "entry 3 is int"),
        (writer.op_text("data/0") + b"Q", "unknown reference"),
        (b"R", "damaged pickle"),
        (b"\x8e" + (2**60).to_bytes(8, "little"), "damaged pickle"),
    ],
)
def test_other_contents_are_refused(tmp_path, program, message):
    with pytest.raises(TorchFileError, match=message):
        read_tensors(writer.write_archive(tmp_path / "w.bin", program, {}))


def test_truncated_and_corrupt_files_are_refused(tmp_path):
    path = writer.save(tmp_path / "w.bin", {"w": np.arange(1000, dtype=np.float32)})
    data = path.read_bytes()
    for kept in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:kept])
        with pytest.raises(TorchFileError, match=r"w\.bin: .*(zip archive|damaged)"):
            read_tensors(path)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0x40  # inside the storage
    path.write_bytes(flipped)
    with pytest.raises(TorchFileError, match="damaged archive: BadZipFile: Bad CRC"):
        read_tensors(path)


def test_other_formats_are_refused(tmp_path):
    old = tmp_path / "old.bin"
    old.write_bytes(pickle.dumps({"w": 1}, protocol=2))
    with pytest.raises(TorchFileError, match=r"before 1\.6"):
        read_tensors(old)
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(TorchFileError, match=r"expected one data\.pkl in the archive, found 0"):
        read_tensors(tmp_path / "other.bin")
    bomb = writer.write_archive(tmp_path / "bomb.bin", b"}", {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(TorchFileError, match="is compressed"):
        read_tensors(bomb)
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "absent.bin")


def test_big_endian_files_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.PROTO + b"\x02}.")
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(TorchFileError, match="big-endian"):
        read_tensors(tmp_path / "w.bin")


def test_only_the_named_group_is_read(tmp_path):
    """Of a trainer's checkpoint; its other parts may be of any kind that a pickle has by itself."""
    storage = np.arange(4, dtype=np.float32)
    tensor = writer.op_tensor(writer.View("0", 0, (4,), (1,)), storage)
    unread = writer.op_tensor(writer.View("missing", 0, (4,), (1,)), storage)

    def entry(name: str, value: bytes) -> bytes:
        return writer.op_text(name) + value + b"s"

    program = b"}" + entry("epoch", writer.op_int(3)) + entry("optimizer", b"]" + unread + b"a")
    program += entry("state_dict", writer.op_state_dict({"w": tensor}))
    path = writer.write_archive(tmp_path / "w.ckpt", program, {"0": storage})
    found = read_tensors(path, inside=("model", "state_dict"))
    assert list(found) == ["w"]
    np.testing.assert_array_equal(found["w"], storage)
    with pytest.raises(TorchFileError, match="entry 'epoch' is int, not a tensor"):
        read_tensors(path)
    flat = writer.save(tmp_path / "flat.bin", {"state_dict": storage})  # a tensor of that name is no group
    assert list(read_tensors(flat, inside=("state_dict",))) == ["state_dict"]
    evil = (
        b"}" + entry("state_dict", writer.op_state_dict({"w": tensor})) + entry("x", command(tmp_path / "x"))
    )
    with pytest.raises(TorchFileError, match=r"asks for os\.system"):
        read_tensors(
            writer.write_archive(tmp_path / "evil.ckpt", evil, {"0": storage}), inside=("state_dict",)
        )
    assert not (tmp_path / "x").exists()
