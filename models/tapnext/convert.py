"""Released TAPNext checkpoints in and out: .npz of the JAX code, .pt / .ckpt of the PyTorch port.

Two layouts of the same arrays. "npz": '/'-joined paths, as in the parameter table (`ParamSpec.official`),
every array a reshape of ours; 448 of them for TAPNext-B. "torch": a state dict with dotted names and
PyTorch's [out, in] matrices, 400 parameters and the buffer `query_pos_embed`, a function of the sizes. Both
directions are exact. Files are read without PyTorch, and nothing in them is executed.
"""

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

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
from models.common.params import check_params, flatten_names
from models.common.shapes import Params
from models.common.torch_pickle import read_tensors
from models.common.vit import Grid
from models.tapnext.config import Numerics, TAPNextConfig
from models.tapnext.parameters import HEADS, param_specs
from models.tapnext.torch_layout import (
    BUFFER,
    is_torch,
    npz_to_torch,
    query_pos_embed,
    stripped,
    torch_to_npz,
)

Layout = Literal["npz", "torch"]

_BLOCK = "backbone/Transformer/encoderblock_"


def from_official(flat: Arrays, config: TAPNextConfig | None = None) -> Params:
    """Our parameters from a checkpoint of either layout.

    Args:
      flat: official name -> array of any floating dtype. PyTorch's names may be prefixed "tapnext.", and the
        buffer `query_pos_embed` may be missing.
      config: the architecture; None: read off the shapes (`config_from_official`).

    Returns:
      Canonical tree in float32.

    Raises:
      ValueError: names or shapes that are not this config's, all differences listed by the names of the .npz
        layout; an array of integers.
    """
    flat = _as_npz(flat)
    config = config or config_from_official(flat, grid=_any_grid(flat))
    refusal = "the arrays are not those of this TAPNextConfig (names of the npz)"
    return read_exactly(param_specs(config), flat, refusal)


def to_official(
    params: Params, config: TAPNextConfig | None = None, layout: Layout = "npz", buffer: bool = True
) -> dict[str, np.ndarray]:
    """Official arrays, float32, from our parameters; the inverse of `from_official`.

    Args:
      config: the architecture; None: read off the shapes, which needs a square grid of patches only for
        PyTorch's buffer.
      layout: "npz" or "torch".
      buffer: of "torch": add `query_pos_embed`, which the official module insists on (201 MB for B).

    Raises:
      ValueError: parameters that are not this config's (differences listed), or an unknown layout.
    """
    if layout not in ("npz", "torch"):
        raise ValueError(f"layout = {layout!r}; it must be 'npz' or 'torch'")
    config = config or config_from_params(params, square=layout == "torch" and buffer)
    check_params(param_specs(config), params, config)
    flat = write_leaves(param_specs(config), params)
    if layout == "npz":
        return flat
    return npz_to_torch(flat) | ({BUFFER: query_pos_embed(config)} if buffer else {})


