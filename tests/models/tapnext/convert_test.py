"""Checkpoints in and out: both layouts exactly, trainers' files, wrong and hostile files.

The official converter's own output is compared in golden/.
"""

import dataclasses

import jax
import numpy as np
import pytest

from models.common.params import flatten_names
from models.common.vit import sincos_positions
from models.tapnext import TAPNextConfig, convert, init_params, param_specs
from tests.models.common import torch_writer
from tests.models.tapnext.small_tapnext import random_params, small

CONFIG = small(image_size=(8, 8), depth=3)
CONFIGS = {
    "plain": CONFIG,
    "other sizes": small(image_size=(16, 16), width=24, num_heads=4, lru_width=40, conv_width=5),
    "bins": dataclasses.replace(CONFIG, coordinate_bins=(10, 10), lru_width=None),
}


def assert_same(actual, expected):
    actual, expected = flatten_names(actual), flatten_names(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def inferred(config, **options):
    """What shapes tell: without the options that leave no trace, sizes spelled out."""
    fresh = TAPNextConfig()
    untold = {name: getattr(fresh, name) for name in ("decode_radius", "min_rad")}
    told = {"lru_width": config.recurrent_width, "coordinate_bins": config.bins}
    return dataclasses.replace(config, **untold | told | options)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_both_layouts_are_exact_and_tell_their_sizes(tmp_path, config):
    params = random_params(config)
    convert.save_official(tmp_path / "model.npz", params, config)
    found, loaded = convert.load_official(tmp_path / "model.npz")
    assert_same(loaded, params)
    assert found == inferred(config)
    state_dict = convert.to_official(params, config, layout="torch")
    torch_writer.save(tmp_path / "model.pt", state_dict)
    found, loaded = convert.load_official(tmp_path / "model.pt")
    assert_same(loaded, params)
    assert found == inferred(config, numerics="torch")
    for layout in ("npz", "torch"):
        by_shape, by_config = (convert.to_official(params, c, layout) for c in (None, config))
        assert by_shape.keys() == by_config.keys()
        for name, array in by_config.items():
            assert array.dtype == np.float32
            np.testing.assert_array_equal(by_shape[name], array)
        assert_same(convert.from_official(by_config), params)


def test_names_and_shapes_are_the_released_ones():
    """Of TAPNext-B, from the sheet's tables: 448 arrays, 400 parameters and a buffer."""
    specs = param_specs(TAPNextConfig.preset("B")).values()
    stored = {spec.official: spec.stored_shape for spec in specs}
    assert len(stored) == 448
    block = "backbone/Transformer/encoderblock_11"
    expected = {
        "backbone/embedding/kernel": (1, 8, 8, 3, 768),
        "backbone/pos_embedding": (1, 1024, 768),
        "backbone/mask_token": (1, 1, 1, 768),
        "backbone/unknown_token": (1, 1, 768),
        "backbone/Transformer/encoder_norm/scale": (768,),
        f"{block}/ssm_block/temporal_pre_norm/scale": (768,),
        f"{block}/ssm_block/recurrent_block/rg_lru/a_gate/w": (12, 64, 64),
        f"{block}/ssm_block/recurrent_block/conv_1d/w": (4, 768),
        f"{block}/ssm_block/mlp_block/ffw_up/b": (2, 1, 1, 3072),
        f"{block}/vit_block/MultiHeadDotProductAttention_0/out/kernel": (12, 64, 768),
        f"{block}/vit_block/MlpBlock_0/Dense_0/kernel": (768, 3072),
        "visible_head/layers_6/kernel": (256, 1),
        "coordinate_head/layers_4/bias": (256,),
    }
    assert expected.items() <= stored.items()
    empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in stored.items()}
    torch = {name: array.shape for name, array in convert.npz_to_torch(empty).items()}
    assert len(torch) == 400
    expected = {
        "lin_proj.weight": (768, 3, 8, 8),
        "image_pos_emb": (1, 1024, 768),
        "blocks.11.ssm_block.recurrent_block.rg_lru.a_gate.b": (12, 64),
        "blocks.11.ssm_block.mlp_block.ffw_down.weight": (768, 3072),
        "blocks.11.vit_block.self_attention.in_proj_weight": (2304, 768),
        "blocks.11.vit_block.mlp.3.weight": (768, 3072),
        "encoder_norm.weight": (768,),
        "coordinate_head.6.weight": (512, 256),
    }
    assert expected.items() <= torch.items()


