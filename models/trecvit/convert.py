"""Released TRecViT checkpoints (github.com/google-deepmind/trecvit, .npz) in and out.

The names come from the parameter table (`ParamSpec.official`); every array is a reshape of ours. A file holds
'/'-joined names without a "params" prefix: tokenizer/, encoder/ and decoder/. `trecvit_B_k400.npz` is a
classifier; of `trecvit_B_mae.npz` the decoder's names were never published, so only tokenizer and encoder are
read and the rest is reported.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from models.common.official import (
    Arrays,
    naming_file,
    read_exactly,
    read_npz,
    save_npz,
    shape_of,
    square_grid,
    write_leaves,
)
from models.common.params import ParamSpec, check_params, flatten_names, unflatten_names
from models.common.shapes import Params
from models.common.vit import Grid, resize_positions
from models.trecvit.config import TRecViTConfig
from models.trecvit.parameters import param_specs

_POSITIONS = "tokenizer/pos_embedding"
_ENCODER = ("tokenizer/", "encoder/")


def from_official(flat: Arrays, config: TRecViTConfig) -> Params:
    """Our parameters from an official checkpoint.

    Args:
      flat: official name -> array of any floating dtype.
      config: the architecture, with head "classes" or "none"; see `config_from_official`.

    Returns:
      Canonical tree in float32.

    Raises:
      ValueError: names or shapes that are not this config's, all differences listed; an array of integers; a
        head that no official file has (use `encoder_from_official`).
    """
    specs = _official_specs(config)
    return read_exactly(specs, flat, "the arrays are not those of this TRecViTConfig (official names)")


def to_official(
    params: Params, config: TRecViTConfig, dtype: DTypeLike = jnp.float32
) -> dict[str, np.ndarray]:
    """Official arrays from our parameters; the inverse of `from_official`.

    Raises:
      ValueError: parameters that are not this config's (differences listed), or a head that no official file
        has.
    """
    specs = _official_specs(config)
    check_params(specs, params, config)
    return write_leaves(specs, params, dtype)


def _official_specs(config: TRecViTConfig) -> dict[str, ParamSpec]:
    if config.head not in ("classes", "none"):
        raise ValueError(
            f"head = {config.head!r}; official files know 'classes' only. Use `encoder_from_official`"
            " to take their encoder"
        )
    return param_specs(config)


def encoder_from_official(
    flat: Arrays, config: TRecViTConfig, params: Params, grid: Grid | None = None
) -> tuple[Params, list[str]]:
    """The encoder of a checkpoint under a head of our own: for fine-tuning, probing, and the MAE file.

    Args:
      flat: official name -> array; tokenizer/* and encoder/* must be this config's, up to the size of the
        table of positions, which is resized.
      config: the architecture, with any head, classes and image size.
      params: canonical tree of `config`; the head is taken from it.
      grid: patches (along height, width) the file was trained with; None = a square.

    Returns:
      (parameters, names of the file that were not used).

    Raises:
      ValueError: missing, unexpected or mis-shaped encoder arrays, all listed.
    """
    check_params(param_specs(config), params, config)
    specs = {name: spec for name, spec in param_specs(config).items() if spec.official.startswith(_ENCODER)}
    found = {name: array for name, array in flat.items() if name.startswith(_ENCODER)}
    if config.positions == "learn" and _POSITIONS in found:
        found[_POSITIONS] = _resized(found[_POSITIONS], grid, config)
    encoder = read_exactly(specs, found, "the arrays are not the encoder of this TRecViTConfig")
    loaded = flatten_names(params) | flatten_names(encoder)
    return unflatten_names(loaded), sorted(set(flat) - set(found))


def _resized(table: np.ndarray, grid: Grid | None, config: TRecViTConfig) -> np.ndarray:
    """A stored table [1, P, D] for the config's grid."""
    if table.ndim != 3:
        return table  # the comparison of shapes will say so
    old = grid or square_grid(table.shape[1], _POSITIONS)
    return np.asarray(resize_positions(jnp.asarray(table[0], jnp.float32), old, config.grid))[None]


def config_from_official(flat: Arrays, grid: Grid | None = None, **options: Any) -> TRecViTConfig:
    """The architecture of a checkpoint, read off its shapes.

    Args:
      flat: official name -> array.
      grid: patches along height and width; None = a square. Needed for sincos2d positions, which leave no
        trace in a file.
      options: fields that shapes do not tell (frames_per_clip, dropout, min_rad, ...) or that override them.

    Raises:
      ValueError: an array that every checkpoint has is missing.
    """
    block, spatial = "encoder/residualblock_00", "encoder/encoderblock_0"
    patch = _shape(flat, "tokenizer/embedding/kernel", 5)
    width, lru_width = _shape(flat, f"{block}/recurrent_block/linear_x/kernel", 2)
    learnt = _POSITIONS in flat
    if grid is None:
        if not learnt:
            raise ValueError(f"no {_POSITIONS}: give grid, the patches along height and width")
        grid = square_grid(_shape(flat, _POSITIONS, 3)[1], _POSITIONS)
    fields: dict[str, Any] = {
        "patch_size": patch[1:3],
        "image_size": (grid[0] * patch[1], grid[1] * patch[2]),
        "width": width,
        "depth": _depth(flat),
        "mlp_size": _shape(flat, f"{spatial}/MlpBlock_0/Dense_0/kernel", 2)[1],
        "num_heads": _shape(flat, f"{spatial}/MultiHeadDotProductAttention_0/query/kernel", 3)[1],
        "state_multiplier": lru_width // width,
        "conv_width": _shape(flat, f"{block}/recurrent_block/conv_1d/w", 2)[0],
        "positions": "learn" if learnt else "sincos2d",
        "pool": "tok" if "tokenizer/cls" in flat else "gap",
    }
    mlp_name = f"{block}/mlp_block/ffw_down/kernel"
    if mlp_name in flat:
        fields |= {"use_mlp": True, "channel_mlp_size": _shape(flat, mlp_name, 2)[0]}
    if "decoder/cls_head/kernel" in flat:
        rep, classes = _shape(flat, "decoder/cls_head/kernel", 2)
        fields |= {"rep_size": rep, "num_classes": classes}
    else:
        fields["head"] = "none"
    return TRecViTConfig(**fields | options)


def _shape(flat: Arrays, name: str, ndim: int) -> tuple[int, ...]:
    return shape_of(flat, name, ndim, "TRecViT")


def _depth(flat: Arrays) -> int:
    numbers = {name.split("/")[1] for name in flat if name.startswith("encoder/encoderblock_")}
    return len(numbers)


def load_official(
    path: str | Path, config: TRecViTConfig | None = None, **options: Any
) -> tuple[TRecViTConfig, Params]:
    """Loads a classifier in the official format.

    Args:
      path: an .npz file.
      config: None = read off the arrays' shapes.
      options: for `config_from_official`, without a config.

    Returns:
      (config, parameters in float32).

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged or refused file, or arrays that are not the config's (differences listed).
    """
    flat = read_npz(path)
    with naming_file(path):
        config = config or config_from_official(flat, **options)
        return config, from_official(flat, config)


def save_official(path: str | Path, params: Params, config: TRecViTConfig) -> None:
    """Writes an .npz file as the official code (and `load_official`) reads it."""
    save_npz(path, to_official(params, config))
