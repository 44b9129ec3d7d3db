"""Every parameter of a Forgetting Transformer in one table: shape, logical axes, initial value, name.

Initialisation, sharding axes, weight decay, parameter counts and the converter are all read off this table,
so they cannot disagree.
"""

import dataclasses
import math
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from models.common.params import flatten_names, unflatten_names
from models.common.shapes import Params
from models.common.sharding import AxisNames
from models.fox.config import FoxConfig

Init = Literal["normal", "ones", "zeros", "decay_times"]

FIXED_GATE = "fgate_fixed"


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter.

    Attributes:
      shape: our layout; kernels are [in, out].
      axes: logical axis names, one per dimension.
      init: "normal" N(0, initializer_range^2), "ones", "zeros", "decay_times" (log-spaced).
      official: name in the official state dict, where kernels are stored [out, in].
    """

    shape: tuple[int, ...]
    axes: AxisNames
    init: Init
    official: str

    @property
    def is_kernel(self) -> bool:
        """Linear kernels are transposed on their way to and from the official layout."""
        return (
            self.official.endswith(".weight") and len(self.shape) == 2 and "embeddings" not in self.official
        )


def _attention_specs(config: FoxConfig, prefix: str) -> dict[str, ParamSpec]:
    width, heads, kv_heads, head_dim = config.hidden_size, config.num_heads, config.kv_heads, config.head_dim
    kv_width = kv_heads * head_dim

    def kernel(name: str, size: int) -> ParamSpec:
        return ParamSpec((width, size), ("embed", "heads"), "normal", f"{prefix}.{name}.weight")

    def norm(name: str, size: int) -> ParamSpec:
        return ParamSpec((size,), ("norm",), "ones", f"{prefix}.{name}.weight")

    specs = {"q_proj/kernel": kernel("q_proj", width)}
    for name, shifted in (("k", config.use_k_shift), ("v", config.use_v_shift)):
        official = f"{name}_proj.linear" if shifted else f"{name}_proj"
        specs[f"{name}_proj/kernel"] = kernel(official, kv_width)
        if shifted:
            specs[f"{name}_shift/kernel"] = kernel(f"{name}_proj.shift_proj", kv_heads)
    if config.fgate_type == "full":
        specs["fgate_proj/kernel"] = kernel("fgate_proj", heads)
        specs["fgate_proj/bias"] = ParamSpec((heads,), ("heads",), "zeros", f"{prefix}.fgate_proj.bias")
    elif config.is_gated:
        group = FIXED_GATE if config.fgate_type == "fixed" else "fgate"
        init: Init = "decay_times" if config.fgate_bias_init else "zeros"
        specs[f"{group}/bias"] = ParamSpec((heads,), ("heads",), init, f"{prefix}.fgate_bias")
    if config.qk_norm:
        shared = config.qk_norm_share_param_across_head
        specs["q_norm/scale"] = norm("q_norm", head_dim if shared else width)
        specs["k_norm/scale"] = norm("k_norm", head_dim if shared else kv_width)
    if config.use_output_norm:
        specs["output_norm/scale"] = norm("output_norm", width)
    if config.use_output_gate:
        specs["ogate_proj/kernel"] = kernel("ogate_proj", width)
    specs["o_proj/kernel"] = ParamSpec(
        (width, width), ("heads", "embed"), "normal", f"{prefix}.o_proj.weight"
    )
    return specs


def _mlp_specs(config: FoxConfig, prefix: str) -> dict[str, ParamSpec]:
    width, inner = config.hidden_size, config.mlp_size
    return {
        "gate_proj/kernel": ParamSpec(
            (width, 2 * inner), ("embed", "mlp"), "normal", f"{prefix}.gate_proj.weight"
        ),
        "down_proj/kernel": ParamSpec(
            (inner, width), ("mlp", "embed"), "normal", f"{prefix}.down_proj.weight"
        ),
    }


def block_specs(config: FoxConfig, prefix: str = "") -> dict[str, ParamSpec]:
    """The parameters of one layer by flat name; `prefix` starts their official names."""
    norm = {
        name: ParamSpec((config.hidden_size,), ("norm",), "ones", f"{prefix}{name}.weight")
        for name in ("attn_norm", "mlp_norm")
    }
    return {
        "attn_norm/scale": norm["attn_norm"],
        **{f"attn/{name}": spec for name, spec in _attention_specs(config, f"{prefix}attn").items()},
        "mlp_norm/scale": norm["mlp_norm"],
        **{f"mlp/{name}": spec for name, spec in _mlp_specs(config, f"{prefix}mlp").items()},
    }


def param_specs(config: FoxConfig) -> dict[str, ParamSpec]:
    """All parameters of the model by flat canonical name, in the order of the forward pass."""
    width, vocab = config.hidden_size, config.vocab_size
    specs = {
        "embed/embedding": ParamSpec((vocab, width), ("vocab", "embed"), "normal", "model.embeddings.weight")
    }
    for layer in range(config.num_layers):
        block = block_specs(config, f"model.layers.{layer}.")
        specs |= {f"layers/{layer}/{name}": spec for name, spec in block.items()}
    specs["norm/scale"] = ParamSpec((width,), ("norm",), "ones", "model.norm.weight")
    specs["lm_head/kernel"] = ParamSpec((width, vocab), ("embed", "vocab"), "normal", "lm_head.weight")
    return specs


def decay_time_bias(config: FoxConfig) -> Float[Array, " N"]:
    """b_h = -log(expm1(1 / T_h)) with T_h log-spaced from decay_time_min to decay_time_max (tokens).

    Then -1 / log sigmoid(b_h) = T_h: head h forgets by a factor e in T_h tokens.
    """
    assert config.decay_time_min is not None
    assert config.decay_time_max is not None
    times = jnp.exp(
        jnp.linspace(math.log(config.decay_time_min), math.log(config.decay_time_max), config.num_heads)
    )
    return -jnp.log(jnp.expm1(1 / times))


def initialize(
    specs: dict[str, ParamSpec], config: FoxConfig, key: PRNGKeyArray | UInt32[Array, "2"]
) -> Params:
    """Initial values (float32) for a table of parameters.

    Every parameter draws from its own key, derived from its name alone: adding an option, or changing the
    number of layers, leaves the others as they were.
    """
    values = _normals({name: spec.shape for name, spec in specs.items() if spec.init == "normal"}, key)

    def value(name: str, spec: ParamSpec) -> Array:
        match spec.init:
            case "ones":
                return jnp.ones(spec.shape, jnp.float32)
            case "zeros":
                return jnp.zeros(spec.shape, jnp.float32)
            case "decay_times":
                return decay_time_bias(config).astype(jnp.float32)
            case "normal":
                return config.initializer_range * values[name]

    return unflatten_names({name: value(name, spec) for name, spec in specs.items()})


def _normals(shapes: dict[str, tuple[int, ...]], key: PRNGKeyArray | UInt32[Array, "2"]) -> dict[str, Array]:
    """N(0, 1) for every name, from the key folded with the name's checksum.

    Those of one shape are drawn together: compile time grows with the number of shapes, not of parameters.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault(shape, []).append(name)
    values: dict[str, Array] = {}
    for shape, names in groups.items():
        checksums = jnp.array([zlib.crc32(name.encode()) for name in names], jnp.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, checksums)
        drawn = jax.vmap(lambda key, shape=shape: jax.random.normal(key, shape, jnp.float32))(keys)
        # The barrier keeps the compiler from drawing them one by one after all, once per slice.
        values |= dict(zip(names, jax.lax.optimization_barrier(drawn), strict=True))
    return values


