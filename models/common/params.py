"""Parameters as pure dicts of arrays, and the tables they come from: flat names, initial values, stacking of
layers, comparison, size report.

The canonical layout keeps one entry per layer, `params["layers"]["0"]["attn"]["q_proj"]["kernel"]`, and is
what checkpoints, converters and sharding rules see. `lax.scan` over layers wants them stacked; `stack_layers`
and `unstack_layers` are the only place where that happens.

A model lists its parameters in one table, flat name -> `ParamSpec`; what starts, shards and converts them is
read off it.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from models.common.shapes import Key, Params
from models.common.sharding import AxisNames

SEPARATOR = "/"


def flatten_names(tree: Params) -> dict[str, Any]:
    """{"a": {"b": leaf}} -> {"a/b": leaf}, in the order of the tree.

    Raises:
      TypeError: a key that is not a string.
      ValueError: a key that is empty or holds "/", or an empty sub-tree (it would vanish).
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise TypeError(f"parameter keys are strings, got {key!r} of type {type(key).__name__}")
        if not key or SEPARATOR in key:
            raise ValueError(f"parameter key {key!r} is empty or contains {SEPARATOR!r}")
        if not isinstance(value, Mapping):
            flat[key] = value
            continue
        if not value:
            raise ValueError(f"parameter group {key!r} is empty")
        for name, leaf in flatten_names(dict(value)).items():
            flat[f"{key}{SEPARATOR}{name}"] = leaf
    return flat


def unflatten_names(flat: Mapping[str, Any]) -> Params:
    """Inverse of `flatten_names`.

    Raises:
      ValueError: one name is a prefix of another ("a" and "a/b"), so that it would be a leaf and a group.
    """
    tree: Params = {}
    for name, leaf in flat.items():
        *groups, last = name.split(SEPARATOR)
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name!r}: {group!r} is already a parameter, so it cannot be a group")
        if last in node:
            raise ValueError(f"{name!r} is given twice, or is both a parameter and a group")
        node[last] = leaf
    return tree


def layer_keys(layers: Mapping[str, Any]) -> list[str]:
    """The layer names "0", "1", ... in order.

    Raises:
      ValueError: the names are not exactly 0 .. n-1.
    """
    expected = [str(i) for i in range(len(layers))]
    if not layers or set(layers) != set(expected):
        raise ValueError(f"layers must be named 0..{max(len(layers) - 1, 0)}, got {sorted(layers)}")
    return expected


