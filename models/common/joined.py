"""Parameters for inference: maps of one input as one matrix, made once when a model is loaded.

A few rows, such as one frame's, leave most of a GPU idle, and every product costs the time of its launch. So
maps that read the same input become one product: `join_params` puts their matrices side by side, under both
names, "linear_x+linear_y". What depends on parameters alone is computed, too. Layers take either form and
give the same up to rounding. Checkpoints, converters and training know the canonical form only.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import block_diag
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels.common.dispatch import target
from kernels.linear_scan import decay_rate
from kernels.split_matmul import split_matmul
from models.common.layers import linear
from models.common.params import flatten_names, unflatten_names
from models.common.shapes import Params
from models.common.sharding import active_mesh, gathered

JOINT = "+"
# Of a recurrence, beside its "a_param"; and of its gates [G, S, 2 S], beside their matrices.
RATE, BLOCKS = "rate", "blocks"
BRANCHES, GATES = ("linear_x", "linear_y"), ("input_gate", "a_gate")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# Of a gated MLP, whose canonical "up" holds both, one above the other [2, D, F]: a slice of it is a copy.
UP, HALVES = "up", ("gate", "value")


def join_params(params: Params) -> Params:
    """The tree with `BRANCHES`, `GATES`, `PROJECTIONS` and `HALVES` side by side, and with `RATE`; one
    that was made here comes back as it is.

    Args:
      params: canonical tree, or any group of one.
    """
    joined: Params = {}
    for name, group in params.items():
        if name == UP and group["kernel"].ndim == 3:
            halves = ({leaf: x[half] for leaf, x in group.items()} for half in range(2))
            joined[JOINT.join(HALVES)] = _side_by_side(list(halves))
        else:
            joined[name] = join_params(group) if isinstance(group, dict) else group
    for names in (BRANCHES, GATES, PROJECTIONS):
        if all(name in joined for name in names):
            groups = [joined.pop(name) for name in names]
            joined[JOINT.join(names)] = _gates(groups) if names == GATES else _side_by_side(groups)
    if "a_param" in joined and not joined.keys() & {"a_imag_param", RATE}:
        joined[RATE] = decay_rate(joined["a_param"])
    return joined


def _gates(groups: Sequence[Params]) -> Params:
    """As matrices with zeros, for clips; and block by block, for a frame (`kernels.recurrent_block`).

    A jitted program is given only what it uses.
    """
    blocks = jnp.concatenate([group["kernel"] for group in groups], axis=-1)
    return _side_by_side([_dense(group) for group in groups]) | {BLOCKS: blocks}


def _dense(group: Params) -> Params:
    """Blocks [G, I, O] in a matrix [G I, G O] of zeros.

    As long as channels are few, a product with the zeros takes less time than one of small blocks: XLA has
    that one read its bias as an array as large as its result.
    """
    return {"kernel": block_diag(*group["kernel"]), "bias": group["bias"].ravel()}


def _side_by_side(groups: Sequence[Params]) -> Params:
    return {leaf: jnp.concatenate([group[leaf] for group in groups], axis=-1) for leaf in groups[0]}


def is_joined(params: Params) -> bool:
    """Whether `join_params` has been here."""
    return any(JOINT in name for name in flatten_names(params))


def prepared(params: Params, dtype: DTypeLike, cast: Callable[[Params, DTypeLike], Params]) -> Params:
    """A canonical tree in the form that inference is fastest with; results are the same up to rounding.

    What a model would cast at every call is cast; on a GPU maps of one input are joined, too. What is joined
    already is returned as it is, so those who stream may be given either form.

    Args:
      params: canonical tree, of arrays on the host or on a device.
      dtype: that the products run in.
      cast: (params, dtype) -> the model's parameters as products want them.
    """
    if is_joined(params):
        return params
    narrow = cast(params, dtype)
    return jax.device_put(join_params(narrow) if target().platform == "gpu" else narrow)


def expected_shapes(specs: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """What has the shape of each parameter, by flat name, in the form that `params` are in.

    Args:
      specs: flat canonical name -> what has the parameter's `shape`.
    """
    if not is_joined(params):
        return dict(specs)
    tree = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}
    return flatten_names(jax.eval_shape(join_params, unflatten_names(tree)))


def linear_each(
    x: Float[Array, "*B D"], params: Params, names: Sequence[str], dtype: DTypeLike
) -> list[Float[Array, "*B F"]]:
    """`linear` by each of these maps, which have outputs of one size."""
    both = params.get(JOINT.join(names))
    if both is None:
        return [linear(x, params[name], dtype) for name in names]
    return jnp.split(linear(x, both, dtype), len(names), axis=-1)


def linear_apart(
    x: Float[Array, "*B D"], params: Params, names: Sequence[str], dtype: DTypeLike
) -> list[Float[Array, "*B F"]]:
    """`linear` by each of these maps, which are joined; each result in memory of its own, for who reads it
    by itself.
    """
    both = params[JOINT.join(names)]
    kernel, bias = (gathered(both[leaf].astype(dtype)) for leaf in ("kernel", "bias"))
    # Kernels see one device's arrays.
    implementation = None if active_mesh() is None else "xla"
    return split_matmul(x.astype(dtype), kernel, bias, len(names), implementation=implementation)


def taken_apart(params: Params, names: Sequence[str]) -> Params:
    """These maps under their own names again, if they are joined: copies, small ones beside many rows."""
    both = params.get(JOINT.join(names))
    if both is None:
        return params
    parts = {leaf: jnp.split(array, len(names), axis=-1) for leaf, array in both.items()}
    return {name: {leaf: split[i] for leaf, split in parts.items()} for i, name in enumerate(names)}
