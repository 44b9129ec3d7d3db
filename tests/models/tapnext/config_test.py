"""Sizes, counts, presets, initial values, masks and errors of the configuration."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.params import count, flatten_names
from models.tapnext import (
    SIZES,
    TAPNextConfig,
    TAPNextRuntime,
    cast_params,
    count_params,
    decay_mask,
    flops_per_clip,
    init_params,
    param_axes,
    param_specs,
)
from models.tapnext.parameters import layer_specs
from tests.models.tapnext.small_tapnext import random_params, small


def scalars(specs):
    return sum(math.prod(spec.shape) for spec in specs.values())


def test_released_model_has_exactly_its_parameters():
    """194,202,881 in all, and part by part (sheet, section 1.1)."""
    config = TAPNextConfig.preset("B")
    assert config == TAPNextConfig()
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert count(shapes) == count_params(config) == 194_202_881
    layer = layer_specs(config, 3)
    vit = {name: spec for name, spec in layer.items() if "vit_block" in spec.official}
    assert (scalars(layer) - scalars(vit), scalars(vit)) == (8_962_560, 7_087_872)
    specs = param_specs(config)
    heads = {name: spec for name, spec in specs.items() if "head" in name}
    assert scalars(heads) == 659_201
    assert flatten_names(param_axes(config)).keys() == specs.keys()


def test_small_model_has_the_papers_56_million():
    assert round(count_params(TAPNextConfig.preset("S")) / 1e6, 1) == 56.6
    narrow = TAPNextConfig.preset("S", lru_width=None)
    assert (narrow.recurrent_width, round(count_params(narrow) / 1e6, 1)) == (384, 49.5)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_the_ladder_is_a_model(size):
    config = TAPNextConfig.preset(size, image_size=(64, 32))
    specs = param_specs(config)
    assert len({spec.official for spec in specs.values()}) == len(specs) == 28 + 35 * config.depth
    assert specs["image/positions"].shape == (32, config.width)
    assert specs["coordinate_head/out/kernel"].shape == (256, 96)


def test_flops_are_those_of_the_sheet():
    """About 462 GFLOP per frame of B with 64 points."""
    config = TAPNextConfig()
    assert round(flops_per_clip(config, 1, 64) / 1e9) == 463
    assert flops_per_clip(config, 2, 64) == 2 * flops_per_clip(config, 1, 64)
    heads = flops_per_clip(config, 1, 64, read_outs=13) - flops_per_clip(config, 1, 64)
    assert heads == 12 * 64 * 2 * (2 * (768 * 256 + 256 * 256) + 256 * 513)


def test_initial_values_are_the_sheets():
    """Kinds and standard deviations of section 1.9; every parameter is named."""
    config = TAPNextConfig(image_size=(32, 64), width=64, depth=2, mlp_size=128, num_heads=2, lru_width=96)
    specs = param_specs(config)
    fan_in = {"linear_x": 64, "linear_y": 64, "channel_mlp/up": 2 * 64, "input_gate": 96, "a_gate": 96}
    expected = {f"{name}/kernel": ("normal", size**-0.5) for name, size in fan_in.items()}
    expected |= dict.fromkeys(("positions", "points/query", "mask", "unknown"), ("normal", 64 ** (-0.5)))
    expected |= {
        "linear_out/kernel": ("normal", (2 / (2 * 96)) ** 0.5),
        "channel_mlp/down/kernel": ("normal", (2 / (2 * 128)) ** 0.5),
        "conv/kernel": ("normal", (0.01 / 4) ** 0.5),
        "patch/kernel": ("truncated", (8 * 8 * 3) ** -0.5),
        "dense_0/kernel": ("truncated", 64**-0.5),
        "dense_1/kernel": ("truncated", 256**-0.5),
        "out/kernel": ("truncated", 256**-0.5),
        "0/mlp/up/bias": ("normal", 1e-6),
        "1/mlp/up/bias": ("normal", 1e-6),
        "0/mlp/down/bias": ("normal", 1e-6),
        "1/mlp/down/bias": ("normal", 1e-6),
    }
    # Uniform in +-limit has a standard deviation of limit / sqrt(3).
    expected |= {f"{n}_proj/kernel": ("uniform", (3 * 2 / 128) ** 0.5) for n in ("q", "k", "v", "out")}
    expected |= {
        f"{i}/mlp/{n}/kernel": ("uniform", (3 * 2 / 192) ** 0.5) for i in "01" for n in ("up", "down")
    }
    seen = set()
    for name, spec in specs.items():
        found = [ending for ending in expected if name == ending or name.endswith(f"/{ending}")]
        seen |= set(found)
        if found:
            kind, size = expected[found[0]]
            assert spec.init.kind == kind, name
            assert math.isclose(spec.init.high, size), name
        elif name.endswith("a_param"):
            radius = np.exp(-jax.nn.softplus(spec.init(jax.random.key(0), (4000,))))
            square = np.sort(radius**2)  # uniform between the squares of 0.9 and 0.999
            np.testing.assert_allclose(square, np.linspace(0.81, 0.998, 4000), atol=6e-3)
        else:
            norm = name.endswith("norm/scale") or "norm_" in name or name == "norm/scale"
            is_one = norm and name.endswith("scale") and "temporal" not in name and "channel" not in name
            assert spec.init.kind == ("ones" if is_one else "zeros"), name
    assert seen == set(expected)


def test_weight_decay_and_casts_leave_what_they_should():
    params = random_params(small())
    decayed = {name for name, mask in flatten_names(decay_mask(params)).items() if mask}
    assert decayed == {name for name in flatten_names(params) if name.endswith("kernel")}
    cast = flatten_names(cast_params(params, "bfloat16"))
    assert cast["layers/0/mlp/up/kernel"].dtype == cast["image/patch/bias"].dtype == jnp.bfloat16
    for name in ("coordinate_head/out/kernel", "visible_head/dense_0/bias", "points/mask", "image/positions"):
        assert cast[name].dtype == jnp.float32


def test_numerics():
    jax_, torch = TAPNextConfig(), TAPNextConfig(numerics="torch")
    assert (jax_.head_eps, jax_.approximate_gelu) == (1e-6, True)
    assert (torch.head_eps, torch.approximate_gelu) == (1e-5, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (250, 256)}, "image_size = .*frame height = 250; it must be a multiple"),
        ({"image_size": 256}, "image_size = 256; it must be a pair"),
        ({"coordinate_bins": (0, 256)}, r"coordinate_bins = \(0, 256\); it must be a pair"),
        ({"width": 770}, "width = 770; it must be a multiple of 4 from 8 on"),
        ({"width": 776}, "width = 776; it must be a multiple of num_heads = 12"),
        ({"lru_width": 770}, "lru_width = 770; it must be a multiple of num_heads = 12"),
        ({"depth": 0}, "depth = 0; it must be at least 1"),
        ({"decode_radius": -1}, "decode_radius = -1; it must be at least 0"),
        ({"decode_temperature": 0.0}, "decode_temperature = 0.0; it must be positive"),
        ({"numerics": "flax"}, r"numerics = 'flax'; it must be one of \['jax', 'torch'\]"),
        ({"min_rad": 1.0}, "min_rad = 1.0"),
    ],
)
def test_clear_errors(unchecked_types, options, message):
    with pytest.raises(ValueError, match=message):
        TAPNextConfig(**options)


def test_errors_of_presets_and_runtime(unchecked_types):
    with pytest.raises(ValueError, match="size = 'XXL'; it must be one of"):
        TAPNextConfig.preset("XXL")
    with pytest.raises(ValueError, match="remat = 'some'"):
        TAPNextRuntime(remat="some")
    with pytest.raises(dataclasses.FrozenInstanceError):
        TAPNextConfig().width = 3
