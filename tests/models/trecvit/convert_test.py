"""Checkpoints in and out: official .npz files, encoders under other heads, ImageNet ViTs, damaged files."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from models.common.params import flatten_names
from models.trecvit import TRecViTConfig, convert, from_imagenet, param_specs
from models.trecvit.config import TRecViTRuntime
from models.trecvit.model import tokenize
from tests.models.trecvit.small_trecvit import random_params, small, video

CONFIG = small(image_size=(8, 8), depth=2)
CONFIGS = {
    "class token": CONFIG,
    "channel MLP, mean, fixed positions": dataclasses.replace(
        CONFIG, use_mlp=True, channel_mlp_size=20, pool="gap", positions="sincos2d", state_multiplier=3
    ),
    "encoder": dataclasses.replace(CONFIG, head="none"),
}


def assert_same(actual, expected):
    actual, expected = flatten_names(actual), flatten_names(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_saved_checkpoint_loads_exactly(tmp_path, config):
    params = random_params(config)
    convert.save_official(tmp_path / "model.npz", params, config)
    _, loaded = convert.load_official(tmp_path / "model.npz", config)
    assert_same(loaded, params)
    read, _ = convert.load_official(tmp_path / "model.npz", grid=(2, 2), frames_per_clip=4)
    head = {} if config.head == "classes" else {"num_classes": 400, "rep_size": 3072}
    assert read == dataclasses.replace(config, **head)


def test_names_and_shapes_are_the_released_ones():
    specs = param_specs(TRecViTConfig.preset("B", state_multiplier=2)).values()
    stored = {spec.official: spec.stored_shape for spec in specs}
    assert len(stored) == 370
    expected = {
        "tokenizer/embedding/kernel": (1, 16, 16, 3, 768),
        "tokenizer/pos_embedding": (1, 196, 768),
        "tokenizer/cls": (1, 1, 768),
        "encoder/residualblock_00/temporal_pre_norm/scale": (768,),
        "encoder/residualblock_11/recurrent_block/rg_lru/a_gate/w": (12, 128, 128),
        "encoder/residualblock_11/recurrent_block/conv_1d/w": (4, 1536),
        "encoder/encoderblock_9/MultiHeadDotProductAttention_0/query/kernel": (768, 12, 64),
        "encoder/encoderblock_9/MultiHeadDotProductAttention_0/out/kernel": (12, 64, 768),
        "encoder/encoderblock_9/MlpBlock_0/Dense_1/kernel": (3072, 768),
        "decoder/pre_logits/kernel": (768, 3072),
        "decoder/cls_head/bias": (400,),
    }
    assert expected.items() <= stored.items()


def test_differences_are_listed():
    flat = convert.to_official(random_params(CONFIG), CONFIG)
    del flat["encoder/encoder_norm/bias"]
    flat |= {"encoder/extra": np.ones(2, np.float32), "tokenizer/cls": np.ones((1, 1, 3), np.float32)}
    with pytest.raises(ValueError, match="the arrays are not those of this TRecViTConfig") as error:
        convert.from_official(flat, CONFIG)
    text = str(error.value)
    assert "missing (1):\n    encoder/encoder_norm/bias (16,)" in text
    assert "unexpected (1):\n    encoder/extra (2,)" in text
    assert "tokenizer/cls: expected (1, 1, 16), found (1, 1, 3)" in text


def test_integers_and_foreign_heads_are_refused():
    flat = convert.to_official(random_params(CONFIG), CONFIG)
    flat["tokenizer/embedding/bias"] = np.ones(16, np.int32)
    with pytest.raises(ValueError, match="tokenizer/embedding/bias has dtype int32; floating point"):
        convert.from_official(flat, CONFIG)
    dense = dataclasses.replace(CONFIG, head="dense")
    with pytest.raises(ValueError, match="head = 'dense'; official files know 'classes' only"):
        convert.to_official(random_params(dense), dense)
    with pytest.raises(ValueError, match="no array 'tokenizer/embedding/kernel': not a TRecViT checkpoint"):
        convert.config_from_official({"weights": np.ones(3)})


def test_encoder_of_an_mae_file_under_another_head():
    """Its decoder's names are unknown: reported, not read. Positions follow the resolution."""
    source = dataclasses.replace(CONFIG, head="none")
    flat = convert.to_official(random_params(source), source)
    flat |= {"decoder/anything/kernel": np.ones((3, 3), np.float32)}
    config = dataclasses.replace(CONFIG, head="readout", image_size=(8, 16))
    params = random_params(config)
    loaded, unused = convert.encoder_from_official(flat, config, params)
    assert unused == ["decoder/anything/kernel"]
    assert_same(loaded["layers"], random_params(source)["layers"])
    assert_same(loaded["head"], params["head"])
    assert loaded["tokenizer"]["positions"].shape == (8, 16)
    del flat["encoder/encoder_norm/bias"]
    with pytest.raises(ValueError, match="not the encoder of this TRecViTConfig:\nmissing"):
        convert.encoder_from_official(flat, config, params)
    flat["tokenizer/pos_embedding"] = np.ones((1, 5, 16), np.float32)
    with pytest.raises(ValueError, match="5 patches are no square; say which grid"):
        convert.encoder_from_official(flat, config, params)


