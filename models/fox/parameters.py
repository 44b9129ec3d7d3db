"""Every parameter of a Forgetting Transformer in one table: shape, logical axes, initial value, name.

Initialisation, sharding axes, weight decay, parameter counts and the converter are all read off this table,
so they cannot disagree.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from models.common.params import (
    ONES,
    ZEROS,
    Init,
    ParamSpec,
    grouped,
    initialize,
    logical_axes,
    mask_names,
)
from models.common.shapes import Key, Params
from models.common.sharding import AxisNames
from models.fox.config import FoxConfig

FIXED_GATE = "fgate_fixed"


@dataclasses.dataclass(frozen=True)
class ScaledNormal:
    """N(0, std^2). XLA may not merge `std` with the factors of the draw: that would change the last bits, and
    with them every run of a seed."""

    std: float

    def __call__(self, key: Key, shape: tuple[int, ...]) -> Array:
        return self.std * jax.lax.optimization_barrier(jax.random.normal(key, shape, jnp.float32))


@dataclasses.dataclass(frozen=True)
class DecayTimes:
    """Gate biases b_h = -log(expm1(1 / T_h)) with T_h log-spaced from `low` to `high` tokens.

    Then -1 / log sigmoid(b_h) = T_h: head h forgets by a factor e in T_h tokens.
    """

    low: float
    high: float

    def __call__(self, key: Key, shape: tuple[int, ...]) -> Array:
        del key
        (heads,) = shape
        times = jnp.exp(jnp.linspace(math.log(self.low), math.log(self.high), heads))
        return -jnp.log(jnp.expm1(1 / times)).astype(jnp.float32)


def _kernel(config: FoxConfig, shape: tuple[int, int], axes: AxisNames, official: str) -> ParamSpec:
    """Linear weights are [out, in] in the official state dict."""
    return ParamSpec(shape, axes, _normal(config), f"{official}.weight", transposed=True)


def _normal(config: FoxConfig) -> Init:
    return Init("custom", draw=ScaledNormal(config.initializer_range))


def _norm(size: int, official: str) -> ParamSpec:
    return ParamSpec((size,), ("norm",), ONES, f"{official}.weight")


def _gate_bias_init(config: FoxConfig) -> Init:
    if not config.fgate_bias_init:
        return ZEROS
    assert config.decay_time_min is not None
    assert config.decay_time_max is not None
    return Init("custom", draw=DecayTimes(config.decay_time_min, config.decay_time_max))


def _attention_specs(config: FoxConfig, prefix: str) -> dict[str, ParamSpec]:
    width, heads, kv_heads, head_dim = config.hidden_size, config.num_heads, config.kv_heads, config.head_dim
    kv_width = kv_heads * head_dim

    def kernel(name: str, size: int) -> ParamSpec:
        return _kernel(config, (width, size), ("embed", "heads"), f"{prefix}.{name}")

    specs = {"q_proj/kernel": kernel("q_proj", width)}
    for name, shifted in (("k", config.use_k_shift), ("v", config.use_v_shift)):
        official = f"{name}_proj.linear" if shifted else f"{name}_proj"
        specs[f"{name}_proj/kernel"] = kernel(official, kv_width)
        if shifted:
            specs[f"{name}_shift/kernel"] = kernel(f"{name}_proj.shift_proj", kv_heads)
    if config.fgate_type == "full":
        specs["fgate_proj/kernel"] = kernel("fgate_proj", heads)
        specs["fgate_proj/bias"] = ParamSpec((heads,), ("heads",), ZEROS, f"{prefix}.fgate_proj.bias")
    elif config.is_gated:
        group = FIXED_GATE if config.fgate_type == "fixed" else "fgate"
        init = _gate_bias_init(config)
        specs[f"{group}/bias"] = ParamSpec((heads,), ("heads",), init, f"{prefix}.fgate_bias")
    if config.qk_norm:
        shared = config.qk_norm_share_param_across_head
        specs["q_norm/scale"] = _norm(head_dim if shared else width, f"{prefix}.q_norm")
        specs["k_norm/scale"] = _norm(head_dim if shared else kv_width, f"{prefix}.k_norm")
    if config.use_output_norm:
        specs["output_norm/scale"] = _norm(width, f"{prefix}.output_norm")
    if config.use_output_gate:
        specs["ogate_proj/kernel"] = kernel("ogate_proj", width)
    specs["o_proj/kernel"] = _kernel(config, (width, width), ("heads", "embed"), f"{prefix}.o_proj")
    return specs


def _mlp_specs(config: FoxConfig, prefix: str) -> dict[str, ParamSpec]:
    width, inner = config.hidden_size, config.mlp_size
    return {
        "gate_proj/kernel": _kernel(config, (width, 2 * inner), ("embed", "mlp"), f"{prefix}.gate_proj"),
        "down_proj/kernel": _kernel(config, (inner, width), ("mlp", "embed"), f"{prefix}.down_proj"),
    }


def block_specs(config: FoxConfig, prefix: str = "") -> dict[str, ParamSpec]:
    """The parameters of one layer by flat name; `prefix` starts their official names."""
    width = config.hidden_size
    return grouped(
        {
            "attn_norm": {"scale": _norm(width, f"{prefix}attn_norm")},
            "attn": _attention_specs(config, f"{prefix}attn"),
            "mlp_norm": {"scale": _norm(width, f"{prefix}mlp_norm")},
            "mlp": _mlp_specs(config, f"{prefix}mlp"),
        }
    )


def param_specs(config: FoxConfig) -> dict[str, ParamSpec]:
    """All parameters of the model by flat canonical name, in the order of the forward pass."""
    width, vocab = config.hidden_size, config.vocab_size
    axes, official = ("vocab", "embed"), "model.embeddings.weight"
    specs = {"embed/embedding": ParamSpec((vocab, width), axes, _normal(config), official)}
    for layer in range(config.num_layers):
        specs |= grouped({f"layers/{layer}": block_specs(config, f"model.layers.{layer}.")})
    specs["norm/scale"] = _norm(width, "model.norm")
    specs["lm_head/kernel"] = _kernel(config, (width, vocab), ("embed", "vocab"), "lm_head")
    return specs


def init_params(config: FoxConfig, key: Key) -> Params:
    """Initial parameters, float32, canonical per-layer names.

    Kernels and the embedding ~ N(0, initializer_range^2), norm weights 1, biases 0 (so a "full" gate starts
    near f = 0.5) except gate biases given by decay times. Works under `jax.jit` with out_shardings and under
    `jax.eval_shape`.
    """
    return initialize(param_specs(config), key)


def param_axes(config: FoxConfig) -> Params:
    """Tree like the parameters whose leaves are tuples of logical axis names (see `ShardingRules`)."""
    return logical_axes(param_specs(config))


def decay_mask(params: Params) -> Params:
    """Tree of bool: True where the paper applies weight decay.

    All Linear kernels (gate, shift and lm_head included) and the embedding; no bias, no norm weight, no gate
    bias (FoX, training details).
    """
    return mask_names(params, lambda name: name.endswith(("/kernel", "/embedding")))


def trainable_mask(params: Params) -> Params:
    """Tree of bool: False for what an optimiser must leave alone (the bias of "fixed" gates, a buffer).

    The forward pass already stops its gradient, and `decay_mask` excludes it, so AdamW without this mask does
    not move it either; an optimiser with other side effects can use `optax.masked` with this tree.
    """
    return mask_names(params, lambda name: FIXED_GATE not in name.split("/"))


def count_params(config: FoxConfig, embedding: bool = True) -> int:
    """Number of parameters; without the input embedding for the paper's "non-embedding" count of its tables.

    lm_head counts as non-embedding. The buffer of "fixed" gates is not a parameter.
    """
    return sum(
        math.prod(spec.shape)
        for name, spec in param_specs(config).items()
        if FIXED_GATE not in name and (embedding or name != "embed/embedding")
    )


def flops_per_token(config: FoxConfig, seq_len: int) -> float:
    """Forward FLOPs per token: 2 N + 2 n_layer d_model L (FoX, Table 6).

    N leaves out the embedding and counts lm_head. The second term is the causal half of two L x L matmuls per
    layer, at context length L = `seq_len`. Training costs three times as much (backward = 2 forward). Savings
    by ACP are deliberately not counted.
    """
    dense = 2 * count_params(config, embedding=False)
    return float(dense + 2 * config.num_layers * config.hidden_size * seq_len)
