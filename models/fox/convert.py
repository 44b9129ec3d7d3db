"""Official FoX checkpoints (github.com/zhixuan-lin/forgetting-transformer, Hugging Face layout) in and out.

The names come from the parameter table (`ParamSpec.official`); Linear weights are stored [out, in] there and
are transposed on the way. Both released families load: "forgetting_transformer-project_fox" (FoX, and the
Transformer (Pro), which is the same layer without gates) and "transformer-project_fox" (the plain
Transformer).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.typing import DTypeLike

from models.common.official import naming_file, read_exactly, write_leaves
from models.common.params import check_params
from models.common.shapes import Params
from models.common.torch_pickle import read_tensors
from models.fox.config import FoxConfig
from models.fox.parameters import param_specs

FOX_TYPE = "forgetting_transformer-project_fox"
TRANSFORMER_TYPE = "transformer-project_fox"
SHARED_QK_NORM = "qk_norm_share_param_across_head"

# Our field -> official field, where both mean the same.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_heads",
    "num_kv_heads": "num_kv_heads",
    "hidden_ratio": "hidden_ratio",
    "intermediate_size": "intermediate_size",
    "norm_eps": "norm_eps",
    "use_rope": "use_rope",
    "rope_base": "rope_base",
    "initializer_range": "initializer_range",
    "fgate_type": "fgate_type",
    "fgate_bias_init": "fgate_bias_init",
    "decay_time_min": "decay_time_min",
    "decay_time_max": "decay_time_max",
    "qk_norm": "qk_norm",
    SHARED_QK_NORM: SHARED_QK_NORM,
    "use_k_shift": "use_k_shift",
    "use_v_shift": "use_v_shift",
    "use_output_norm": "use_output_norm",
    "use_output_gate": "use_output_gate",
}
_ACTIVATIONS = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}
# What we do not implement, and the only value that asks for nothing.
_UNSUPPORTED = {
    "tie_word_embeddings": False,
    "attention_bias": False,
    "elementwise_affine": True,
    "window_size": None,
}


def from_official(flat: Mapping[str, np.ndarray], config: FoxConfig) -> Params:
    """Our parameters from an official state dict.

    Args:
      flat: official name -> array of any floating dtype.
      config: the architecture; see `config_from_official`.

    Returns:
      Canonical tree in float32 (exact for bfloat16 and float16).

    Raises:
      ValueError: names or shapes that are not this config's, all differences listed; or an array of integers.
    """
    refusal = "the state dict is not that of this FoxConfig (official names)"
    return read_exactly(param_specs(config), flat, refusal)


def to_official(params: Params, config: FoxConfig, dtype: DTypeLike = jnp.float32) -> dict[str, np.ndarray]:
    """Official state dict from our parameters; the inverse of `from_official`.

    Raises:
      ValueError: parameters that are not this config's, all differences listed.
    """
    specs = param_specs(config)
    check_params(specs, params, config)
    return write_leaves(specs, params, dtype)


def config_from_official(fields: Mapping[str, Any]) -> FoxConfig:
    """Our config from the contents of an official config.json. Fields that change nothing here are ignored.

    Raises:
      ValueError: another model type, or an option this model does not have.
    """
    kind = fields.get("model_type", FOX_TYPE)
    if kind not in (FOX_TYPE, TRANSFORMER_TYPE):
        raise ValueError(f"model_type is {kind!r}; supported: {FOX_TYPE!r}, {TRANSFORMER_TYPE!r}")
    for name, harmless in _UNSUPPORTED.items():
        if fields.get(name, harmless) != harmless:
            raise ValueError(f"{name} = {fields[name]!r} is not supported; it must be {harmless!r}")
    options = {ours: fields[official] for ours, official in _FIELDS.items() if official in fields}
    for name in ("hidden_act", "ogate_act"):
        value = fields.get(name, "sigmoid" if name == "ogate_act" else "swish")
        if value not in _ACTIVATIONS:
            raise ValueError(f"{name} = {value!r} is not supported; it must be one of {sorted(_ACTIVATIONS)}")
        options[name] = _ACTIVATIONS[value]
    if options.get("hidden_ratio", 4) is None:
        options["hidden_ratio"] = 4.0
    if kind == TRANSFORMER_TYPE:
        # Its attention has neither gates nor norms (a qk_norm field exists and is not used).
        options |= {"fgate_type": "none", "use_rope": fields.get("use_rope", True), "qk_norm": False}
    return FoxConfig(**options)


def config_to_official(config: FoxConfig) -> dict[str, Any]:
    """Contents of an official config.json for this config (always of the FoX model type)."""
    activations = {"silu": "swish", "sigmoid": "sigmoid"}
    return {
        "architectures": ["ForgettingTransformerForCausalLM"],
        "model_type": FOX_TYPE,
        **{official: getattr(config, ours) for ours, official in _FIELDS.items()},
        "intermediate_size": config.mlp_size,
        "hidden_act": activations[config.hidden_act],
        "ogate_act": activations[config.ogate_act],
        **_UNSUPPORTED,
    }


def load_official(path: str | Path, config: FoxConfig | None = None) -> tuple[FoxConfig, Params]:
    """Loads a checkpoint in the official format.

    Args:
      path: a folder with config.json and model.safetensors, pytorch_model.bin, or the index of a sharded one;
        or a single .safetensors/.bin file, whose config.json lies beside it unless `config` is given.
      config: overrides config.json.

    Returns:
      (config, parameters in float32).

    Raises:
      FileNotFoundError: no such path, no weights in the folder, no config.json, or a missing shard.
      ValueError: a damaged or refused file, or weights that are not the config's (differences listed).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    flat = _read_folder(path) if path.is_dir() else _read_weights(path)
    if config is None:
        config = _read_config((path if path.is_dir() else path.parent) / "config.json", flat)
    with naming_file(path):
        return config, from_official(flat, config)