def image_vit(kind, seed=0):
    """Random weights of a ViT of two blocks, width 16, two heads, 2 x 2 patches of 4, by official names."""
    draw = np.random.default_rng(seed)

    def array(*shape):
        return draw.normal(size=shape).astype(np.float32)

    flat = {"cls": array(1, 1, 16), "embedding/kernel": array(4, 4, 3, 16), "embedding/bias": array(16)}
    with_cls = {"Transformer/posembed_input/pos_embedding": array(1, 5, 16)}
    flat |= with_cls if kind == "original" else {"pos_embedding": array(1, 4, 16)}
    flat |= {f"Transformer/encoder_norm/{leaf}": array(16) for leaf in ("scale", "bias")}
    norm, attn, mlp = (
        ("LayerNorm_2", "MultiHeadDotProductAttention_1", "MlpBlock_3")
        if kind == "original"
        else ("LayerNorm_1", "MultiHeadDotProductAttention_0", "MlpBlock_0")
    )
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        flat |= {
            f"{block}/{n}/{leaf}": array(16) for n in ("LayerNorm_0", norm) for leaf in ("scale", "bias")
        }
        flat |= {f"{block}/{attn}/{n}/kernel": array(16, 2, 8) for n in ("query", "key", "value")}
        flat |= {f"{block}/{attn}/{n}/bias": array(2, 8) for n in ("query", "key", "value")}
        flat |= {f"{block}/{attn}/out/kernel": array(2, 8, 16), f"{block}/{attn}/out/bias": array(16)}
        flat |= {f"{block}/{mlp}/Dense_0/kernel": array(16, 24), f"{block}/{mlp}/Dense_0/bias": array(24)}
        flat |= {f"{block}/{mlp}/Dense_1/kernel": array(24, 16), f"{block}/{mlp}/Dense_1/bias": array(16)}
    return flat | {"head/kernel": array(16, 10), "head/bias": array(10)}


