"""Parameters as pure dicts of arrays: flat names, stacking of layers, comparison, size report.

The canonical layout keeps one entry per layer, `params["layers"]["0"]["attn"]["q_proj"]["kernel"]`, and is
what checkpoints, converters and sharding rules see. `lax.scan` over layers wants them stacked; `stack_layers`
and `unstack_layers` are the only place where that happens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.common.shapes import Params

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
    """Number of scalars in the tree (arrays or `jax.ShapeDtypeStruct`)."""
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


def as_module(tree: Params) -> nnx.Dict[Any]:
    """A tree of arrays as NNX parameters."""
    return nnx.Dict(
        {name: as_module(leaf) if isinstance(leaf, dict) else nnx.Param(leaf) for name, leaf in tree.items()}
    )


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
