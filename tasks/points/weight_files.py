"""Weights in one file that says itself what it is: safetensors, with the model's configuration in its header.

Tensors have their flat canonical names ("layers/0/mlp/up/kernel"). The header's metadata has one entry,
"foxtrot": JSON of {"format", "version", "config": the fields of TAPNextConfig, "training": how the weights
came about}. A file is read without trusting it: nothing in it is executed, and names, shapes and dtypes are
compared with the configuration before any tensor is read.

One such file may ship with the package, `weights/default.safetensors`, with its checksum in `default.json`.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save

from models import tapnext
from models.common.params import check_params, flatten_names, list_differences, unflatten_names
from models.common.shapes import Params
from tasks.common.config import freeze, to_json
from tasks.common.errors import ConfigError

WeightsDtype = Literal["bfloat16", "float32"]
WEIGHTS_ENDING = ".safetensors"
DEFAULT = Path(__file__).parent / "weights" / f"default{WEIGHTS_ENDING}"
_ENTRY, _FORMAT, _VERSION = "foxtrot", "foxtrot-tapnext", 1
_DTYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F32": np.float32}


class Weights(NamedTuple):
    """What a file holds.

    Attributes:
      config: of the model.
      params: canonical tree, float32 whatever was stored.
      training: how they came about, plain JSON values; for people.
    """

    config: tapnext.TAPNextConfig
    params: Params
    training: dict[str, Any]


def pack_weights(
    params: Params,
    config: tapnext.TAPNextConfig,
    training: Mapping[str, Any],
    dtype: WeightsDtype = "bfloat16",
) -> bytes:
    """The content of a file, equal for equal arguments.

    Args:
      params: canonical tree, of finite numbers.
      config: of the model.
      training: how they came about, plain JSON values.
      dtype: what all tensors are rounded to.

    Raises:
      ValueError: parameters that are not this config's, or not finite.
    """
    check_params(tapnext.param_specs(config), params, config)
    tensors = {}
    for name, leaf in flatten_names(params).items():
        array = np.ascontiguousarray(np.asarray(jax.device_get(leaf)).astype(dtype))
        _require_finite(name, array)
        tensors[name] = array
    about = {"format": _FORMAT, "version": _VERSION, "config": to_json(config), "training": dict(training)}
    # One entry: the order of several would differ from call to call, and so would the checksum.
    return save(tensors, metadata={_ENTRY: json.dumps(about, sort_keys=True, allow_nan=False)})


def load_weights(path: Path | str) -> Weights:
    """Reads such a file.

    Raises:
      ValueError: not such a file, damaged, or of a model that its tensors do not fit; names the file.
      OSError: it cannot be read.
    """
    path = Path(path)
    try:
        return _load(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable {WEIGHTS_ENDING} file: {error}") from error
    except (ValueError, ConfigError) as error:
        raise ValueError(f"{path}: {error}") from error


def _load(path: Path) -> Weights:
    with safe_open(path, framework="np") as file:
        about = _read_about((file.metadata() or {}).get(_ENTRY))
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: part.get_dtype() for name, part in slices.items()}
    config = freeze(about["config"], tapnext.TAPNextConfig, "config")
    # Every layer has tensors: a table of absurd depth is not even made.
    if config.depth > len(shapes):
        raise ValueError(f"its config says {config.depth} layers; there are {len(shapes)} tensors")
    expected = {name: spec.shape for name, spec in tapnext.param_specs(config).items()}
    if difference := list_differences(expected, shapes):
        raise ValueError(f"the tensors are not those of its config:\n{difference}")
    wrong = {name: dtype for name, dtype in dtypes.items() if dtype not in _DTYPES}
    if wrong:
        name, dtype = next(iter(wrong.items()))
        raise ValueError(f"{name} has dtype {dtype}; one of {', '.join(_DTYPES)} was expected")
    flat = {}
    for name, tensor in deserialize(path.read_bytes()):
        array = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        _require_finite(name, array)
        flat[name] = array.astype(np.float32)
    return Weights(config, unflatten_names({name: flat[name] for name in expected}), about["training"])


def _read_about(text: str | None) -> dict[str, Any]:
    """The entry of the metadata, checked as far as its own keys go."""
    if text is None:
        raise ValueError(f"no entry {_ENTRY!r} in its metadata: not written by tasks.points.export")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"metadata {_ENTRY!r} is not JSON ({error})") from error
    keys = {"format", "version", "config", "training"}
    if not isinstance(about, dict) or about.keys() != keys:
        raise ValueError(f"metadata {_ENTRY!r} does not have the keys {', '.join(sorted(keys))}")
    found = (about["format"], about["version"])
    if found != (_FORMAT, _VERSION):
        raise ValueError(
            f"format {found[0]!r}, version {found[1]!r}; {_FORMAT!r}, version {_VERSION} is read"
        )
    if not isinstance(about["training"], dict):
        raise ValueError("metadata 'training' is not a section with keys")
    return about


def _require_finite(name: str, array: np.ndarray) -> None:
    if not np.isfinite(array.astype(np.float32)).all():
        raise ValueError(f"{name} holds numbers that are not finite")


def checksum(path: Path | str) -> str:
    """SHA-256 of a file, in hex digits. Raises OSError."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def chosen_weights(workdir: Path | None, checkpoint: Path | str | None) -> Path:
    """What a command opens: the run or the file it was given, or else the weights that ship with the package.

    Raises:
      ConfigError: both were given; or neither, and no weights ship with this copy, or other ones than their
        checksum says.
    """
    if workdir is not None and checkpoint is not None:
        raise ConfigError(
            "give one of --workdir=RUN (a run of ours) and --checkpoint=FILE (weights), not both"
        )
    given = workdir or checkpoint
    return Path(given).expanduser() if given else default_weights()


def default_weights() -> Path:
    """The file that ships, once its checksum is right.

    Raises:
      ConfigError: there is none, or it is not what its `default.json` says.
    """
    if not DEFAULT.is_file():
        raise ConfigError(
            "give one of --workdir=RUN (a run of ours) and --checkpoint=FILE (weights): there are no default "
            f"weights in this copy ({'/'.join(DEFAULT.parts[-4:])})"
        )
    record = DEFAULT.with_suffix(".json")
    try:
        expected = json.loads(record.read_text(encoding="utf-8"))["sha256"]
        found = checksum(DEFAULT)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{record}: not the record of {DEFAULT.name} ({error}): install it anew") from error
    if found != expected:
        raise ConfigError(
            f"{DEFAULT}: damaged: its SHA-256 is {found}, {record.name} says {expected}: install it anew, or "
            "give --workdir or --checkpoint"
        )
    return DEFAULT
