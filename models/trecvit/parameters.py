"""Every parameter of a TRecViT in one table: shape, logical axes, initial value, official name.

Initialisation, sharding axes, weight decay, parameter counts and the converter are all read off this table,
so they cannot disagree.
"""

import dataclasses
import math

from models.common.params import (
    ZEROS,
    Init,
    ParamSpec,
    count,
    grouped,
    initialize,
    lecun_normal,
    linear_specs,
    logical_axes,
    mask_names,
    norm_specs,
)
from models.common.rglru import residual_block_specs
from models.common.shapes import Key, Params
from models.common.vit import Grid, patch_specs, position_spec, resize_positions, vit_block_specs
from models.trecvit.config import TRecViTConfig


def layer_specs(config: TRecViTConfig, layer: int) -> dict[str, ParamSpec]:
    """The parameters of one layer by flat name: recurrent residual block, then ViT block.

    The official names number residual blocks with two digits and ViT blocks without padding.
    """
    return residual_block_specs(
        width=config.width,
        recurrent_width=config.recurrent_width,
        num_blocks=config.num_heads,
        taps=config.conv_width,
        num_layers=config.depth,
        min_rad=config.min_rad,
        channel_mlp_size=config.channel_mlp,
        official=f"encoder/residualblock_{layer:02d}/",
    ) | vit_block_specs(config.width, config.mlp_size, config.num_heads, f"encoder/encoderblock_{layer}/")


def _tokenizer_specs(config: TRecViTConfig) -> dict[str, ParamSpec]:
    width = config.width
    specs = grouped({"tokenizer/patch": patch_specs(config.patch_size, width, "tokenizer/embedding")})
    if config.positions == "learn":
        specs["tokenizer/positions"] = position_spec(config.grid, width, "tokenizer/pos_embedding")
    if config.pool == "tok":
        specs["tokenizer/cls"] = ParamSpec((width,), ("norm",), ZEROS, "tokenizer/cls", (1, 1, width))
    return specs


def _head_specs(config: TRecViTConfig) -> dict[str, ParamSpec]:
    """Heads other than "classes" are not in any official file: their official names are empty."""
    width, rep, classes = config.width, config.rep_size, config.num_classes

    def dense(size_in: int, official: str) -> dict[str, ParamSpec]:
        specs = linear_specs(size_in, classes, ("embed", "vocab"), lecun_normal(size_in), official)
        return specs if official else own(specs)

    match config.head:
        case "none":
            return {}
        case "dense":
            return grouped({"head/classes": dense(width, "")})
        case "classes":
            pre = linear_specs(width, rep, ("embed", "mlp"), lecun_normal(width), "decoder/pre_logits")
            return grouped({"head/pre_logits": pre, "head/classes": dense(rep, "decoder/cls_head")})
        case "readout":
            pool = _readout_specs(config)
            return grouped({"head": own(pool), "head/classes": dense(width, "")})


def _readout_specs(config: TRecViTConfig) -> dict[str, ParamSpec]:
    width, size = config.width, config.mlp_size
    block = vit_block_specs(width, size, config.num_heads)
    query = Init("normal", 0.02)
    return {
        "query": ParamSpec((width,), ("norm",), query, ""),
        **{name.replace("attn_norm", "norm"): spec for name, spec in block.items()},
        **grouped({"final_norm": norm_specs(width, "")}),
    }


def own(specs: dict[str, ParamSpec]) -> dict[str, ParamSpec]:
    """The same parameters without official names."""
    return {name: dataclasses.replace(spec, official="", official_shape=None) for name, spec in specs.items()}


def param_specs(config: TRecViTConfig) -> dict[str, ParamSpec]:
    """All parameters of the model by flat canonical name, in the order of the forward pass."""
    specs = _tokenizer_specs(config)
    for layer in range(config.depth):
        specs |= grouped({f"layers/{layer}": layer_specs(config, layer)})
    specs |= grouped({"norm": norm_specs(config.width, "encoder/encoder_norm")})
    return specs | _head_specs(config)


def init_params(config: TRecViTConfig, key: Key) -> Params:
    """Initial parameters, float32, canonical per-layer names.

    RG-LRU: squared radius uniform in [min_rad^2, 0.999^2]; gate kernels N(0, 1/E); other kernels of the
    recurrent block N(0, 1/D), the output's N(0, 2/(L E)), the convolution's N(0, 0.01/J). ViT blocks: Xavier
    uniform, MLP biases N(0, 1e-12). Patch embedding and classifier: LeCun normal; positions N(0, 1/D); class
    token and other biases 0. Works under `jax.jit` with out_shardings and under `jax.eval_shape`.
    """
    return initialize(param_specs(config), key)


def param_axes(config: TRecViTConfig) -> Params:
    """Tree like the parameters whose leaves are tuples of logical axis names (see `ShardingRules`)."""
    return logical_axes(param_specs(config))


def head_mask(params: Params) -> Params:
    """Tree of bool: True for the head's parameters: what a probe of frozen features trains."""
    return mask_names(params, lambda name: name.startswith("head/"))


def count_params(config: TRecViTConfig) -> int:
    """Number of parameters."""
    return count(param_specs(config))


def resize_params(params: Params, config: TRecViTConfig, image_size: Grid) -> tuple[TRecViTConfig, Params]:
    """The same model for frames of another size: learnt positions are resized bicubically.

    Args:
      params: canonical tree of `config`.
      image_size: (height, width) in pixels, of any aspect ratio.

    Returns:
      (config for the new size, parameters).

    Raises:
      ValueError: the patch size does not divide the new size.
    """
    resized = dataclasses.replace(config, image_size=image_size)
    if config.positions != "learn":
        return resized, params
    table = resize_positions(params["tokenizer"]["positions"], config.grid, resized.grid)
    return resized, params | {"tokenizer": params["tokenizer"] | {"positions": table}}


def flops_per_clip(config: TRecViTConfig, frames: int) -> float:
    """Forward FLOPs of one clip, two per multiply-add: matmuls, attention products and convolution.

    Softmax, norms, gates and scan are left out (0.5 % at base size). Training costs three times as much.
    """
    width, inner, tokens = config.width, config.recurrent_width, config.num_tokens
    recurrent = 3 * width * inner + 2 * inner * inner // config.num_heads + config.conv_width * inner
    if config.channel_mlp is not None:
        recurrent += 3 * width * config.channel_mlp
    spatial = 4 * width * width + 2 * width * config.mlp_size + 2 * tokens * width
    frame = config.depth * tokens * (recurrent + spatial)
    frame += config.num_patches * math.prod(config.patch_size) * 3 * width
    match config.head:
        case "classes":
            frame += width * config.rep_size
        case "dense":
            frame += config.num_patches * width * config.num_classes
        case "readout":
            frame += tokens * 2 * width * (width + 1)
    clip = config.rep_size * config.num_classes if config.head == "classes" else 0
    return 2.0 * (frames * frame + clip)
