"""Official checkpoints in every format they come in: safetensors, PyTorch .bin, one file or shards."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from models.common.params import flatten_names
from models.fox import FoxConfig, convert, init_params

PRO = FoxConfig.preset("fox_pro", "tiny", vocab_size=11)
CONFIGS = {
    "llama": FoxConfig.preset("fox_llama", "tiny", vocab_size=11),
    "pro": PRO,
    "pro, shared QK-norm": dataclasses.replace(PRO, qk_norm_share_param_across_head=True),
    "transformer": FoxConfig.preset("transformer_pro", "tiny", vocab_size=11),
    "grouped, one shift": dataclasses.replace(PRO, num_heads=4, num_kv_heads=2, use_v_shift=False),
    "fixed gates": dataclasses.replace(
        PRO, fgate_type="fixed", fgate_bias_init=True, decay_time_min=2.0, decay_time_max=9.0
    ),
}


def load_writer():
    path = Path(__file__).parents[1] / "common" / "torch_writer.py"
    spec = importlib.util.spec_from_file_location("foxtrot_tests_torch_writer", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def random_params(config: FoxConfig):
    """Initial values moved off their constants, so that a swapped norm weight shows."""
    params = init_params(config, jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return treedef.unflatten(
        [x + jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    )


def assert_same(actual, expected) -> None:
    actual, expected = flatten_names(actual), flatten_names(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_saved_checkpoint_loads_exactly(tmp_path, config):
    params = random_params(config)
    convert.save_official(tmp_path, params, config)
    loaded_config, loaded = convert.load_official(tmp_path)
    assert_same(loaded, params)
    assert loaded_config == dataclasses.replace(config, intermediate_size=config.mlp_size)
    again = convert.to_official(loaded, config)
    for name, array in safetensors.numpy.load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_kernels_are_transposed_and_gate_half_stays_first():
    params = random_params(PRO)
    flat = convert.to_official(params, PRO)
    attn = params["layers"]["1"]["attn"]
    prefix = "model.layers.1"
    np.testing.assert_array_equal(flat[f"{prefix}.attn.k_proj.linear.weight"], attn["k_proj"]["kernel"].T)
    np.testing.assert_array_equal(
        flat[f"{prefix}.attn.v_proj.shift_proj.weight"], attn["v_shift"]["kernel"].T
    )
    np.testing.assert_array_equal(flat["model.embeddings.weight"], params["embed"]["embedding"])
    assert flat[f"{prefix}.mlp.gate_proj.weight"].shape == (2 * PRO.mlp_size, PRO.hidden_size)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_formats(tmp_path, kind, shards):
    config = CONFIGS["pro, shared QK-norm"]
    params = random_params(config)
    flat = convert.to_official(params, config)
    base = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    save = (lambda p, t: safetensors.numpy.save_file(t, p)) if kind == "safetensors" else load_writer().save
    fields = convert.config_to_official(config)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    if shards == 1:
        save(tmp_path / base, flat)
    else:
        names = np.array_split(sorted(flat), shards)
        stem, suffix = base.rsplit(".", 1)
        files = {f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}": part for i, part in enumerate(names)}
        for file, part in files.items():
            save(tmp_path / file, {str(name): flat[name] for name in part})
        places = {str(name): file for file, part in files.items() for name in part}
        (tmp_path / f"{base}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    _, loaded = convert.load_official(tmp_path)
    assert_same(loaded, params)
    if shards == 1:
        _, loaded = convert.load_official(tmp_path / base, config)  # the file alone
        assert_same(loaded, params)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_bfloat16_loads_as_float32_and_saves_back(tmp_path, kind):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), random_params(PRO))
    if kind == "safetensors":
        convert.save_official(tmp_path, params, PRO, jnp.bfloat16)
        stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
        assert {array.dtype for array in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    else:
        load_writer().save(tmp_path / "pytorch_model.bin", convert.to_official(params, PRO, jnp.bfloat16))
        (tmp_path / "config.json").write_text(json.dumps(convert.config_to_official(PRO)))
    _, loaded = convert.load_official(tmp_path)
    assert_same(loaded, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}


def test_sharing_of_qk_norm_is_read_off_old_checkpoints(tmp_path):
    for name in ("pro", "pro, shared QK-norm"):
        config = CONFIGS[name]
        convert.save_official(tmp_path, random_params(config), config)
        fields = convert.config_to_official(config)
        del fields["qk_norm_share_param_across_head"]  # the flag is younger than the released weights
        (tmp_path / "config.json").write_text(json.dumps(fields))
        loaded, _ = convert.load_official(tmp_path)
        assert loaded.qk_norm_share_param_across_head == config.qk_norm_share_param_across_head


def test_plain_transformer_configs():
    fields = {
        "model_type": "transformer-project_fox",
        "vocab_size": 11,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "num_kv_heads": None,
        "hidden_ratio": 4,
        "intermediate_size": 64,
        "hidden_act": "swish",
        "rope_base": 500000.0,
        "max_position_embeddings": 2048,
        "window_size": None,
        "qk_norm": False,
    }
    expected = FoxConfig.preset("transformer_llama", "tiny", vocab_size=11)
    assert convert.config_from_official(fields) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "forgetting_transformer"}, "model_type is 'forgetting_transformer'; supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported"),
        ({"window_size": 2048}, "window_size = 2048 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"num_heads": 5}, "num_heads = 5"),
    ],
)
def test_other_models_are_refused(tmp_path, change, message):
    convert.save_official(tmp_path, random_params(PRO), PRO)
    (tmp_path / "config.json").write_text(json.dumps(convert.config_to_official(PRO) | change))
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        convert.load_official(tmp_path)


def test_differences_are_listed():
    flat = convert.to_official(random_params(PRO), PRO)
    del flat["model.norm.weight"]
    flat["model.layers.0.attn.rotary.inv_freq"] = np.ones(8, np.float32)
    flat["lm_head.weight"] = flat["lm_head.weight"].T
    with pytest.raises(ValueError, match="official names") as caught:
        convert.from_official(flat, PRO)
    for line in (
        "missing (1):\n    model.norm.weight (32,)",
        "unexpected (1):\n    model.layers.0.attn.rotary.inv_freq (8,)",
        "lm_head.weight: expected (11, 32), found (32, 11)",
    ):
        assert line in str(caught.value)
    with pytest.raises(ValueError, match="unexpected"):
        convert.to_official(random_params(PRO), CONFIGS["llama"])


def test_integer_weights_are_refused():
    flat = convert.to_official(random_params(PRO), PRO)
    flat["model.norm.weight"] = np.ones(32, np.int32)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has dtype int32"):
        convert.from_official(flat, PRO)


def test_unreadable_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        convert.load_official(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no weights; expected model\.safetensors"):
        convert.load_official(tmp_path)
    convert.save_official(tmp_path, random_params(PRO), PRO)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        convert.load_official(tmp_path)
    weights.write_bytes(data)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        convert.load_official(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"put config\.json beside the weights"):
        convert.load_official(tmp_path)
    other = tmp_path / "weights.h5"
    other.write_bytes(b"")
    with pytest.raises(ValueError, match="unknown kind of weights"):
        convert.load_official(other)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ({}, ValueError, "weight_map"),
        ({"weight_map": {"a": 3}}, ValueError, "weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, ValueError, "not a plain file name"),
        ({"weight_map": {"a": "absent.safetensors"}}, FileNotFoundError, "shard named in"),
        ({"weight_map": {"a": "part.safetensors"}}, ValueError, r"lacks \['a'\]"),
    ],
)
def test_broken_indices(tmp_path, index, error, message):
    safetensors.numpy.save_file({"b": np.ones(1, np.float32)}, tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        convert.load_official(tmp_path, PRO)
