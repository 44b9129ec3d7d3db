"""Every parameter of a TAPNext in one table: shape, logical axes, initial value, official name.

Initialisation, sharding axes, weight decay, parameter counts and the converter are all read off this table,
so they cannot disagree. Official names are those of the released .npz files.
"""

import math

from jax.typing import DTypeLike

from models.common import params as trees
from models.common.params import (
    Init,
    ParamSpec,
    count,
    grouped,
    initialize,
    lecun_normal,
    linear_specs,
    logical_axes,
    norm_specs,
)
from models.common.rglru import residual_block_specs
from models.common.shapes import Key, Params
from models.common.vit import patch_specs, position_spec, vit_block_specs
from models.tapnext.config import TAPNextConfig

HEADS = ("coordinate_head", "visible_head")


def layer_specs(config: TAPNextConfig, layer: int) -> dict[str, ParamSpec]:
    """The parameters of one layer by flat name: recurrent block with its gated MLP, then ViT block."""
    official = f"backbone/Transformer/encoderblock_{layer}"
    return residual_block_specs(
        width=config.width,
        recurrent_width=config.recurrent_width,
        num_blocks=config.num_heads,
        taps=config.conv_width,
        num_layers=config.depth,
        min_rad=config.min_rad,
        channel_mlp_size=config.mlp_size,
        official=f"{official}/ssm_block/",
    ) | vit_block_specs(config.width, config.mlp_size, config.num_heads, f"{official}/vit_block/")


def _token_specs(config: TAPNextConfig) -> dict[str, ParamSpec]:
    width = config.width
    init = Init("normal", width**-0.5)

    def token(name: str, *ones: int) -> ParamSpec:
        return ParamSpec((width,), ("norm",), init, f"backbone/{name}", (*ones, width))

    return {
        **grouped({"image/patch": patch_specs(config.patch_size, width, "backbone/embedding")}),
        "image/positions": position_spec(config.grid, width, "backbone/pos_embedding"),
        "points/query": token("point_query_token", 1, 1, 1),
        "points/mask": token("mask_token", 1, 1, 1),
        "points/unknown": token("unknown_token", 1, 1),
    }


def _head_specs(config: TAPNextConfig, name: str, size_out: int) -> dict[str, ParamSpec]:
    """Dense, norm, GELU, dense, norm, GELU, dense; official layers 2 and 5 are the GELUs."""
    hidden = config.head_width

    def dense(size_in: int, size_out: int, index: int) -> dict[str, ParamSpec]:
        return linear_specs(
            size_in, size_out, ("embed", None), lecun_normal(size_in), f"{name}/layers_{index}"
        )

    return grouped(
        {
            f"{name}/dense_0": dense(config.width, hidden, 0),
            f"{name}/norm_0": norm_specs(hidden, f"{name}/layers_1"),
            f"{name}/dense_1": dense(hidden, hidden, 3),
            f"{name}/norm_1": norm_specs(hidden, f"{name}/layers_4"),
            f"{name}/out": dense(hidden, size_out, 6),
        }
    )


def param_specs(config: TAPNextConfig) -> dict[str, ParamSpec]:
    """All parameters of the model by flat canonical name, in the order of the forward pass."""
    specs = _token_specs(config)
    for layer in range(config.depth):
        specs |= grouped({f"layers/{layer}": layer_specs(config, layer)})
    specs |= grouped({"norm": norm_specs(config.width, "backbone/Transformer/encoder_norm")})
    return specs | _head_specs(config, HEADS[0], sum(config.bins)) | _head_specs(config, HEADS[1], 1)


def init_params(config: TAPNextConfig, key: Key) -> Params:
    """Initial parameters, float32, canonical per-layer names.

    As the official JAX code starts from scratch. Tokens and image positions N(0, 1/D); patch embedding and
    heads LeCun normal; RG-LRU with squared radius uniform in [min_rad^2, 0.999^2], gate kernels N(0, 1/E);
    linear_x, linear_y and ffw_up fan-in normal, linear_out and ffw_down N(0, 2/(L fan_in)), the convolution
    N(0, 0.01/J); ViT kernels Xavier uniform, MLP biases N(0, 1e-12); other biases 0. Works under `jax.jit`
    with out_shardings and under `jax.eval_shape`.
    """
    return initialize(param_specs(config), key)


def param_axes(config: TAPNextConfig) -> Params:
    """Tree like the parameters whose leaves are tuples of logical axis names (see `ShardingRules`)."""
    return logical_axes(param_specs(config))


def cast_params(params: Params, dtype: DTypeLike) -> Params:
    """`models.common.params.cast_params` for all but the heads, which run in float32."""
    body = {name: group for name, group in params.items() if name not in HEADS}
    return trees.cast_params(body, dtype) | {name: params[name] for name in HEADS}


def count_params(config: TAPNextConfig) -> int:
    """Number of parameters."""
    return count(param_specs(config))


def flops_per_clip(
    config: TAPNextConfig, frames: int, queries: int, read_outs: int = 1, patches: int | None = None
) -> float:
    """Forward FLOPs of one clip, two per multiply-add: matmuls, attention products and convolution.

    Softmax, norms, gates and scan are left out. Training costs three times as much.

    Args:
      read_outs: how often the heads run: 1, or depth + 1 with the read-outs of every layer.
      patches: of a frame; None: the native size's.
    """
    width, inner, mlp = config.width, config.recurrent_width, config.mlp_size
    patches = config.num_patches if patches is None else patches
    tokens = patches + queries
    recurrent = 3 * width * inner + 2 * inner * inner // config.num_heads + config.conv_width * inner
    spatial = 4 * width * width + 2 * width * mlp + 2 * tokens * width
    frame = config.depth * tokens * (recurrent + 3 * width * mlp + spatial)
    frame += patches * math.prod(config.patch_size) * 3 * width
    hidden = config.head_width
    heads = 2 * (width * hidden + hidden * hidden) + hidden * (sum(config.bins) + 1)
    return 2.0 * frames * (frame + read_outs * queries * heads)
