"""What a run carries from step to step, and the names its leaves have in a checkpoint."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The whole training state; everything else is a function of it, the config and the data.

    step: updates done so far, scalar int32; also the index of the next global batch.
    params: pure dict of arrays, per-layer names.
    opt_state: optimiser state over the trained parameters only.
    ema: moving average of the trained parameters (None where frozen); None: there is none.

    The leaves are arrays, or whatever stands for arrays: shapes, shardings.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any = None

    @property
    def evaluated(self) -> Any:
        """The parameters to evaluate: averaged, where they are."""
        return self.params if self.ema is None else merge_trainable(self.ema, self.params)


def split_trainable(params: Any, mask: Any | None) -> tuple[Any, Any]:
    """(trained, frozen): two trees of the structure of `params`, None where a leaf belongs to the other.

    None is an empty subtree to JAX, so gradients, moments and norms of the first exist for trained leaves
    only.

    Args:
      params: tree of arrays.
      mask: tree of bool of the same structure, True where trained; None trains everything.
    """
    if mask is None:
        return params, jax.tree.map(lambda _: None, params)
    trained = jax.tree.map(lambda p, m: p if m else None, params, mask)
    frozen = jax.tree.map(lambda p, m: None if m else p, params, mask)
    return trained, frozen


def merge_trainable(trained: Any, frozen: Any) -> Any:
    """Inverse of `split_trainable`."""
    return jax.tree.map(lambda t, f: f if t is None else t, trained, frozen, is_leaf=lambda x: x is None)


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"a tree key of type {type(key).__name__} has no name")


def to_named(tree: Any) -> dict[str, Any]:
    """Any tree as nested dicts with string keys: what a checkpoint holds, free of optimiser classes."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree.flatten_with_path(tree)[0]:
        node = named
        names = [_key_name(key) for key in path] or ["value"]
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = leaf
    return named


def from_named(named: dict[str, Any], like: Any) -> Any:
    """Inverse of `to_named`: the leaves of `named` in the structure of `like`.

    Raises:
      KeyError: a leaf of `like` is missing.
    """
    paths, treedef = jax.tree.flatten_with_path(like)
    leaves = []
    for path, _ in paths:
        node: Any = named
        for name in [_key_name(key) for key in path] or ["value"]:
            node = node[name]
        leaves.append(node)
    return jax.tree.unflatten(treedef, leaves)


def leaf_names(tree: Any) -> list[str]:
    """Slash-joined name of every leaf, in leaf order."""
    return ["/".join(_key_name(key) for key in path) for path, _ in jax.tree.flatten_with_path(tree)[0]]
