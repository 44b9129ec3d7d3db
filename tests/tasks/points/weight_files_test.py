"""Weights in one file: what is written is read, and what is not as it should be is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from models import tapnext
from models.common.params import flatten_names, unflatten_names
from tasks.common.config import to_json
from tasks.common.errors import ConfigError
from tasks.points import track, weight_files
from tasks.points.trained import open_model
from tasks.points.weight_files import chosen_weights, load_weights, pack_weights
from tests.tasks.common.video.video_files import numbered_frames, write_video

CONFIG = tapnext.TAPNextConfig(
    image_size=(16, 24), patch_size=(8, 8), width=16, depth=2, num_heads=2, mlp_size=24, head_width=8,
    lru_width=24, conv_width=3, numerics="torch", decode_radius=3,
)  # fmt: skip
TRAINING = {"step": 7, "config": {"seed": 1}}


def random_params(config: tapnext.TAPNextConfig = CONFIG) -> Any:
    rng = np.random.default_rng(0)
    specs = tapnext.param_specs(config)
    return unflatten_names({n: rng.normal(size=spec.shape).astype(np.float32) for n, spec in specs.items()})


PARAMS = random_params()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_was_packed_is_read(tmp_path: Path, dtype: str) -> None:
    content = pack_weights(PARAMS, CONFIG, TRAINING, dtype)
    found = load_weights(write(tmp_path / "x.safetensors", content))
    assert (found.config, found.training) == (CONFIG, TRAINING)
    wanted, flat = flatten_names(PARAMS), flatten_names(found.params)
    assert list(flat) == list(wanted)
    for name, value in wanted.items():
        assert flat[name].dtype == np.float32
        np.testing.assert_array_equal(flat[name], value.astype(dtype).astype(np.float32), name)
    count = tapnext.count_params(CONFIG)
    size = {"bfloat16": 2, "float32": 4}[dtype]
    assert size * count < len(content) < size * count + 20_000
    assert pack_weights(PARAMS, CONFIG, TRAINING, dtype) == content  # so that checksums can be compared
    model = open_model(tmp_path / "x.safetensors")
    assert (model.config, model.run) == (CONFIG, None)


def test_what_cannot_be_packed() -> None:
    broken = unflatten_names(flatten_names(PARAMS) | {"norm/scale": np.full(16, np.nan, np.float32)})
    with pytest.raises(ValueError, match="norm/scale holds numbers that are not finite"):
        pack_weights(broken, CONFIG, {})
    large = unflatten_names(flatten_names(PARAMS) | {"norm/scale": np.full(16, 3.4e38, np.float32)})
    with pytest.raises(ValueError, match="norm/scale holds numbers that are not finite"):  # in 16 bits
        pack_weights(large, CONFIG, {})
    with pytest.raises(ValueError, match=r"not those of this TAPNextConfig:\nmissing"):
        pack_weights({"norm": PARAMS["norm"]}, CONFIG, {})


def repacked(about: dict[str, Any] | str | None = None, **tensors: Any) -> bytes:
    """A file with other metadata, or other tensors ("-": without that one)."""
    flat = {n: v.astype(ml_dtypes.bfloat16) for n, v in flatten_names(PARAMS).items()}
    flat |= {name.replace("__", "/"): value for name, value in tensors.items()}
    flat = {name: value for name, value in flat.items() if not isinstance(value, str)}
    whole = {"format": "foxtrot-tapnext", "version": 1, "config": to_json(CONFIG), "training": {}}
    text = about if isinstance(about, str) else json.dumps(whole | (about or {}))
    return save(flat, metadata={"foxtrot": text} if text else {"format": "pt"})


def config_with(**changes: Any) -> dict[str, Any]:
    return {"config": to_json(CONFIG) | changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"text, no weights", "not a readable .safetensors file"),
        (lambda: repacked()[:-1], "not a readable .safetensors file: .*not fully covered"),
        (lambda: b"", "not a readable .safetensors file"),
        (lambda: repacked(""), "no entry 'foxtrot' in its metadata: not written by tasks.points.export"),
        (lambda: repacked("{"), "metadata 'foxtrot' is not JSON"),
        (lambda: repacked("[" * 100_000), "metadata 'foxtrot' is not JSON"),
        (lambda: repacked("[1]"), "does not have the keys config, format, training, version"),
        (lambda: repacked({"more": 1}), "does not have the keys config, format, training, version"),
        (lambda: repacked({"version": 2}), "'foxtrot-tapnext', version 2; 'foxtrot-tapnext', version 1"),
        (lambda: repacked({"training": []}), "metadata 'training' is not a section"),
        (lambda: repacked({"config": [1]}), "config section 'config' is"),
        (lambda: repacked(config_with(heads=2)), "unknown config key 'config.heads': did you mean"),
        (lambda: repacked(config_with(width="16")), "config.width = '16'"),
        (lambda: repacked(config_with(width=18)), "section 'config': width = 18; it must be a multiple"),
        (lambda: repacked(config_with(depth=10**9)), "says 1000000000 layers; there are"),
        (lambda: repacked(config_with(depth=3)), r"of its config:\nmissing \(\d+\):\n    layers/2/"),
        (lambda: repacked(config_with(head_width=9)), "wrong shape"),
        (lambda: repacked(norm__scale="-"), r"missing \(1\):\n    norm/scale"),
        (lambda: repacked(extra=np.ones(3, np.float32)), r"unexpected \(1\):\n    extra"),
        (lambda: repacked(norm__scale=np.ones(16, np.int16)), "norm/scale has dtype I16; one of BF16, F32"),
        (lambda: repacked(norm__scale=np.full(16, np.inf, np.float32)), "norm/scale holds numbers that"),
    ],
)  # fmt: skip
def test_what_is_not_such_a_file_is_refused(
    tmp_path: Path, content: Callable[[], bytes], message: str
) -> None:
    path = write(tmp_path / "x.safetensors", content())
    with pytest.raises(ValueError, match=message) as error:
        load_weights(path)
    assert str(error.value).startswith(str(path))
    with pytest.raises(ConfigError, match=message):
        open_model(path)


def test_a_file_of_another_kind_of_tensors_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.safetensors", repacked(config_with(depth=3)))

    def no_read(*args: Any) -> None:
        raise AssertionError("tensors were read")

    monkeypatch.setattr(weight_files, "deserialize", no_read)
    with pytest.raises(ValueError, match="not those of its config"):
        load_weights(path)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the weights that ship would lie."""
    path = tmp_path / "weights" / "default.safetensors"
    monkeypatch.setattr(weight_files, "DEFAULT", path)
    return path


