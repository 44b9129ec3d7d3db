"""Work lists: every job in exactly one list, long ones first, and no list much longer than the others."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.forgetting_attention import work_lists
from kernels.forgetting_attention.tile_ranges import TileRange, column_tiles, row_tiles
from kernels.forgetting_attention.work_lists import (
    JOB_COST,
    WorkLists,
    causal_blocks,
    dynamic_lists,
    pruned_causal,
    static_lists,
)

SHAPES = [
    (700, 700, (192, 128)),
    (300, 900, (64, 192)),
    (100, 100, (128, 128)),
    (1, 333, (128, 64)),
    (512, 512, (128, 128)),
]


def listed(lists: WorkLists, group: int = 1) -> list[list[tuple[int, ...]]]:
    """The records that each CTA reads."""
    rows = zip(lists.counts.tolist(), np.asarray(lists.jobs).tolist(), strict=True)
    return [[tuple(job[:6]) for job in jobs[: count * group]] for count, jobs in rows]


def ranges_of(bounds: np.ndarray) -> TileRange:
    """[lanes, blocks, 4] as one batch entry."""
    return TileRange(*(jnp.asarray(bounds[None, :, :, edge], jnp.int32) for edge in range(4)))


def stacked(ranges: TileRange) -> np.ndarray:
    return np.stack([np.asarray(edge)[0, 0] for edge in ranges], axis=-1)


@pytest.mark.parametrize(("rows", "keys", "tile"), SHAPES)
def test_causal_blocks_are_what_the_device_finds(rows: int, keys: int, tile: tuple[int, int]) -> None:
    first = jnp.zeros((1, rows), jnp.int32)
    last = jnp.arange(rows, dtype=jnp.int32)[None] + keys - rows
    start = jnp.zeros((1, 1), jnp.int32)
    by_row = column_tiles(first, last, start, None, tile, keys)
    by_column = row_tiles(first, last, start, None, tile, keys)
    np.testing.assert_array_equal(causal_blocks(rows, keys, tile, by_row=True), stacked(by_row))
    np.testing.assert_array_equal(causal_blocks(rows, keys, tile, by_row=False), stacked(by_column))


@pytest.mark.parametrize("kept", [0, 1, 2, 5])
@pytest.mark.parametrize(("rows", "keys", "tile"), SHAPES)
def test_pruned_causal_ranges_are_what_the_general_ones_are(
    rows: int, keys: int, tile: tuple[int, int], kept: int
) -> None:
    first = jnp.zeros((1, rows), jnp.int32)
    last = jnp.arange(rows, dtype=jnp.int32)[None] + keys - rows
    start = jnp.zeros((1, 1), jnp.int32)
    for by_row, general in ((True, column_tiles), (False, row_tiles)):
        blocks = causal_blocks(rows, keys, tile, by_row=by_row)
        limit = jnp.minimum(kept, blocks[:, 3])[None, None].astype(jnp.int32)
        found = stacked(pruned_causal(blocks, limit, by_row=by_row))
        np.testing.assert_array_equal(found, stacked(general(first, last, start, limit, tile, keys)))


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("ctas", [1, 4, 132])
@pytest.mark.parametrize("known_early", [True, False])
def test_every_job_is_in_one_list(group: int, ctas: int, known_early: bool) -> None:
    lanes, blocks = 6, causal_blocks(700, 900, (64, 128), by_row=False)
    if known_early:
        lists = static_lists(blocks, lanes, group, ctas)
    else:
        lists = dynamic_lists(ranges_of(np.tile(blocks, (lanes, 1, 1))), group, ctas)
    records = [job for jobs in listed(lists, group) for job in jobs]
    wanted = [(lane, block, *edges) for lane in range(lanes) for block, edges in enumerate(blocks.tolist())]
    assert sorted(records) == sorted(wanted)
    for job in range(0, len(records), group):
        lane, block = records[job][:2]
        members = [record[:2] for record in records[job : job + group]]
        assert lane % group == 0
        assert members == [(lane + member, block) for member in range(group)]


@pytest.mark.parametrize("uneven", [False, True])
def test_lists_are_balanced(uneven: bool) -> None:
    blocks = causal_blocks(16384, 16384, (192, 128), by_row=True)
    bounds = np.tile(blocks, (32, 1, 1))
    if uneven:  # Twice 16 heads of the decay times of the "mix" gates, which see about 36 of them back.
        window = np.ceil(np.tile(np.geomspace(1, 16384, 16), 2) * 36 / 128 + 1).astype(np.int32)
        bounds[:, :, 0] = np.maximum(bounds[:, :, 0], bounds[:, :, 3] - window[:, None])
        lists = dynamic_lists(ranges_of(bounds), 1, 132)
    else:
        lists = static_lists(blocks, 32, 1, 132)
    load = [sum(job[5] - job[2] + JOB_COST for job in jobs) for jobs in listed(lists)]
    assert max(load) <= 1.03 * np.mean(load)


@pytest.mark.parametrize("group", [1, 2])
def test_with_next_to_nothing_pruned_the_order_is_that_of_all_tiles(group: int) -> None:
    lanes, blocks = 16, causal_blocks(4096, 4096, (64, 192), by_row=False)
    unpruned = static_lists(blocks, lanes, group, 132)
    for share, same in ((1.0, True), (0.97, True), (0.9, False)):
        bounds = np.tile(blocks, (lanes, 1, 1))
        bounds[:, :, 3] = bounds[:, :, 0] + np.ceil(share * (blocks[:, 3] - blocks[:, 0])).astype(np.int32)
        bounds[:, :, 1:3] = np.minimum(bounds[:, :, 1:3], bounds[:, :, 3:])
        lists = dynamic_lists(ranges_of(bounds), group, 132, blocks)
        found = [[job[:2] for job in jobs] for jobs in listed(lists, group)]
        assert (found == [[job[:2] for job in jobs] for jobs in listed(unpruned, group)]) == same
        wanted = [
            (lane, block, *bounds[lane, block]) for lane in range(lanes) for block in range(len(blocks))
        ]
        assert sorted(job for jobs in listed(lists, group) for job in jobs) == sorted(wanted)


def test_long_jobs_come_first() -> None:
    blocks = causal_blocks(4096, 4096, (128, 128), by_row=True)
    for jobs in listed(dynamic_lists(ranges_of(np.tile(blocks, (5, 1, 1))), 1, 7)):
        costs = [job[5] - job[2] for job in jobs]
        assert costs == sorted(costs, reverse=True)


def test_both_ways_of_ranking_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = causal_blocks(2048, 2048, (64, 192), by_row=False)
    bounds = np.tile(blocks, (6, 1, 1))
    bounds[:, :, 3] -= np.random.default_rng(0).integers(0, bounds[:, :, 3] - bounds[:, :, 0])
    compared = dynamic_lists(ranges_of(bounds), 2, 5)
    monkeypatch.setattr(work_lists, "COMPARED", 0)
    np.testing.assert_array_equal(dynamic_lists(ranges_of(bounds), 2, 5).jobs, compared.jobs)
