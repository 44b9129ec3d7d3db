"""TRecViT: a causal video model of gated linear recurrences over time and attention over space."""

from models.common.params import cast_params, decay_mask
from models.trecvit import convert
from models.trecvit.config import SIZES, MAEConfig, TRecViTConfig, TRecViTRuntime
from models.trecvit.heads import ClipOutput, split_clips
from models.trecvit.imagenet import Imported, from_imagenet
from models.trecvit.inference import prepare_params
from models.trecvit.mae import (
    CHANGE_UNIT,
    MAEState,
    apply_mae,
    change_targets,
    draw_kept_tubes,
    init_mae_params,
    init_mae_state,
    mae_param_axes,
    mae_param_specs,
    masked_patches,
    pixel_targets,
)
from models.trecvit.model import TRecViT, apply
from models.trecvit.parameters import (
    count_params,
    flops_per_clip,
    head_mask,
    init_params,
    param_axes,
    param_specs,
    resize_params,
)
from models.trecvit.state import TRecViTState, init_state

__all__ = [
    "CHANGE_UNIT",
    "SIZES",
    "ClipOutput",
    "Imported",
    "MAEConfig",
    "MAEState",
    "TRecViT",
    "TRecViTConfig",
    "TRecViTRuntime",
    "TRecViTState",
    "apply",
    "apply_mae",
    "cast_params",
    "change_targets",
    "convert",
    "count_params",
    "decay_mask",
    "draw_kept_tubes",
    "flops_per_clip",
    "from_imagenet",
    "head_mask",
    "init_mae_params",
    "init_mae_state",
    "init_params",
    "init_state",
    "mae_param_axes",
    "mae_param_specs",
    "masked_patches",
    "param_axes",
    "param_specs",
    "pixel_targets",
    "prepare_params",
    "resize_params",
    "split_clips",
]