def test_buffer_is_the_table_of_positions():
    config = small()
    flat = convert.to_official(random_params(config), config, layout="torch")
    np.testing.assert_array_equal(flat["query_pos_embed"][0], sincos_positions((8, 12), 16))
    without = convert.to_official(random_params(config), config, layout="torch", buffer=False)
    assert flat.keys() - without.keys() == {"query_pos_embed"}
    assert_same(convert.from_official(without, config), random_params(config))


def trainers_file(path, flat):
    """A checkpoint of a trainer: the model under "state_dict", moments and a counter beside it."""
    storages = {str(i): np.array(array, order="C") for i, array in enumerate(flat.values())}
    entries = {}
    for (key, storage), (name, array) in zip(storages.items(), flat.items(), strict=True):
        strides = tuple(stride // 4 for stride in storage.strides)
        view = torch_writer.View(key, 0, array.shape, strides)
        entries[name] = torch_writer.op_tensor(view, storage)
    storages["moments"] = np.ones(1000, np.float32)
    moments = torch_writer.op_tensor(torch_writer.View("moments", 0, (1000,), (1,)), storages["moments"])

    def entry(name: str, value: bytes) -> bytes:
        return torch_writer.op_text(name) + value + b"s"

    program = b"}" + entry("epoch", torch_writer.op_int(3))
    program += entry("state_dict", torch_writer.op_state_dict(entries))
    program += entry("optimizer_states", b"]" + b"}" + entry("exp_avg", moments) + b"a")
    return torch_writer.write_archive(path, program, storages)


def test_trainers_checkpoints_are_read_without_the_rest(tmp_path):
    """Wrapped, prefixed, with moments: only the model is taken, whatever the file is called."""
    params = random_params(CONFIG)
    flat = convert.to_official(params, CONFIG, layout="torch")
    prefixed = {f"tapnext.{name}": array for name, array in flat.items()}
    for name, arrays in (("wrapped.ckpt", flat), ("prefixed.bin", prefixed)):
        config, loaded = convert.load_official(trainers_file(tmp_path / name, arrays), decode_radius=7)
        assert_same(loaded, params)
        assert (config.decode_radius, config.num_heads, config.numerics) == (7, 2, "torch")
    _, loaded = convert.load_official(tmp_path / "wrapped.ckpt", CONFIG)
    assert_same(loaded, params)


def test_differences_are_listed():
    flat = convert.to_official(random_params(CONFIG), CONFIG)
    name = "backbone/Transformer/encoder_norm/bias"
    del flat[name]
    flat |= {
        "backbone/extra": np.ones(2, np.float32),
        "backbone/mask_token": np.ones((1, 1, 1, 3), np.float32),
    }
    with pytest.raises(ValueError, match="not those of this TAPNextConfig") as error:
        convert.from_official(flat, CONFIG)
    text = str(error.value)
    assert f"missing (1):\n    {name} (16,)" in text
    assert "unexpected (1):\n    backbone/extra (2,)" in text
    assert "backbone/mask_token: expected (1, 1, 1, 16), found (1, 1, 1, 3)" in text


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    convert.save_official(tmp_path / "model.npz", random_params(CONFIG), CONFIG)
    with pytest.raises(ValueError, match=r"model\.npz: the arrays are not those of this TAPNextConfig"):
        convert.load_official(tmp_path / "model.npz", dataclasses.replace(CONFIG, depth=2))
    wide = small(image_size=(4, 12))
    convert.save_official(tmp_path / "wide.npz", random_params(wide), wide)
    with pytest.raises(ValueError, match=r"wide\.npz: backbone/pos_embedding: 3 patches are no square"):
        convert.load_official(tmp_path / "wide.npz")
    assert convert.load_official(tmp_path / "wide.npz", grid=(1, 3))[0].image_size == (4, 12)


def test_foreign_arrays_are_refused(unchecked_types):
    params, flat = random_params(CONFIG), convert.to_official(random_params(CONFIG), CONFIG, "torch")
    with pytest.raises(ValueError, match="no array 'backbone/embedding/kernel': not a TAPNext checkpoint"):
        convert.config_from_official({"weights": np.ones(3)})
    with pytest.raises(
        ValueError, match=r"array 'head\.weight' \(shape \(3,\)\) is of no TAPNext checkpoint"
    ):
        convert.from_official(flat | {"head.weight": np.ones(3, np.float32)})
    name = "blocks.0.ssm_block.recurrent_block.rg_lru.a_gate.w"
    with pytest.raises(ValueError, match=f"no array '{name}', whose first axis says how many heads"):
        convert.from_official({key: value for key, value in flat.items() if key != name})
    attention = "blocks.0.vit_block.self_attention.in_proj_weight"
    with pytest.raises(
        ValueError, match=f"{attention} has shape .* it must hold query, key and value, 3 x 16"
    ):
        convert.from_official(flat | {attention: flat[attention][:32]})
    with pytest.raises(ValueError, match="16 channels do not split into the 3 heads of the gates"):
        convert.from_official(flat | {name: np.ones((3, 5, 5), np.float32)})
    with pytest.raises(ValueError, match="layout = 'tf'; it must be 'npz' or 'torch'"):
        convert.to_official(params, layout="tf")
    with pytest.raises(ValueError, match="not the parameters of a TAPNext"):
        convert.to_official({"image": {"patch": {"kernel": np.ones((3, 4))}}})
    integers = convert.to_official(params, CONFIG)
    integers["backbone/mask_token"] = np.ones((1, 1, 1, 16), np.int32)
    with pytest.raises(ValueError, match="backbone/mask_token has dtype int32; floating point"):
        convert.from_official(integers, CONFIG)


def test_damaged_and_hostile_files_are_refused_and_run_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt: no such file"):
        convert.load_official(tmp_path / "absent.pt")
    marker = tmp_path / "was_here"
    code = torch_writer.op_call(
        torch_writer.op_global("os", "system"), torch_writer.op_text(f"touch {marker}")
    )
    path = torch_writer.write_archive(
        tmp_path / "evil.pt", b"}" + torch_writer.op_text("state_dict") + code + b"s", {}
    )
    with pytest.raises(ValueError, match=r"evil\.pt: .*asks for os\.system.*nothing was run"):
        convert.load_official(path)
    assert not marker.exists()
    np.savez(tmp_path / "objects.npz", a=np.array([{"code": "object"}], dtype=object))
    with pytest.raises(ValueError, match=r"objects\.npz: not a readable .* allow_pickle=False"):
        convert.load_official(tmp_path / "objects.npz")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.ckpt: not a PyTorch zip archive"):
        convert.load_official(tmp_path / "text.ckpt")


@pytest.mark.slow
def test_full_size_round_trip():
    """Random TAPNext-B: npz to torch names and back, bit for bit."""
    config = TAPNextConfig.preset("B")
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draw.standard_normal(leaf.shape, np.float32), shapes)
    npz = convert.to_official(params, config)
    assert (len(npz), sum(array.size for array in npz.values())) == (448, 194_202_881)
    torch = convert.to_official(params, config, layout="torch", buffer=False)
    assert len(torch) == 400
    assert convert.config_from_official(torch) == inferred(config, numerics="torch")
    back = convert.torch_to_npz(torch)
    assert back.keys() == npz.keys()
    for name, array in npz.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    assert_same(convert.from_official(torch, config), params)
