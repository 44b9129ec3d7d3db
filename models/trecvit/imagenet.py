"""ImageNet ViT weights into the spatial half of a TRecViT, as the paper starts from them.

Patch embedding, positions, class token, ViT blocks and final norm are taken; recurrent blocks and head stay
as they were initialised. Names of big_vision .npz files (and of the original ViT release, whose blocks number
their parts differently) and of timm safetensors are understood.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from models.common.official import Arrays, read_exactly, square_grid
from models.common.params import ParamSpec, check_params, flatten_names, unflatten_names
from models.common.shapes import Params
from models.common.vit import Grid, resize_positions
from models.trecvit.config import TRecViTConfig
from models.trecvit.parameters import param_specs

# What the original release calls the parts of a block -> what big_vision and TRecViT call them.
_OLD_PARTS = {
    "LayerNorm_2": "LayerNorm_1",
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "MlpBlock_3": "MlpBlock_0",
}
_TIMM_TOP = {
    "cls_token": "tokenizer/cls",
    "pos_embed": "tokenizer/pos_embedding",
    "patch_embed.proj.bias": "tokenizer/embedding/bias",
    "norm.weight": "encoder/encoder_norm/scale",
    "norm.bias": "encoder/encoder_norm/bias",
}
_TIMM_BLOCK = {
    "norm1.weight": "LayerNorm_0/scale",
    "norm1.bias": "LayerNorm_0/bias",
    "norm2.weight": "LayerNorm_1/scale",
    "norm2.bias": "LayerNorm_1/bias",
    "attn.proj.bias": "MultiHeadDotProductAttention_0/out/bias",
    "mlp.fc1.bias": "MlpBlock_0/Dense_0/bias",
    "mlp.fc2.bias": "MlpBlock_0/Dense_1/bias",
}


class Imported(NamedTuple):
    """What became of an import.

    Attributes:
      params: canonical tree.
      fresh: our parameters that kept their given values (recurrent blocks, head).
      unused: names of the file that have no place here (classifier, pre-logits).
    """

    params: Params
    fresh: list[str]
    unused: list[str]


def from_imagenet(
    flat: Arrays,
    config: TRecViTConfig,
    params: Params,
    grid: Grid | None = None,
    zero_centred: bool = False,
) -> Imported:
    """Puts the weights of an image ViT into a TRecViT of the same width, depth, MLP and heads.

    Args:
      flat: arrays by big_vision, original or timm names.
      config: the architecture; learnt positions are resized to its grid, without the class token's slot.
      params: canonical tree of `config`, whose recurrent blocks and head are kept.
      grid: patches (along height, width) of the images; None = a square.
      zero_centred: the ViT was trained on pixels in [-1, 1], as big_vision's and augreg's were. TRecViT's are
        in [0, 1]: the change of scale is folded into the patch embedding.

    Raises:
      ValueError: names of no known kind, or arrays missing or of other shapes (all listed).
    """
    check_params(param_specs(config), params, config)
    found, unused = _by_official_names(flat, config)
    specs = {name: spec for name, spec in param_specs(config).items() if _is_spatial(spec)}
    expected = {spec.official for spec in specs.values()}
    table, kernel = found.get("tokenizer/pos_embedding"), found.get("tokenizer/embedding/kernel")
    if table is not None and table.ndim == 3:
        found["tokenizer/pos_embedding"] = _fitted(table, "tokenizer/cls" in found, grid, config)
    bias = found.get("tokenizer/embedding/bias")
    if zero_centred and kernel is not None and bias is not None:
        # W (2 x - 1) + b = (2 W) x + (b - sum W)
        found["tokenizer/embedding/bias"] = bias - kernel.sum(axis=tuple(range(kernel.ndim - 1)))
        found["tokenizer/embedding/kernel"] = 2 * kernel
    ignored = [name for name in ("tokenizer/pos_embedding", "tokenizer/cls") if name not in expected]
    for name in ignored:  # a model with fixed positions, or without a class token
        if found.pop(name, None) is not None:
            unused.append(name)
    spatial = read_exactly(specs, found, "the ViT is not the spatial half of this TRecViTConfig")
    loaded = flatten_names(params) | flatten_names(spatial)
    fresh = [name for name in param_specs(config) if name not in specs]
    return Imported(unflatten_names(loaded), fresh, sorted(unused))


def _is_spatial(spec: ParamSpec) -> bool:
    return spec.official.startswith(("tokenizer/", "encoder/encoderblock_", "encoder/encoder_norm"))


def _fitted(table: np.ndarray, has_cls: bool, grid: Grid | None, config: TRecViTConfig) -> np.ndarray:
    """Positions [1, P, D] of the config's grid; a slot of the class token goes first and is dropped."""
    patches = table.shape[1]
    expected = None if grid is None else grid[0] * grid[1]
    root = round((patches - 1) ** 0.5)
    if patches - 1 == expected or (expected is None and has_cls and root * root == patches - 1):
        table = table[:, 1:]
    old = grid or square_grid(table.shape[1], "tokenizer/pos_embedding")
    return np.asarray(resize_positions(jnp.asarray(table[0], jnp.float32), old, config.grid))[None]


