"""Which thread block (CTA) takes which jobs, in which order: long ones first, every CTA about as much as any
other.

A job is one block of rows (or columns) of one lane; it costs as many steps as it visits tiles. Persistent
kernels take lists of jobs, so that loading the next job's first tiles hides behind the current one.
"""

import functools
import heapq
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kernels.common.tiling import ceil_div
from kernels.forgetting_attention.config import Tile
from kernels.forgetting_attention.tile_ranges import TileRange

# What starting and ending a job costs, in visited tiles.
JOB_COST = 1
# Lanes whose blocks follow each other: enough to share what they read in the L2 cache, few enough to fit it.
LANES_TOGETHER = 8
# From this share of the causal tiles on, jobs keep the order in which they share the L2 cache.
NEARLY_ALL = 0.95
# Up to so many jobs are ranked by comparing all pairs: one short kernel, where a sort is a long one.
COMPARED = 8192
NO_JOB = -1


class WorkLists(NamedTuple):
    """Jobs by CTA.

    Attributes:
      jobs: (lane, block, begin, full_begin, full_end, end, jobs of the CTA) of the CTA's jobs in order; a job
        of a key/value head has one such record per query head of its group. Beyond its jobs all is 0.
    """

    jobs: Int[Array, "C P 7"]

    @property
    def counts(self) -> Int[Array, " C"]:
        """Jobs of every CTA: as part of their records they take no step of their own to make."""
        return self.jobs[:, 0, 6]


