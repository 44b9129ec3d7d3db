"""Configurations, presets and parameter counts against the paper's tables."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from models.common.params import count, flatten_names
from models.fox import (
    FoxConfig,
    FoxRuntime,
    count_params,
    decay_mask,
    flops_per_token,
    init_params,
    param_axes,
    param_specs,
    trainable_mask,
)

# (arch, size) -> (MLP size, non-embedding parameters, all parameters); FoX, computed from the paper's rules.
COUNTS = {
    ("fox_llama", "125m"): (2048, 123_661_968, 162_259_344),
    ("fox_pro", "125m"): (1792, 123_910_800, 162_508_176),
    ("fox_llama", "360m"): (2816, 360_188_288, 411_651_456),
    ("fox_pro", "360m"): (2560, 367_339_904, 418_803_072),
    ("fox_llama", "760m"): (4096, 757_632_576, 834_827_328),
    ("fox_pro", "760m"): (3584, 759_512_640, 836_707_392),
    ("transformer_llama", "760m"): (4096, 756_747_264, 833_942_016),
    ("transformer_pro", "760m"): (3584, 757_742_592, 834_937_344),
}
TINY = FoxConfig.preset("fox_pro", "tiny", vocab_size=11)
FIXED = {"fgate_type": "fixed", "fgate_bias_init": True, "decay_time_min": 2.0, "decay_time_max": 64.0}


@pytest.mark.parametrize(("arch", "size"), COUNTS)
def test_parameter_counts_equal_the_papers(arch, size):
    config = FoxConfig.preset(arch, size)
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert (config.mlp_size, count_params(config, embedding=False), count(abstract)) == COUNTS[arch, size]
    assert count_params(config) == count(abstract)


def test_shared_qk_norm_saves_its_weights():
    config = FoxConfig.preset("fox_pro", "760m")
    shared = dataclasses.replace(config, qk_norm_share_param_across_head=True)
    assert count_params(config) - count_params(shared) == 24 * 2 * (1536 - 64)


@pytest.mark.parametrize("arch", ["fox_llama", "fox_pro", "transformer_llama", "transformer_pro"])
def test_presets_have_the_papers_options(arch):
    for size in ("tiny", "mini", "125m", "360m", "760m"):
        config = FoxConfig.preset(arch, size)
        pro, gated = arch.endswith("pro"), arch.startswith("fox")
        options = (
            config.qk_norm,
            config.use_k_shift,
            config.use_v_shift,
            config.use_output_norm,
            config.use_output_gate,
        )
        assert options == (pro,) * 5
        assert (config.fgate_type, config.use_rope) == (("full", False) if gated else ("none", True))
        assert config.head_dim == (128 if size == "760m" and not gated else {"tiny": 16}.get(size, 64))


@pytest.mark.parametrize(
    ("size", "expected"), [("125m", None), ("760m", 2.72e9)], ids=["formula", "paper's table 6"]
)
def test_flops_per_token(size, expected):
    config = FoxConfig.preset("fox_pro", size)
    flops = flops_per_token(config, 16384)
    per_layer = 2 * config.hidden_size * 16384
    assert flops == 2 * count_params(config, embedding=False) + config.num_layers * per_layer
    if expected is not None:
        assert flops == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads = 3; it must be a divisor of hidden_size = 32"),
        ({"num_kv_heads": 3}, "num_kv_heads = 3"),
        ({"num_kv_heads": 0}, "num_kv_heads = 0"),
        ({"vocab_size": 0}, "vocab_size = 0; it must be at least 1"),
        ({"fgate_type": "relu"}, "fgate_type = 'relu'; it must be one of ['full'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"ogate_act": "silu"}, "ogate_act = 'silu'; it must be 'sigmoid'"),
        ({"fgate_bias_init": True}, "fgate_bias_init = True; it must be False for fgate_type='full'"),
        ({"fgate_type": "fixed"}, "fgate_bias_init = False; it must be True for fgate_type='fixed'"),
        (FIXED | {"decay_time_min": None}, "decay_time_min, decay_time_max = (None, 64.0)"),
        (FIXED | {"decay_time_min": 100.0}, "min <= max"),
        ({"decay_time_min": 2.0}, "they would be ignored"),
        ({"use_rope": True, "hidden_size": 30, "num_heads": 2}, "an even head dim"),
        ({"norm_eps": 0.0}, "norm_eps = 0.0; it must be positive"),
        ({"hidden_ratio": -1.0}, "hidden_ratio = -1.0"),
        ({"intermediate_size": 0}, "intermediate_size = 0"),
        ({"initializer_range": -0.1}, "initializer_range = -0.1"),
        ({"rope_base": 0.0}, "rope_base = 0.0"),
    ],
)
def test_impossible_configs_are_refused(changes, message, unchecked_types):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fox_max", "tiny"), "arch = 'fox_max'"),
        (("fox_pro", "7b"), "size = '7b'; it must be one of ['125m'"),
    ],
)
def test_unknown_presets_are_refused(arguments, message, unchecked_types):
    with pytest.raises(ValueError, match=re.escape(message)):
        FoxConfig.preset(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_dtype": "int8"}, "compute_dtype = 'int8'"),
        ({"remat": "some"}, "remat = 'some'"),
        ({"adaptive_threshold": "loose"}, "adaptive_threshold = 'loose'"),
        ({"log_pruning_tolerance": 0.0}, "log_pruning_tolerance = 0.0; it must be None or negative"),
    ],
)
def test_impossible_runtimes_are_refused(options, message, unchecked_types):
    with pytest.raises(ValueError, match=re.escape(message)):
        FoxRuntime(**options)


def test_initial_values():
    config = dataclasses.replace(TINY, hidden_size=128, num_heads=4, vocab_size=500)
    flat = flatten_names(init_params(config, jax.random.key(0)))
    assert flat.keys() == param_specs(config).keys()
    for name, value in flat.items():
        assert value.dtype == np.float32
        if name.endswith(("kernel", "embedding")):
            tolerance = 4 * 0.02 / math.sqrt(value.size)
            assert abs(float(value.mean())) < tolerance, name
            assert float(value.std()) == pytest.approx(0.02, abs=tolerance), name
        else:
            np.testing.assert_array_equal(value, float(name.endswith("scale")), err_msg=name)
    kernels = [np.asarray(v).ravel()[:100] for n, v in flat.items() if n.endswith("kernel")]
    correlations = np.corrcoef(kernels) - np.eye(len(kernels))
    assert np.abs(correlations).max() < 0.5  # every parameter draws its own numbers


def test_a_parameter_starts_the_same_whatever_else_there_is():
    key = jax.random.key(3)
    small = flatten_names(init_params(FoxConfig.preset("fox_llama", "tiny", vocab_size=11), key))
    large = flatten_names(init_params(dataclasses.replace(TINY, num_layers=4), key))
    shared = [name for name in small if name in large]
    assert len(shared) > 10
    for name in shared:
        np.testing.assert_array_equal(small[name], large[name], err_msg=name)


@pytest.mark.parametrize("gate", ["bias_only", "fixed"])
def test_decay_times_are_log_spaced(gate):
    config = dataclasses.replace(TINY, num_heads=4, **FIXED | {"fgate_type": gate})
    flat = flatten_names(init_params(config, jax.random.key(0)))
    bias = next(value for name, value in flat.items() if name.endswith("/bias"))
    times = -1 / np.asarray(jax.nn.log_sigmoid(bias), np.float64)
    np.testing.assert_allclose(times, [2, 2 * 32 ** (1 / 3), 2 * 32 ** (2 / 3), 64], rtol=1e-5)
    undecided = dataclasses.replace(TINY, fgate_type="bias_only")
    flat = flatten_names(init_params(undecided, jax.random.key(0)))
    np.testing.assert_array_equal(flat["layers/0/attn/fgate/bias"], 0)


def test_weight_decay_and_buffers():
    config = dataclasses.replace(TINY, **FIXED)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    decayed = flatten_names(decay_mask(params))
    assert decayed == {name: name.endswith(("kernel", "embedding")) for name in decayed}
    assert decayed["layers/0/attn/k_shift/kernel"]
    assert decayed["lm_head/kernel"]
    trained = flatten_names(trainable_mask(params))
    assert {name for name, on in trained.items() if not on} == {
        "layers/0/attn/fgate_fixed/bias",
        "layers/1/attn/fgate_fixed/bias",
    }
    assert count_params(config) == count(params) - 2 * config.num_heads


def test_axes_name_every_dimension():
    for config in (TINY, dataclasses.replace(TINY, **FIXED)):
        specs, axes = param_specs(config), flatten_names(param_axes(config))
        assert {name: len(names) for name, names in axes.items()} == {
            name: len(spec.shape) for name, spec in specs.items()
        }