def as_timm(flat):
    """The same ViT by timm's names and in PyTorch's layouts."""
    timm = {
        "cls_token": flat["cls"],
        "pos_embed": np.concatenate([np.full((1, 1, 16), 9, np.float32), flat["pos_embedding"]], axis=1),
        "patch_embed.proj.weight": flat["embedding/kernel"].transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": flat["embedding/bias"],
        "norm.weight": flat["Transformer/encoder_norm/scale"],
        "norm.bias": flat["Transformer/encoder_norm/bias"],
        "head.weight": flat["head/kernel"].T,
        "head.bias": flat["head/bias"],
    }
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        attn, mlp = f"{block}/MultiHeadDotProductAttention_0", f"{block}/MlpBlock_0"
        parts = [flat[f"{attn}/{n}/kernel"].reshape(16, 16).T for n in ("query", "key", "value")]
        biases = [flat[f"{attn}/{n}/bias"].reshape(16) for n in ("query", "key", "value")]
        timm |= {
            f"blocks.{i}.norm1.weight": flat[f"{block}/LayerNorm_0/scale"],
            f"blocks.{i}.norm1.bias": flat[f"{block}/LayerNorm_0/bias"],
            f"blocks.{i}.norm2.weight": flat[f"{block}/LayerNorm_1/scale"],
            f"blocks.{i}.norm2.bias": flat[f"{block}/LayerNorm_1/bias"],
            f"blocks.{i}.attn.qkv.weight": np.concatenate(parts),
            f"blocks.{i}.attn.qkv.bias": np.concatenate(biases),
            f"blocks.{i}.attn.proj.weight": flat[f"{attn}/out/kernel"].reshape(16, 16).T,
            f"blocks.{i}.attn.proj.bias": flat[f"{attn}/out/bias"],
            f"blocks.{i}.mlp.fc1.weight": flat[f"{mlp}/Dense_0/kernel"].T,
            f"blocks.{i}.mlp.fc1.bias": flat[f"{mlp}/Dense_0/bias"],
            f"blocks.{i}.mlp.fc2.weight": flat[f"{mlp}/Dense_1/kernel"].T,
            f"blocks.{i}.mlp.fc2.bias": flat[f"{mlp}/Dense_1/bias"],
        }
    return timm


def test_imagenet_weights_by_every_name():
    params = random_params(CONFIG)
    flat = image_vit("big_vision")
    imported = from_imagenet(flat, CONFIG, params)
    assert imported.unused == ["head/bias", "head/kernel"]
    assert all(("recurrent" in n) or ("temporal" in n) or n.startswith("head/") for n in imported.fresh)
    assert len(imported.fresh) == 2 * 14 + 4
    assert_same(imported.params["head"], params["head"])
    assert_same(imported.params["layers"]["1"]["recurrent"], params["layers"]["1"]["recurrent"])
    kernel = flat["Transformer/encoderblock_1/MultiHeadDotProductAttention_0/value/kernel"]
    np.testing.assert_array_equal(
        imported.params["layers"]["1"]["attn"]["v_proj"]["kernel"], kernel.reshape(16, 16)
    )
    prefixed = {f"params/{name}": array for name, array in flat.items()}
    assert_same(from_imagenet(prefixed, CONFIG, params).params, imported.params)
    timm = from_imagenet(as_timm(flat), CONFIG, params)
    assert timm.unused == ["head.bias", "head.weight"]
    assert_same(timm.params, imported.params)
    original = from_imagenet(image_vit("original"), CONFIG, params).params
    np.testing.assert_array_equal(
        original["tokenizer"]["positions"],
        image_vit("original")["Transformer/posembed_input/pos_embedding"][0, 1:],
    )


def test_imagenet_pixels_can_be_rescaled():
    """What the ViT made of 2 x - 1, TRecViT makes of x."""
    params, x = random_params(CONFIG), video(1, 2, (8, 8))
    flat = image_vit("big_vision")
    plain, folded = (from_imagenet(flat, CONFIG, params, zero_centred=flag).params for flag in (False, True))
    expected = tokenize(CONFIG, TRecViTRuntime(), plain, 2 * x - 1)
    np.testing.assert_allclose(tokenize(CONFIG, TRecViTRuntime(), folded, x), expected, atol=2e-5)


def test_imagenet_weights_fit_other_resolutions_and_models_without_class_token():
    config = dataclasses.replace(CONFIG, image_size=(8, 16), pool="gap")
    imported = from_imagenet(image_vit("original"), config, random_params(config))
    assert imported.params["tokenizer"]["positions"].shape == (8, 16)
    assert imported.unused == ["head/bias", "head/kernel", "tokenizer/cls"]
    wide = dataclasses.replace(CONFIG, mlp_size=28)
    with pytest.raises(ValueError, match=r"not the spatial half of this TRecViTConfig:\nwrong shape \(6\)"):
        from_imagenet(image_vit("big_vision"), wide, random_params(wide))
    with pytest.raises(ValueError, match="not the weights of an image ViT"):
        from_imagenet({"conv1.weight": np.ones(3)}, CONFIG, random_params(CONFIG))
    assert jnp.asarray(imported.params["norm"]["scale"]).dtype == jnp.float32
