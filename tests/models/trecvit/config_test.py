"""Configurations, parameter counts of the released table, FLOPs, initial values, errors."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from models.common.params import count, flatten_names
from models.trecvit import (
    SIZES,
    MAEConfig,
    TRecViTConfig,
    TRecViTRuntime,
    count_params,
    decay_mask,
    flops_per_clip,
    head_mask,
    init_params,
    mae_param_axes,
    mae_param_specs,
    param_axes,
    param_specs,
    resize_params,
)
from tests.models.trecvit.small_trecvit import QUICK_COMPILE, random_params, small

# Size -> parameters with E = D and with E = 2D, 400 classes, 224 px (fact sheet, section 7).
COUNTS = {
    "mu": (1_378_736, 1_385_200),
    "Ti": (8_995_984, 11_230_864),
    "S": (30_030_736, 37_154_704),
    "M": (51_426_704, 63_284_624),
    "B": (111_913_360, 136_778_128),
    "L": (386_616_720, 471_797_136),
    "So400m": (529_700_608, 650_944_000),
    "H": (800_413_072, 977_769_872),
}
BASE = TRecViTConfig.preset("B")
RELEASED = TRecViTConfig.preset("B", state_multiplier=2, min_rad=0.5)


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts_equal_the_released_table(size):
    configs = [TRecViTConfig.preset(size, state_multiplier=multiplier) for multiplier in (1, 2)]
    assert tuple(map(count_params, configs)) == COUNTS[size]


def test_counts_are_those_of_the_initial_parameters():
    abstract = jax.eval_shape(lambda: init_params(RELEASED, jax.random.key(0)))
    assert count(abstract) == count_params(RELEASED) == COUNTS["B"][1]
    assert len(flatten_names(abstract)) == 370
    groups = {"tokenizer": 741_888, "norm": 1_536, "head": 3_591_568}
    assert {name: count(abstract[name]) for name in groups} == groups
    recurrent = sum(
        count({k: layer[k] for k in ("temporal_norm", "recurrent")}) for layer in abstract["layers"].values()
    )
    assert recurrent == 47_388_672
    assert count(abstract["layers"]) - recurrent == 85_054_464
    assert count_params(dataclasses.replace(BASE, num_classes=174)) == 111_218_862  # paper: 111.2 M


def test_every_size_is_a_valid_model():
    for size in SIZES:
        assert count_params(TRecViTConfig.preset(size)) > 0
    assert count_params(TRecViTConfig.preset("e")) > 3.5e9
    options = TRecViTConfig.preset("S", state_multiplier=3, positions="sincos2d", pool="gap")
    assert (options.recurrent_width, options.num_tokens, options.width) == (1152, 196, 384)


@pytest.mark.parametrize(
    ("multiplier", "frames", "expected"), [(1, 16, 0.707), (1, 32, 1.414), (2, 16, 0.864), (2, 32, 1.728)]
)
def test_flops_of_the_sheet(multiplier, frames, expected):
    """XLA counts softmax, norms and the scan too: half a percent more."""
    config = dataclasses.replace(BASE, state_multiplier=multiplier)
    assert flops_per_clip(config, frames) / 1e12 == pytest.approx(expected, rel=6e-3)


def test_initial_values():
    """Spread of every kind of kernel; what starts at 0 or 1. 4 sigma of the sampling error."""
    config = small(width=32, state_multiplier=2, num_heads=4, mlp_size=64, depth=2, use_mlp=True)
    draw = jax.jit(lambda key: init_params(config, key), compiler_options=QUICK_COMPILE)
    flat = flatten_names(draw(jax.random.key(0)))
    spread = {
        "tokenizer/patch/kernel": 48**-0.5,
        "tokenizer/positions": 32**-0.5,
        "layers/0/recurrent/linear_x/kernel": 32**-0.5,
        "layers/1/recurrent/linear_out/kernel": math.sqrt(2 / (2 * 64)),
        "layers/1/recurrent/rglru/a_gate/kernel": 64**-0.5,
        "layers/1/attn/q_proj/kernel": 32**-0.5,
        "layers/1/attn/out_proj/kernel": 32**-0.5,
        "layers/1/mlp/up/kernel": math.sqrt(2 / (32 + 64)),
        "layers/1/mlp/down/bias": 1e-6,
        "head/pre_logits/kernel": 32**-0.5,
        "head/classes/kernel": 12**-0.5,
    }
    for name, sigma in spread.items():
        values = np.asarray(flat[name])
        assert abs(values.std() / sigma - 1) < 4 / math.sqrt(2 * values.size), name
    for name, values in flat.items():
        if name.endswith(("norm/scale", "cls", "rglru/a_gate/bias", "classes/bias", "attn/q_proj/bias")):
            recurrent_norm = name.endswith(("temporal_norm/scale", "channel_norm/scale"))
            is_one = name.endswith("norm/scale") and not recurrent_norm
            np.testing.assert_array_equal(values, float(is_one), err_msg=name)
    layers = [flat[f"layers/{i}/attn/q_proj/kernel"] for i in (0, 1)]
    assert (np.asarray(layers[0]) != np.asarray(layers[1])).any()


def test_masks_and_axes():
    params = random_params(small())
    decayed = {name for name, mask in flatten_names(decay_mask(params)).items() if mask}
    assert {"tokenizer/patch/kernel", "layers/0/recurrent/conv/kernel", "head/classes/kernel"} <= decayed
    assert all(name.endswith("/kernel") for name in decayed)
    probed = {name for name, mask in flatten_names(head_mask(params)).items() if mask}
    assert probed == {name for name in flatten_names(params) if name.startswith("head/")}
    for axes, specs in (
        (param_axes(RELEASED), param_specs(RELEASED)),
        (mae_param_axes(MAEConfig()), mae_param_specs(MAEConfig())),
    ):
        flat = flatten_names(axes)
        assert flat.keys() == specs.keys()
        assert all(len(flat[name]) == len(spec.shape) for name, spec in specs.items())


def test_positions_move_to_another_resolution():
    config = small()
    params = random_params(config)
    same, untouched = resize_params(params, config, config.image_size)
    assert same == config
    assert untouched["tokenizer"]["positions"] is params["tokenizer"]["positions"]
    tall, resized = resize_params(params, config, (24, 8))
    assert (
        resized["tokenizer"]["positions"].shape == (12, 16) == param_specs(tall)["tokenizer/positions"].shape
    )
    fixed = dataclasses.replace(config, positions="sincos2d")
    assert resize_params(params, fixed, (24, 8))[1] is params
    with pytest.raises(ValueError, match="height = 10; it must be a multiple of the patch size, 4"):
        resize_params(params, config, (10, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 50}, r"num_heads = 12; it must be a divisor of width = 50"),
        ({"depth": 0}, "depth = 0; it must be at least 1"),
        ({"conv_width": 0}, "conv_width = 0; it must be at least 1"),
        ({"frames_per_clip": 0}, "frames_per_clip = 0; it must be at least 1"),
        ({"image_size": (224, 225)}, r"image_size = \(224, 225\): frame width = 225; .* patch size, 16"),
        ({"image_size": (224,)}, r"image_size = \(224,\); it must be a pair \(height, width\)"),
        ({"pool": "mean"}, r"pool = 'mean'; it must be one of \['tok', 'gap'\]"),
        ({"head": "mae"}, "head = 'mae'; it must be one of"),
        ({"positions": "rope"}, "positions = 'rope'; it must be one of"),
        ({"dropout": 1.0}, r"dropout = 1.0; it must be in \[0, 1\)"),
        ({"min_rad": 1.0}, r"min_rad = 1.0; it must be in \[0, 0.999\)"),
        ({"channel_mlp_size": 64}, "channel_mlp_size = 64; it must be None, or at least 1 with use_mlp"),
        ({"width": 6, "num_heads": 2, "positions": "sincos2d"}, "'learn' for width = 6"),
    ],
)
def test_wrong_configs_are_refused(options, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        TRecViTConfig(**options)


def test_wrong_runtimes_and_sizes_are_refused(unchecked_types):
    with pytest.raises(ValueError, match="remat = 'some'; it must be one of"):
        TRecViTRuntime(remat="some")
    with pytest.raises(ValueError, match=r"cudnn.* it must be None or 'xla' with compute_dtype='float32'"):
        TRecViTRuntime(attention_implementation="cudnn")
    with pytest.raises(ValueError, match="size = 'XXL'; it must be one of"):
        TRecViTConfig.preset("XXL")
