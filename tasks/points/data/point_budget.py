"""Which of many possible points are taken: TAP-Vid-Kubric's rule, as much as is known of it.

Of the places that could be asked for, at most a tenth of those on any one thing are taken, of at most 25
things; the smallest first, each thing gets an even share of what is left. Small things, which often move,
thus get more points than their share of the picture.
"""

import numpy as np
from jaxtyping import Float, Int

_SHARE = 0.1  # of the places on one thing that may be taken
_THINGS = 25  # most that get points
_EARLY = 0.7  # share of queries drawn mostly from early frames


def early_share(rng: np.random.Generator, count: int) -> Float[np.ndarray, " count"]:
    """Where in a clip points are asked for, 0..1: 70 % mostly early (u^3, u uniform), the others anywhere."""
    at = rng.random(count)
    return np.where(rng.random(count) < _EARLY, at**3, at)


def split_budget(counts: Int[np.ndarray, " things"], wanted: int) -> Int[np.ndarray, " things"]:
    """How many points each thing gets: the smallest first, each an even share of what is left, but no more
    than it has.

    Args:
        counts: that each could have.
        wanted: in all.
    """
    given = np.zeros_like(counts)
    left = wanted
    order = np.argsort(counts, kind="stable")
    for place, thing in enumerate(order):
        given[thing] = min(int(counts[thing]), left // (len(order) - place))
        left -= int(given[thing])
    return given


def choose_places(
    rng: np.random.Generator, things: Int[np.ndarray, " places"], wanted: int
) -> Int[np.ndarray, " chosen"]:
    """Indices of the places that are taken, in random order.

    Args:
        rng: of all draws.
        things: what each place is on.
        wanted: it is reached if there are as many places: where the rule gives fewer, more are taken.
    """
    ids, sizes = np.unique(things, return_counts=True)
    largest = np.sort(ids[np.argsort(-sizes, kind="stable")][:_THINGS])
    pools = [rng.permutation(np.flatnonzero(things == thing)) for thing in largest]
    caps = np.array([max(1, int(_SHARE * len(pool))) for pool in pools])
    given = split_budget(caps, wanted)
    chosen = np.concatenate([pool[:n] for pool, n in zip(pools, given, strict=True)])
    if len(chosen) < wanted:
        others = rng.permutation(np.setdiff1d(np.arange(len(things)), chosen))
        chosen = np.concatenate([chosen, others[: wanted - len(chosen)]])
    return rng.permutation(chosen)
