"""PyTorch's names and layouts of a TAPNext checkpoint, and those of the .npz (sheet, section 3).

A rule per kind of array: its name on either side and how its axes move. The rest of a name (which layer,
which head) is carried over.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from models.common.official import Arrays
from models.common.vit import sincos_positions
from models.tapnext.config import TAPNextConfig

BUFFER = "query_pos_embed"
PREFIX = "tapnext."

_Move = Callable[[np.ndarray], np.ndarray]


class _Rule(NamedTuple):
    """{} stands for the same text on both sides; `forth` moves the npz's axes, `back` PyTorch's."""

    npz: str
    torch: str
    forth: _Move = np.asarray
    back: _Move = np.asarray


def _transposed(npz: str, torch: str) -> _Rule:
    return _Rule(f"{npz}/kernel", f"{torch}.weight", np.transpose, np.transpose)


def _linear(npz: str, torch: str) -> list[_Rule]:
    return [_transposed(npz, torch), _Rule(f"{npz}/bias", f"{torch}.bias")]


def _norm(npz: str, torch: str) -> list[_Rule]:
    return [_Rule(f"{npz}/scale", f"{torch}.weight"), _Rule(f"{npz}/bias", f"{torch}.bias")]


def _patch_forth(kernel: np.ndarray) -> np.ndarray:
    return kernel[0].transpose(3, 2, 0, 1)


def _patch_back(weight: np.ndarray) -> np.ndarray:
    return weight.transpose(2, 3, 1, 0)[None]


_BLOCK, _BLOCKS = "backbone/Transformer/encoderblock_{}", "blocks.{}"
_SSM, _SSMS = f"{_BLOCK}/ssm_block", f"{_BLOCKS}.ssm_block"
_VIT, _VITS = f"{_BLOCK}/vit_block", f"{_BLOCKS}.vit_block"
_ATTENTION, _ATTENTIONS = f"{_VIT}/MultiHeadDotProductAttention_0", f"{_VITS}.self_attention"
_INNER, _INNERS = f"{_SSM}/recurrent_block", f"{_SSMS}.recurrent_block"

_RULES = [
    _Rule("backbone/embedding/kernel", "lin_proj.weight", _patch_forth, _patch_back),
    _Rule("backbone/embedding/bias", "lin_proj.bias"),
    _Rule("backbone/pos_embedding", "image_pos_emb"),
    *(_Rule(f"backbone/{name}", name) for name in ("mask_token", "point_query_token", "unknown_token")),
    *_norm("backbone/Transformer/encoder_norm", "encoder_norm"),
    _Rule(f"{_SSM}/temporal_pre_norm/scale", f"{_SSMS}.temporal_pre_norm.scale"),
    _Rule(f"{_SSM}/channel_pre_norm/scale", f"{_SSMS}.channel_pre_norm.scale"),
    *(rule for n in ("x", "y", "out") for rule in _linear(f"{_INNER}/linear_{n}", f"{_INNERS}.linear_{n}")),
    *(_Rule(f"{_INNER}/conv_1d/{n}", f"{_INNERS}.conv_1d.{n}") for n in "wb"),
    _Rule(f"{_INNER}/rg_lru/a_param", f"{_INNERS}.rg_lru.a_param"),
    *(
        _Rule(f"{_INNER}/rg_lru/{gate}/{n}", f"{_INNERS}.rg_lru.{gate}.{n}")
        for gate in ("input_gate", "a_gate")
        for n in "wb"
    ),
    *(_Rule(f"{_SSM}/mlp_block/ffw_up/{n}", f"{_SSMS}.mlp_block.ffw_up.{n}") for n in "wb"),
    *_linear(f"{_SSM}/mlp_block/ffw_down", f"{_SSMS}.mlp_block.ffw_down"),
    *_norm(f"{_VIT}/LayerNorm_0", f"{_VITS}.ln_1"),
    *_norm(f"{_VIT}/LayerNorm_1", f"{_VITS}.ln_2"),
    *_linear(f"{_VIT}/MlpBlock_0/Dense_0", f"{_VITS}.mlp.0"),
    *_linear(f"{_VIT}/MlpBlock_0/Dense_1", f"{_VITS}.mlp.3"),
    *(rule for n in (0, 3, 6) for rule in _linear(f"{{}}_head/layers_{n}", f"{{}}_head.{n}")),
    *(rule for n in (1, 4) for rule in _norm(f"{{}}_head/layers_{n}", f"{{}}_head.{n}")),
]
_PROJECTIONS = ("query", "key", "value")


def is_torch(flat: Arrays) -> bool:
    """Whether the names are PyTorch's: they have dots where the .npz has slashes."""
    return any("." in name for name in flat)


def stripped(flat: Arrays) -> dict[str, np.ndarray]:
    """PyTorch names without the prefix "tapnext.", if all have it."""
    if flat and all(name.startswith(PREFIX) for name in flat):
        return {name.removeprefix(PREFIX): array for name, array in flat.items()}
    return dict(flat)


