"""Checkpoints that were cut, emptied or altered on disk, and the one before them."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tasks.common.checkpoint import CheckpointConfig, Checkpointer, load_checkpoint, load_params
from tasks.common.errors import CheckpointError, ConfigError
from tasks.common.fingerprint import fingerprints
from tasks.common.mesh import MeshConfig, make_mesh
from tasks.common.state import TrainState

STEPS = (10, 20, 30)


def state_at(step: int) -> TrainState:
    """Arrays big enough to be stored in data files of their own, of several dtypes."""
    rng = np.random.default_rng(step)
    params = {
        "layers": {"0": {"kernel": jnp.asarray(rng.normal(size=(64, 48)), jnp.float32)}},
        "scale": jnp.asarray(rng.normal(size=(40,)), jnp.bfloat16),
    }
    moments = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    return TrainState(jnp.int32(step), params, (moments, jnp.int32(step)))


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path, CheckpointConfig(every=1, keep=3)) as checkpointer:
        for step in (5, *STEPS):
            checkpointer.save(state_at(step), step, {"position": step})
        checkpointer.wait()
        assert checkpointer.steps() == list(STEPS)  # the oldest was dropped
    return tmp_path


def restore(workdir: Path) -> Any:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    place = jax.sharding.NamedSharding(mesh, jax.P())
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(lambda: state_at(0))
    )
    with jax.set_mesh(mesh), Checkpointer(workdir, CheckpointConfig(every=1)) as checkpointer:
        return checkpointer.restore(abstract)


def assert_is(found: Any, step: int) -> None:
    assert found.step == step
    assert found.extra == {"position": step}
    wanted = state_at(step)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found.state, wanted
    )


def data_files(folder: Path) -> list[Path]:
    return sorted(
        (p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d"), key=lambda p: p.stat().st_size
    )


def truncate_array(step: Path) -> None:
    path = data_files(step / "params")[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_array_byte(step: Path) -> None:
    path = data_files(step / "params")[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def flip_moment_byte(step: Path) -> None:
    path = data_files(step / "opt_state")[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x01
    path.write_bytes(bytes(data))


def empty_folder(step: Path) -> None:
    for path in sorted(step.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


def delete_arrays(step: Path) -> None:
    empty_folder(step / "params")


def break_manifest(step: Path) -> None:
    (step / "manifest" / "metadata").write_text('{"format": 1, "st')


def alter_manifest(step: Path) -> None:
    path = step / "manifest" / "metadata"
    content = json.loads(path.read_text())
    content["extra"]["position"] += 1
    path.write_text(json.dumps(content))


def empty_manifest(step: Path) -> None:
    (step / "manifest" / "metadata").write_text("{}")


def break_array_index(step: Path) -> None:
    (step / "params" / "manifest.ocdbt").write_bytes(b"garbage")


def break_array_metadata(step: Path) -> None:
    (step / "params" / "_METADATA").write_text("{")


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (truncate_array, "cannot be read"),
    (flip_array_byte, "do not match their fingerprints"),
    (flip_moment_byte, "do not match their fingerprints"),
    (empty_folder, "manifest cannot be read"),
    (delete_arrays, "arrays cannot be read"),
    (break_manifest, "manifest cannot be read"),
    (alter_manifest, "manifest was altered"),
    (empty_manifest, "manifest is not complete"),
    (break_array_index, "arrays cannot be read"),
    (break_array_metadata, "arrays cannot be read"),
]


def test_the_newest_comes_back_bit_for_bit(workdir: Path) -> None:
    assert_is(restore(workdir), 30)
    loaded = load_checkpoint(workdir)
    assert loaded.step == 30
    assert loaded.extra == {"position": 30}
    jax.tree.map(np.testing.assert_array_equal, loaded.state, jax.tree.map(np.asarray, state_at(30).params))
    assert isinstance(loaded.state["scale"], np.ndarray)
    assert loaded.state["scale"].dtype == jnp.bfloat16


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=[d.__name__ for d, _ in DAMAGES])
def test_a_damaged_newest_step_is_named_and_passed_over(
    workdir: Path, damage: Callable[[Path], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(workdir / "checkpoints" / "30")
    only_moments = damage is flip_moment_byte  # evaluators do not read those
    with caplog.at_level(logging.WARNING):
        assert load_checkpoint(workdir).step == (30 if only_moments else 20)
        caplog.clear()
        assert_is(restore(workdir), 20)
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("tasks.")]
    assert len(messages) == 2
    assert f"checkpoint of step 30 in {workdir} is damaged" in messages[0]
    assert reason in messages[0]
    assert "continuing from the checkpoint of step 20" in messages[1]
    # Out of the way, so that the run can save step 30 again; and kept for whoever wants to look.
    assert not (workdir / "checkpoints" / "30").exists()
    assert (workdir / "damaged_checkpoints" / "30").is_dir()
    with Checkpointer(workdir, CheckpointConfig(every=1)) as checkpointer:
        checkpointer.save(state_at(30), 30, {"position": 30})
    assert_is(restore(workdir), 30)


def test_two_damaged_steps(workdir: Path) -> None:
    empty_folder(workdir / "checkpoints" / "30")
    flip_array_byte(workdir / "checkpoints" / "20")
    assert_is(restore(workdir), 10)


def test_none_good_is_an_error_not_a_new_start(workdir: Path) -> None:
    for step in STEPS:
        flip_array_byte(workdir / "checkpoints" / str(step))
    with pytest.raises(
        CheckpointError, match=r"no good checkpoint in .*step 30: .*step 20: .*step 10: "
    ) as error:
        restore(workdir)
    assert "nothing was changed" in str(error.value)
    assert all((workdir / "checkpoints" / str(step)).is_dir() for step in STEPS)
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        load_params(workdir)


def test_an_interrupted_save_is_ignored(workdir: Path) -> None:
    (workdir / "checkpoints" / "30").rename(workdir / "checkpoints" / "40.orbax-checkpoint-tmp-12")
    assert load_checkpoint(workdir).step == 20
    assert_is(restore(workdir), 20)


def test_nothing_saved(tmp_path: Path) -> None:
    assert restore(tmp_path) is None
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_params(tmp_path / "nowhere")


def test_paths_and_steps_of_load(workdir: Path) -> None:
    assert load_checkpoint(workdir / "checkpoints").step == 30
    assert load_checkpoint(workdir / "checkpoints" / "20").step == 20
    assert load_checkpoint(workdir, step=10).step == 10
    with pytest.raises(CheckpointError, match="no checkpoint of step 11"):
        load_checkpoint(workdir, step=11)


def test_donating_the_state_during_a_save_does_not_reach_the_file(tmp_path: Path) -> None:
    change = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = state_at(1)
    with Checkpointer(tmp_path, CheckpointConfig(every=1)) as checkpointer:
        checkpointer.save(state, 1, {"position": 1})
        for _ in range(20):
            state = change(state)
        jax.block_until_ready(state)
    assert_is(restore(tmp_path), 1)


def test_config_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.keep = 1: must be at least 2"):
        CheckpointConfig(keep=1)
    with pytest.raises(ConfigError, match=r"checkpoint.every = 0"):
        CheckpointConfig(every=0)


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "float64", "int64"]
)
def test_every_single_flipped_bit_changes_both_words(dtype: str) -> None:
    shape = (2, 3)
    array = np.random.default_rng(0).integers(0, 2, shape).astype(jnp.dtype(dtype))
    clean = fingerprints({"a": array})["a"]
    size = array.nbytes if dtype != "bool" else 0
    for byte in range(size):
        for bit in range(8):
            raw = bytearray(array.tobytes())
            raw[byte] ^= 1 << bit
            flipped = np.frombuffer(bytes(raw), array.dtype).reshape(shape)
            words = fingerprints({"a": flipped})["a"]
            assert words[0] != clean[0]
            assert words[1] != clean[1]
    for index in range(6):
        other = array.copy()
        other.flat[index] = 1 - other.flat[index]
        assert fingerprints({"a": other})["a"] != clean


def test_fingerprints_see_order_and_shape_and_not_where_the_array_is() -> None:
    array = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    on_host, on_device = fingerprints({"a": {"b": array}}), fingerprints({"a": {"b": jnp.asarray(array)}})
    assert on_host == on_device
    assert list(on_host) == ["a/b"]
    swapped = array.copy()
    swapped[[0, 1]] = array[[1, 0]]
    assert fingerprints({"a": {"b": swapped}}) != on_host
    # By hand, for the first of the two words.
    bits, total = array.view(np.uint32).ravel(), 0
    for i, word in enumerate(bits):
        mixed = ((i + 1) * 0x9E3779B1 + 0x85EBCA77) % 2**32
        mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) % 2**32
        total += int(word) * ((mixed ^ (mixed >> 13)) | 1)
    assert on_host["a/b"][0] == total % 2**32
