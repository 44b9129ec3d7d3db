"""Means as (sum, weight) pairs: exact under accumulation over micro-batches, batches and processes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Sums = Mapping[str, tuple[Any, Any]]


def add_sums(left: Sums, right: Sums) -> dict[str, tuple[Any, Any]]:
    """Adds two dicts of (sum, weight) pairs name by name; both must have the same names.

    Raises:
      ValueError: different names.
    """
    if left.keys() != right.keys():
        raise ValueError(f"metrics differ: {sorted(left)} and {sorted(right)}")
    return {name: (left[name][0] + right[name][0], left[name][1] + right[name][1]) for name in left}


def divide_sums(sums: Sums) -> dict[str, Any]:
    """Means, sum / weight; NaN where nothing was counted (weight 0)."""
    return {
        name: jnp.where(weight == 0, jnp.nan, total / jnp.where(weight == 0, 1, weight))
        for name, (total, weight) in sums.items()
    }


class Means:
    """Running means on the host, in float64: what an evaluator adds its batches up in."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[np.float64, np.float64]] = {}

    def add(self, sums: Sums) -> None:
        """Adds (sum, weight) pairs, as scalars of any kind. Names may come and go."""
        for name, pair in jax.device_get(dict(sums)).items():
            total, weight = self._sums.get(name, (np.float64(0), np.float64(0)))
            self._sums[name] = (total + np.float64(pair[0]), weight + np.float64(pair[1]))

    def compute(self) -> dict[str, float]:
        """{name: mean}; NaN where nothing was counted."""
        return {
            n: float(total / weight) if weight else float("nan") for n, (total, weight) in self._sums.items()
        }