def _by_official_names(flat: Arrays, config: TRecViTConfig) -> tuple[dict[str, np.ndarray], list[str]]:
    """(arrays by the names and layouts of TRecViT checkpoints, names without a place there)."""
    flat = {name.removeprefix("params/"): array for name, array in flat.items()}
    if "embedding/kernel" in flat:
        return _from_big_vision(flat)
    if "patch_embed.proj.weight" in flat:
        return _from_timm(flat, config)
    raise ValueError(
        "no 'embedding/kernel' (big_vision) and no 'patch_embed.proj.weight' (timm) among"
        f" {sorted(flat)[:6]}: not the weights of an image ViT"
    )


def _from_big_vision(flat: Arrays) -> tuple[dict[str, np.ndarray], list[str]]:
    found: dict[str, np.ndarray] = {}
    unused = []
    for name, array in flat.items():
        array = np.asarray(array)
        block = re.fullmatch(r"Transformer/(encoderblock_\d+)/([^/]+)/(.+)", name)
        if block:
            part = _OLD_PARTS.get(block[2], block[2])
            found[f"encoder/{block[1]}/{part}/{block[3]}"] = array
        elif name.startswith("Transformer/encoder_norm/"):
            found[name.replace("Transformer", "encoder")] = array
        elif name == "embedding/kernel":
            found["tokenizer/embedding/kernel"] = array[None]
        elif name == "embedding/bias":
            found["tokenizer/embedding/bias"] = array
        elif name == "cls":
            found["tokenizer/cls"] = array
        elif name.split("/")[-1] == "pos_embedding":
            found["tokenizer/pos_embedding"] = array
        else:
            unused.append(name)
    return found, unused


def _from_timm(flat: Arrays, config: TRecViTConfig) -> tuple[dict[str, np.ndarray], list[str]]:
    """PyTorch layouts: matrices are [out, in]; q, k, v lie in one array; the convolution is [D, 3, h, w]."""
    found: dict[str, np.ndarray] = {}
    unused = []
    for name, array in flat.items():
        array = np.asarray(array)
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if name in _TIMM_TOP:
            found[_TIMM_TOP[name]] = array
        elif name == "patch_embed.proj.weight" and array.ndim == 4:
            found["tokenizer/embedding/kernel"] = array.transpose(2, 3, 1, 0)[None]
        elif block and (parts := _timm_block(block[2], array, config)):
            found |= {f"encoder/encoderblock_{block[1]}/{part}": value for part, value in parts.items()}
        else:
            unused.append(name)
    return found, unused


def _timm_block(name: str, array: np.ndarray, config: TRecViTConfig) -> Mapping[str, np.ndarray]:
    """What one array of a block becomes; {} if it has no place."""
    heads, attn = config.num_heads, "MultiHeadDotProductAttention_0"
    if name in _TIMM_BLOCK:
        return {_TIMM_BLOCK[name]: array}
    match name:
        case "mlp.fc1.weight" | "mlp.fc2.weight":
            return {f"MlpBlock_0/Dense_{int(name[6]) - 1}/kernel": array.T}
        case "attn.proj.weight":
            return {f"{attn}/out/kernel": _split(array.T, 0, heads)}
        case "attn.qkv.weight" | "attn.qkv.bias":
            leaf = "kernel" if name.endswith("weight") else "bias"
            if array.shape[0] % 3:
                raise ValueError(f"{name} has shape {array.shape}; the first axis must hold q, k and v")
            parts = zip(("query", "key", "value"), np.split(array, 3), strict=True)
            return {f"{attn}/{part}/{leaf}": _split(value.T, -1, heads) for part, value in parts}
    return {}


def _split(array: np.ndarray, axis: int, heads: int) -> np.ndarray:
    """One axis as [heads, size]; arrays that do not divide stay, and fail the comparison of shapes."""
    axis %= array.ndim
    if array.shape[axis] % heads:
        return array
    return array.reshape(*array.shape[:axis], heads, -1, *array.shape[axis + 1 :])