def save_official(
    path: str | Path, params: Params, config: FoxConfig, dtype: DTypeLike = jnp.float32
) -> None:
    """Writes model.safetensors and config.json as the official code (and `load_official`) reads them."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    arrays = to_official(params, config, dtype)
    safetensors.numpy.save_file(arrays, path / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config_to_official(config), indent=2)
    (path / "config.json").write_text(text + "\n", encoding="utf-8")


def _read_config(path: Path, flat: Mapping[str, np.ndarray]) -> FoxConfig:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a config, or put config.json beside the weights")
    fields = _read_json(path)
    scale = flat.get("model.layers.0.attn.q_norm.weight")
    if SHARED_QK_NORM not in fields and scale is not None and "hidden_size" in fields:
        # Checkpoints older than the flag all shared one weight between the heads; the shape says so.
        fields[SHARED_QK_NORM] = scale.shape != (fields["hidden_size"],)
    try:
        return config_from_official(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: a JSON object was expected, found {type(fields).__name__}")
    return fields


def _read_folder(folder: Path) -> dict[str, np.ndarray]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index)
        if (folder / name).is_file():
            return _read_weights(folder / name)
    raise FileNotFoundError(
        f"{folder}: no weights; expected model.safetensors, pytorch_model.bin or the .index.json of either"
    )


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index}: weight_map (tensor name -> file name) is missing or malformed")
    flat: dict[str, np.ndarray] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise ValueError(f"{index}: {file!r} is not a plain file name")
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"{index.parent / file}: shard named in {index.name} is missing")
        shard = _read_weights(index.parent / file)
        wanted = {name for name, place in places.items() if place == file}
        if absent := sorted(wanted - shard.keys()):
            raise ValueError(f"{index.parent / file}: lacks {absent[:5]}, which {index.name} says it holds")
        flat |= {name: shard[name] for name in wanted}
    return flat


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        try:
            return safetensors.numpy.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    if path.suffix in (".bin", ".pt", ".pth"):
        return read_tensors(path)
    raise ValueError(f"{path}: unknown kind of weights; expected .safetensors, .bin, .pt or .pth")