def stack_layers(layers: Mapping[str, Params]) -> Params:
    """{"0": tree, "1": tree, ...} of equal structure -> one tree whose leaves have a leading layer axis."""
    trees = [layers[key] for key in layer_keys(layers)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack_layers(stacked: Params, num_layers: int) -> dict[str, Params]:
    """Inverse of `stack_layers`.

    Raises:
      ValueError: a leaf whose first axis is not `num_layers` long.
    """
    for name, leaf in flatten_names(stacked).items():
        if leaf.shape[0] != num_layers:
            raise ValueError(f"{name}: leading axis is {leaf.shape[0]}, expected {num_layers} layers")
    return {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(num_layers)}


def list_differences(
    expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], limit: int = 20
) -> str:
    """Readable list of what `found` lacks, has too much, or has in another shape; "" if nothing differs.

    Args:
      expected: name -> shape that should be there.
      found: name -> shape that is there.
      limit: most names listed per kind of difference.
    """
    missing = [f"{name} {tuple(expected[name])}" for name in expected if name not in found]
    unexpected = [f"{name} {tuple(found[name])}" for name in found if name not in expected]
    reshaped = [
        f"{name}: expected {tuple(shape)}, found {tuple(found[name])}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    lines = []
    for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", reshaped)):
        if names:
            more = [f"... and {len(names) - limit} more"] if len(names) > limit else []
            lines.append("\n    ".join([f"{title} ({len(names)}):", *names[:limit], *more]))
    return "\n".join(lines)


def count(params: Params) -> int:
    """Number of scalars in the tree (arrays, `jax.ShapeDtypeStruct`, or the table of their `ParamSpec`)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def size_report(params: Params, depth: int = 2) -> str:
    """Table of parameter counts and bytes per group; layers of equal make-up share one row.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`.
      depth: how many levels below a layer (or the root) get a row of their own.
    """
    rows: dict[str, list[int]] = {}
    for name, leaf in flatten_names(params).items():
        parts = name.split(SEPARATOR)
        if parts[0] == "layers" and len(parts) > 2:
            parts = [f"layers/*/{parts[2]}", *parts[3:]]
        row = rows.setdefault(SEPARATOR.join(parts[:depth]), [0, 0])
        scalars = math.prod(leaf.shape)
        row[0] += scalars
        row[1] += scalars * jnp.dtype(leaf.dtype).itemsize
    rows["total"] = [sum(row[i] for row in rows.values()) for i in (0, 1)]
    width = max(len(name) for name in rows)
    return "\n".join(
        f"{name:<{width}}  {scalars:>15,}  {bytes_ / 2**20:>10.2f} MiB"
        for name, (scalars, bytes_) in rows.items()
    )


@dataclasses.dataclass(frozen=True)
class Init:
    """How a parameter starts.

    Attributes:
      kind: "zeros"; "ones"; "normal" N(0, high^2); "truncated" the same cut at two standard deviations and
        rescaled to standard deviation `high`; "uniform" in [low, high); "custom", `draw(key, shape)`.
      low, high: see kind.
      draw: only for "custom".
    """

    kind: Literal["zeros", "ones", "normal", "truncated", "uniform", "custom"]
    high: float = 0.0
    low: float = 0.0
    draw: Callable[[Key, tuple[int, ...]], Array] | None = None

    def __call__(self, key: Key, shape: tuple[int, ...]) -> Array:
        """Initial value, float32."""
        match self.kind:
            case "zeros":
                return jnp.zeros(shape, jnp.float32)
            case "ones":
                return jnp.ones(shape, jnp.float32)
            case "normal":
                return self.high * jax.random.normal(key, shape, jnp.float32)
            case "truncated":
                # A unit normal cut at +-2 has this standard deviation.
                unit = jax.random.truncated_normal(key, -2, 2, shape, jnp.float32) / 0.87962566103423978
                return self.high * unit
            case "uniform":
                return jax.random.uniform(key, shape, jnp.float32, self.low, self.high)
            case "custom":
                assert self.draw is not None
                return self.draw(key, shape)


ZEROS, ONES = Init("zeros"), Init("ones")


def lecun_normal(fan_in: int) -> Init:
    """Truncated normal of variance 1 / fan_in: the default of Flax's Dense and Conv."""
    return Init("truncated", fan_in**-0.5)


def xavier_uniform(fan_in: int, fan_out: int) -> Init:
    """Uniform of variance 2 / (fan_in + fan_out)."""
    limit = math.sqrt(6 / (fan_in + fan_out))
    return Init("uniform", limit, -limit)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: everything that initialisation, sharding and conversion need to know.

    Attributes:
      shape: our layout; kernels are [in, out].
      axes: logical axis names, one per dimension.
      init: initial value.
      official: name in the official checkpoint.
      official_shape: shape there, a reshape of ours; None = the same.
      transposed: it is stored as [out, in] there.
    """

    shape: tuple[int, ...]
    axes: AxisNames
    init: Init
    official: str
    official_shape: tuple[int, ...] | None = None
    transposed: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the official checkpoint."""
        if self.transposed:
            return self.shape[::-1]
        return self.shape if self.official_shape is None else self.official_shape


def initialize(specs: Mapping[str, ParamSpec], key: Key) -> Params:
    """Initial values (float32) for a table of parameters, as a tree.

    Every parameter draws from its own key, derived from its name alone: adding an option, or changing the
    number of layers, leaves the others as they were. Those of one shape and kind are drawn together: compile
    time grows with the number of kinds, not of parameters.
    """
    groups: dict[tuple[tuple[int, ...], Init], list[str]] = {}
    for name, spec in specs.items():
        groups.setdefault((spec.shape, spec.init), []).append(name)
    values: dict[str, Array] = {}
    for (shape, init), names in groups.items():
        if init.kind in ("zeros", "ones"):
            # Each is an array of its own: donated buffers may not be shared.
            values |= {name: init(key, shape) for name in names}
            continue
        checksums = jnp.array([zlib.crc32(name.encode()) for name in names], jnp.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, checksums)
        drawn = jax.vmap(lambda key, init=init, shape=shape: init(key, shape))(keys)
        # The barrier keeps the compiler from drawing them one by one after all, once per slice.
        values |= dict(zip(names, jax.lax.optimization_barrier(drawn), strict=True))
    return unflatten_names({name: values[name] for name in specs})


def linear_specs(
    size_in: int,
    size_out: int,
    axes: AxisNames,
    kernel: Init,
    official: str,
    bias: Init = ZEROS,
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None),
) -> dict[str, ParamSpec]:
    """Kernel [in, out] and bias [out]; `shapes` are their official shapes where those differ."""
    return {
        "kernel": ParamSpec((size_in, size_out), axes, kernel, f"{official}/kernel", shapes[0]),
        "bias": ParamSpec((size_out,), (axes[-1],), bias, f"{official}/bias", shapes[1]),
    }


def norm_specs(width: int, official: str) -> dict[str, ParamSpec]:
    """Scale and bias of a LayerNorm."""
    return {
        "scale": ParamSpec((width,), ("norm",), ONES, f"{official}/scale"),
        "bias": ParamSpec((width,), ("norm",), ZEROS, f"{official}/bias"),
    }


def grouped(groups: Mapping[str, Mapping[str, ParamSpec]]) -> dict[str, ParamSpec]:
    """{"a": {"b": spec}} -> {"a/b": spec}."""
    return {f"{group}/{name}": spec for group, specs in groups.items() for name, spec in specs.items()}


def logical_axes(specs: Mapping[str, ParamSpec]) -> Params:
    """Tree like the parameters of a table whose leaves are tuples of logical axis names (see
    `ShardingRules`)."""
    return unflatten_names({name: spec.axes for name, spec in specs.items()})


def check_params(specs: Mapping[str, Any], params: Params, config: object) -> None:
    """Raises ValueError, listing the differences, if these are not the parameters of the table.

    Args:
      specs: flat name -> what has the parameter's `shape`.
      params: canonical tree.
      config: whose parameters they should be, for the message.
    """
    expected = {name: spec.shape for name, spec in specs.items()}
    found = {name: leaf.shape for name, leaf in flatten_names(params).items()}
    if difference := list_differences(expected, found):
        raise ValueError(f"the parameters are not those of this {type(config).__name__}:\n{difference}")


def mask_names(params: Params, rule: Callable[[str], bool]) -> Params:
    """Tree of bool: what `rule` says of every flat name."""
    return unflatten_names({name: bool(rule(name)) for name in flatten_names(params)})


def decay_mask(params: Params) -> Params:
    """Tree of bool: True where weight decay applies.

    All kernels (linear, gate, convolution); no bias, norm, position, token, nor the decay rates of the
    recurrence. The paper gives a rate and not where it applies; this is the usual choice for ViTs.
    """
    return mask_names(params, lambda name: name.endswith("/kernel"))


def cast_params(params: Params, dtype: DTypeLike) -> Params:
    """What `apply` casts to `dtype` at every call, cast once: half the bytes to read, and the same results.

    These are kernels and biases of linear maps and the kernels of the gates. The rest is used in its own
    dtype: the gates' biases, the convolution, norms, decay rates, positions, tokens and queries.
    """
    flat = flatten_names(params)

    def is_cast(name: str) -> bool:
        group, _, last = name.rpartition("/")
        module = group.rpartition("/")[2]
        if module == "conv" or f"{group}/kernel" not in flat:
            return False
        return last == "kernel" or module not in ("input_gate", "a_gate")

    return unflatten_names({name: x.astype(dtype) if is_cast(name) else x for name, x in flat.items()})