def ship(path: Path) -> None:
    write(path, pack_weights(PARAMS, CONFIG, TRAINING))
    path.with_suffix(".json").write_text(json.dumps({"sha256": weight_files.checksum(path)}))


def test_what_is_given_comes_before_what_ships(shipped: Path) -> None:
    ship(shipped)
    assert chosen_weights(None, None) == shipped
    assert chosen_weights(Path("run"), None) == Path("run")
    assert chosen_weights(None, "x.npz") == Path("x.npz")
    with pytest.raises(ConfigError, match="give one of --workdir=RUN"):
        chosen_weights(Path("run"), "x.npz")


def test_nothing_ships(shipped: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"give one of --workdir=RUN .*there are no default weights in this copy"
    ):
        chosen_weights(None, None)


@pytest.mark.parametrize("record", ["{}", "[]", "text", '{"sha256": "00"}', None])
def test_what_ships_is_checked(shipped: Path, record: str | None) -> None:
    ship(shipped)
    shipped.with_suffix(".json").unlink()
    if record is not None:
        shipped.with_suffix(".json").write_text(record)
    with pytest.raises(
        ConfigError, match=r"default\.(json: not the record|safetensors: damaged: its SHA-256 is)"
    ):
        chosen_weights(None, None)


def test_one_changed_byte_is_found(shipped: Path) -> None:
    ship(shipped)
    content = bytearray(shipped.read_bytes())
    content[-1] ^= 1
    shipped.write_bytes(content)
    with pytest.raises(ConfigError, match=r"default\.safetensors: damaged: its SHA-256 is"):
        chosen_weights(None, None)


def test_track_uses_what_ships(shipped: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", numbered_frames(3))
    words = [f"--video={video}", "--click=20,10,0", "--no_video", f"--output={tmp_path / 'out'}"]
    with pytest.raises(ConfigError, match="there are no default weights"):
        track.main(words)
    ship(shipped)
    track.main(words)
    summary = json.loads((tmp_path / "out" / "clip.json").read_text())
    assert summary["model"]["source"] == str(shipped)
    assert summary["model"]["numerics"] == "torch"
    assert summary["frames"]["tracked"] == 3