def causal_blocks(rows: int, keys: int, tile: Tile, *, by_row: bool) -> np.ndarray:
    """Tiles [begin, full_begin, full_end, end) of every row block, or of every column block: int32 [blocks,
    4].

    Row i sees the keys up to i + keys - rows, and nothing else decides. As `tile_ranges` finds them on the
    device.
    """
    offset, (height, width) = keys - rows, tile
    if by_row:
        start = np.arange(ceil_div(rows, height)) * height
        last = np.minimum(start + height, rows) - 1
        end = np.minimum((last + offset) // width + 1, ceil_div(keys, width))
        full = np.minimum((start + offset + 1) // width, end)
        zero = np.zeros_like(end)
        return np.stack([zero, zero, full, end], axis=-1).astype(np.int32)
    start = np.arange(ceil_div(keys, width)) * width
    end = np.full_like(start, ceil_div(rows, height))
    begin = np.clip((start - offset) // height, 0, end)
    full = np.clip(-(-(start + width - 1 - offset) // height), begin, end)
    return np.stack([begin, full, end, end], axis=-1).astype(np.int32)


def pruned_causal(blocks: np.ndarray, kept: Int[Array, "B N M"], *, by_row: bool) -> TileRange:
    """`causal_blocks` less what is pruned.

    That is the tiles before `kept` of a block of rows, and those from `kept` on of a block of columns.
    """
    begin, full_begin, full_end, end = (jnp.asarray(edge) for edge in blocks.T)
    if by_row:
        begin = jnp.minimum(kept, end)
        full_begin = begin
    else:
        end = jnp.clip(kept, begin, end)
    full_begin = jnp.minimum(full_begin, end)
    full_end = jnp.clip(full_end, full_begin, end)
    return TileRange(*(jnp.broadcast_to(edge, kept.shape) for edge in (begin, full_begin, full_end, end)))


def static_lists(blocks: np.ndarray, lanes: int, group: int, ctas: int) -> WorkLists:
    """Lists for bounds known when the program is traced, the same for all lanes.

    Args:
      blocks: tiles [begin, full_begin, full_end, end) of every block.
      lanes: query heads times batch.
      group: query heads that share a job.
      ctas: how many lists to make.
    """
    counts, order = _greedy(tuple((blocks[:, 3] - blocks[:, 0]).tolist()), lanes // group, group, ctas)
    lane, block = _members(order, len(blocks), group)
    count = np.broadcast_to(counts[:, None, None, None], (*lane.shape, 1))
    jobs = np.concatenate([lane[..., None], block[..., None], blocks[block], count], axis=-1)
    jobs[order == NO_JOB] = 0
    return WorkLists(jnp.asarray(jobs.reshape(ctas, -1, 7)))


def dynamic_lists(ranges: TileRange, group: int, ctas: int, unpruned: np.ndarray | None = None) -> WorkLists:
    """Lists for bounds computed on the device: jobs sorted by cost and dealt to the CTAs to and fro.

    Sorted, jobs of all lanes run at a time, and read more than the L2 cache holds. Where next to nothing was
    pruned, jobs stay in the lists made for all tiles: they take no longer than without pruning.

    Args:
      ranges: of every block, each [B, N, M].
      group: query heads that share a job.
      ctas: how many lists to make.
      unpruned: tiles [begin, full_begin, full_end, end) of the blocks of every lane before pruning, if they
        are the same for all lanes.
    """
    lanes, blocks = ranges.begin.shape[0] * ranges.begin.shape[1], ranges.begin.shape[2]
    cost = (ranges.end - ranges.begin).reshape(-1, group, blocks).sum(axis=1).reshape(-1)
    cta, turn = _dealt_to(_ranks(cost), ctas)
    counts, longest = _dealt_counts(cost.size, ctas)
    count = jnp.asarray(counts)[cta]
    if unpruned is not None:
        steps = (unpruned[:, 3] - unpruned[:, 0]).tolist()
        all_counts, order = _greedy(tuple(steps), lanes // group, group, ctas)
        all_cta, all_turn = _places(order)
        # In float32: of millions of tokens the sum passes 2^31.
        nearly_all = cost.sum(dtype=jnp.float32) >= NEARLY_ALL * sum(steps) * lanes
        longest = max(longest, order.shape[1])
        unmoved = (all_cta, all_turn, all_counts[all_cta])
        cta, turn, count = (jnp.where(nearly_all, *x) for x in zip(unmoved, (cta, turn, count), strict=True))
    # Every job writes its record to its place, which takes fewer steps than places looking for their job.
    lane, block = np.divmod(np.arange(lanes * blocks, dtype=np.int32), blocks)
    fields = [x.reshape(-1, group, blocks).swapaxes(1, 2) for x in (lane, block, *ranges)]
    fields.append(jnp.broadcast_to(count.reshape(-1, blocks, 1), fields[0].shape))
    record = jnp.stack(fields, axis=-1).reshape(cost.size, -1)
    jobs = jnp.zeros((ctas * longest, record.shape[1]), jnp.int32)
    jobs = jobs.at[cta * longest + turn].set(record, unique_indices=True, mode="promise_in_bounds")
    return WorkLists(jobs.reshape(ctas, -1, len(fields)))


def _ranks(cost: Int[Array, " J"]) -> Int[Array, " J"]:
    """How many jobs come before each: those that cost more, and of the same cost those after it."""
    jobs, number = cost.size, jnp.arange(cost.size, dtype=jnp.int32)
    bits = max(jobs - 1, 1).bit_length()
    # Cost and job in one number: all differ, and sorting a single operand takes half the time of an argsort.
    key = jnp.minimum(cost, jnp.iinfo(jnp.int32).max >> bits) << bits | number
    if jobs <= COMPARED:
        return (key > key[:, None]).sum(axis=1, dtype=jnp.int32)
    order = -jax.lax.sort(-key, is_stable=False) & ((1 << bits) - 1)
    return jnp.zeros_like(number).at[order].set(number, unique_indices=True, mode="promise_in_bounds")


def _dealt_to(rank: Any, ctas: int) -> tuple[Any, Any]:
    """CTA of the jobs, dealt to and fro in order of their ranks, and their turns there."""
    turn, at = rank // ctas, rank % ctas
    return at + turn % 2 * (ctas - 1 - 2 * at), turn


def _dealt_counts(jobs: int, ctas: int) -> tuple[np.ndarray, int]:
    """Jobs of every CTA if so many are dealt, and the largest number."""
    cta, _ = _dealt_to(np.arange(jobs), ctas)
    return np.bincount(cta, minlength=ctas).astype(np.int32), ceil_div(jobs, ctas)


def _places(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """CTA and turn of every job in lists [C, P]."""
    cta, turn = np.nonzero(order != NO_JOB)
    sorted_by_job = np.argsort(order[cta, turn])
    return cta[sorted_by_job].astype(np.int32), turn[sorted_by_job].astype(np.int32)


@functools.lru_cache(maxsize=64)
def _greedy(cost: tuple[int, ...], lanes: int, group: int, ctas: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts and jobs of every CTA: each job, longest first, goes to the CTA that would be free first."""
    blocks = np.argsort(-np.asarray(cost), kind="stable").tolist()
    lists: list[list[int]] = [[] for _ in range(ctas)]
    free_at = [(0, cta) for cta in range(ctas)]
    for first in range(0, lanes, LANES_TOGETHER):
        for block in blocks:
            for lane in range(first, min(first + LANES_TOGETHER, lanes)):
                time, cta = heapq.heappop(free_at)
                lists[cta].append(lane * len(cost) + block)
                heapq.heappush(free_at, (time + group * cost[block] + JOB_COST, cta))
    longest = max(len(jobs) for jobs in lists)
    order = np.full((ctas, longest), NO_JOB, np.int32)
    for row, jobs in zip(order, lists, strict=True):
        row[: len(jobs)] = jobs
    return np.asarray([len(jobs) for jobs in lists], np.int32), order


def _members(order: Any, blocks: int, group: int) -> tuple[Any, Any]:
    """(lane, block) of the jobs in `order` [C, P], one per query head: [C, P, group]."""
    job = order.clip(0)
    lane = (job // blocks * group)[..., None] + np.arange(group, dtype=np.int32)
    return lane, (job % blocks)[..., None] + 0 * lane