def init_params(config: FoxConfig, key: PRNGKeyArray | UInt32[Array, "2"]) -> Params:
    """Initial parameters, float32, canonical per-layer names.

    Kernels and the embedding ~ N(0, initializer_range^2), norm weights 1, biases 0 (so a "full" gate starts
    near f = 0.5) except gate biases given by decay times. Works under `jax.jit` with out_shardings and under
    `jax.eval_shape`.
    """
    return initialize(param_specs(config), config, key)


def param_axes(config: FoxConfig) -> Params:
    """Tree like the parameters whose leaves are tuples of logical axis names (see `ShardingRules`)."""
    return unflatten_names({name: spec.axes for name, spec in param_specs(config).items()})


def decay_mask(params: Params) -> Params:
    """Tree of bool: True where the paper applies weight decay.

    All Linear kernels (gate, shift and lm_head included) and the embedding; no bias, no norm weight, no gate
    bias (FoX, training details).
    """
    return _mask(params, lambda name: name.endswith(("/kernel", "/embedding")))


def trainable_mask(params: Params) -> Params:
    """Tree of bool: False for what an optimiser must leave alone (the bias of "fixed" gates, a buffer).

    The forward pass already stops its gradient, and `decay_mask` excludes it, so AdamW without this mask does
    not move it either; an optimiser with other side effects can use `optax.masked` with this tree.
    """
    return _mask(params, lambda name: FIXED_GATE not in name.split("/"))


def _mask(params: Params, rule: Any) -> Params:
    return unflatten_names({name: bool(rule(name)) for name in flatten_names(params)})


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