def npz_to_torch(flat: Arrays) -> dict[str, np.ndarray]:
    """The 400 parameters of PyTorch (for B) from the 448 arrays of an .npz, same dtype, contiguous.

    Raises:
      ValueError: a name that no .npz has.
    """
    rules = [(_pattern(rule.npz), rule.torch, rule.forth) for rule in _RULES]
    arrays: dict[str, np.ndarray] = {}
    for name, array in flat.items():
        if match := re.fullmatch(f"{_pattern(_ATTENTION).pattern}/(query|key|value|out)/(kernel|bias)", name):
            _attention_forth(match, flat, arrays)
        else:
            target, moved = _moved(rules, name, array)
            arrays[target] = moved
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _attention_forth(match: re.Match[str], flat: Arrays, arrays: dict[str, np.ndarray]) -> None:
    """One array of the output projection, or at its query part all three of the input's."""
    layer, part, leaf = match.groups()
    npz, torch = _ATTENTION.format(layer), _ATTENTIONS.format(layer)
    weight = {"kernel": "weight", "bias": "bias"}[leaf]
    if part == "out":
        array = flat[match[0]]
        out = array.reshape(-1, array.shape[-1]).T if leaf == "kernel" else array
        arrays[f"{torch}.out_proj.{weight}"] = out
    elif part == "query":
        parts = [flat[f"{npz}/{name}/{leaf}"] for name in _PROJECTIONS]
        moved = [x.reshape(len(x), -1).T if leaf == "kernel" else x.reshape(-1) for x in parts]
        arrays[f"{torch}.in_proj_{weight}"] = np.concatenate(moved)


def torch_to_npz(flat: Arrays) -> dict[str, np.ndarray]:
    """Inverse of `npz_to_torch`; the buffer `query_pos_embed` is dropped.

    The heads that attention is split into are as many as the gates' diagonal blocks.

    Raises:
      ValueError: a name that no TAPNext of PyTorch has, or attention without its layer's gates.
    """
    rules = [(_pattern(rule.torch), rule.npz, rule.back) for rule in _RULES]
    attention = f"{_pattern(_ATTENTIONS).pattern}\\.(in_proj_|out_proj\\.)(weight|bias)"
    arrays: dict[str, np.ndarray] = {}
    for name, array in flat.items():
        if name == BUFFER:
            continue
        if match := re.fullmatch(attention, name):
            arrays |= _attention_back(match, array, _num_heads(flat, match[1]))
        else:
            target, moved = _moved(rules, name, array)
            arrays[target] = moved
    return arrays


def _num_heads(flat: Arrays, layer: str) -> int:
    name = f"{_INNERS.format(layer)}.rg_lru.a_gate.w"
    if name not in flat:
        raise ValueError(f"no array {name!r}, whose first axis says how many heads attention has")
    return flat[name].shape[0]


def _attention_back(match: re.Match[str], array: np.ndarray, heads: int) -> dict[str, np.ndarray]:
    layer, projection, leaf = match.groups()
    npz = _ATTENTION.format(layer)
    width = array.shape[-1] if leaf == "weight" else array.shape[0] // (3 if projection == "in_proj_" else 1)
    if width % heads:
        raise ValueError(f"{match[0]}: {width} channels do not split into the {heads} heads of the gates")
    if projection == "out_proj.":
        if leaf == "bias":
            return {f"{npz}/out/bias": array}
        return {f"{npz}/out/kernel": array.T.reshape(heads, -1, array.shape[0])}
    if array.shape[0] != 3 * width:
        raise ValueError(
            f"{match[0]} has shape {array.shape}; it must hold query, key and value, 3 x {width}"
        )
    parts = dict(zip(_PROJECTIONS, np.split(array, 3), strict=True))
    if leaf == "bias":
        return {f"{npz}/{name}/bias": part.reshape(heads, -1) for name, part in parts.items()}
    return {f"{npz}/{name}/kernel": part.T.reshape(width, heads, -1) for name, part in parts.items()}


def query_pos_embed(config: TAPNextConfig) -> np.ndarray:
    """PyTorch's buffer [1, H W, D]: sine and cosine positions of all pixels (which we never make)."""
    height, width = (size * config.query_scale for size in config.image_size)
    return np.asarray(sincos_positions((height, width), config.width))[None]


def _pattern(template: str) -> re.Pattern[str]:
    """{} matches a layer's number or a word."""
    return re.compile(re.escape(template).replace(re.escape("{}"), "([0-9a-z]+)"))


def _moved(
    rules: list[tuple[re.Pattern[str], str, _Move]], name: str, array: np.ndarray
) -> tuple[str, np.ndarray]:
    for pattern, target, move in rules:
        if match := pattern.fullmatch(name):
            return target.format(*match.groups()), move(array)
    raise ValueError(f"array {name!r} (shape {array.shape}) is of no TAPNext checkpoint")