def config_from_official(flat: Arrays, grid: Grid | None = None, **options: Any) -> TAPNextConfig:
    """The architecture of a checkpoint, read off its shapes.

    The number of heads is that of the gates' diagonal blocks: PyTorch's attention tells it nowhere else.

    Args:
      flat: official name -> array, of either layout.
      grid: patches along height and width of the native image; None = a square.
      options: fields that shapes do not tell (numerics, ...), or that override them. Without `numerics` it is
        the layout's.

    Raises:
      ValueError: an array that every checkpoint has is missing or has another number of axes.
    """
    numerics: Numerics = "torch" if is_torch(flat) else "jax"
    flat = _as_npz(flat)
    first = f"{_BLOCK}0"
    patch = _shape(flat, "backbone/embedding/kernel", 5)
    positions = "backbone/pos_embedding"
    rows, columns = grid or square_grid(_shape(flat, positions, 3)[1], positions)
    image = (rows * patch[1], columns * patch[2])
    gates = _shape(flat, f"{first}/ssm_block/recurrent_block/rg_lru/a_gate/w", 3)
    head_width, logits = _shape(flat, f"{HEADS[0]}/layers_6/kernel", 2)
    fields: dict[str, Any] = {
        "image_size": image,
        "patch_size": patch[1:3],
        "width": patch[-1],
        "depth": _depth(flat),
        "mlp_size": _shape(flat, f"{first}/vit_block/MlpBlock_0/Dense_0/kernel", 2)[1],
        "num_heads": gates[0],
        "lru_width": _shape(flat, f"{first}/ssm_block/recurrent_block/linear_x/kernel", 2)[1],
        "conv_width": _shape(flat, f"{first}/ssm_block/recurrent_block/conv_1d/w", 2)[0],
        "head_width": head_width,
        "coordinate_bins": image if logits == sum(image) else (logits // 2, logits - logits // 2),
        "numerics": numerics,
    }
    return TAPNextConfig(**fields | options)


def config_from_params(params: Params, square: bool = False, **options: Any) -> TAPNextConfig:
    """The architecture of a canonical tree, read off its shapes.

    Args:
      square: the grid of patches is a square; otherwise it is taken as one row, which is enough for names and
        shapes.
      options: further fields, or others than the shapes'. The patches are taken as square.

    Raises:
      ValueError: a tree that lacks a group, or patches that are no square.
    """
    flat = flatten_names(params)
    layer = "layers/0/"
    names = {
        "patch": "image/patch/kernel",
        "positions": "image/positions",
        "gate": f"{layer}recurrent/rglru/a_gate/kernel",
        "conv": f"{layer}recurrent/conv/kernel",
        "mlp": f"{layer}mlp/up/kernel",
        "head": f"{HEADS[0]}/out/kernel",
    }
    if missing := sorted(set(names.values()) - set(flat)):
        raise ValueError(f"not the parameters of a TAPNext: {missing} missing")
    shapes = {key: tuple(flat[name].shape) for key, name in names.items()}
    side = square_grid(shapes["patch"][0] // 3, "the pixels of a patch")[0]
    patches = shapes["positions"][0]
    grid = square_grid(patches, "image/positions") if square else (1, patches)
    image = (grid[0] * side, grid[1] * side)
    head_width, logits = shapes["head"]
    fields: dict[str, Any] = {
        "image_size": image,
        "patch_size": (side, side),
        "width": shapes["patch"][1],
        "depth": len(params["layers"]),
        "mlp_size": shapes["mlp"][1],
        "num_heads": shapes["gate"][0],
        "lru_width": shapes["conv"][1],
        "conv_width": shapes["conv"][0],
        "head_width": head_width,
        "coordinate_bins": image if logits == sum(image) else (logits // 2, logits - logits // 2),
    }
    return TAPNextConfig(**fields | options)


def load_official(
    path: str | Path, config: TAPNextConfig | None = None, **options: Any
) -> tuple[TAPNextConfig, Params]:
    """Loads a released checkpoint, or any file in their formats.

    Args:
      path: an .npz file by that suffix; any other (.pt, .ckpt) must be in PyTorch's zip format, of which only
        the "state_dict" is read if there is one.
      config: None = read off the arrays' shapes.
      options: for `config_from_official`, without a config.

    Returns:
      (config, parameters in float32).

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged or refused file, or arrays that are not the config's (differences listed).
    """
    flat = read_official(path)
    with naming_file(path):
        config = config or config_from_official(flat, **options)
        return config, from_official(flat, config)


def read_official(path: str | Path) -> dict[str, np.ndarray]:
    """Name -> array of a file of either format, as they are stored.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged or refused file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".npz":
        return read_npz(path)
    return stripped(read_tensors(path, inside=("state_dict",)))


def save_official(path: str | Path, params: Params, config: TAPNextConfig) -> None:
    """Writes an .npz file as the official code (and `load_official`) reads it."""
    save_npz(path, to_official(params, config))


def _as_npz(flat: Arrays) -> Arrays:
    return torch_to_npz(stripped(flat)) if is_torch(flat) else flat


def _any_grid(flat: Arrays) -> Grid:
    """One row of patches: where only names and shapes matter."""
    return 1, _shape(flat, "backbone/pos_embedding", 3)[1]


def _depth(flat: Arrays) -> int:
    return len({match[1] for name in flat if (match := re.match(f"{_BLOCK}([0-9]+)/", name))})


def _shape(flat: Arrays, name: str, ndim: int) -> tuple[int, ...]:
    return shape_of(flat, name, ndim, "TAPNext")
