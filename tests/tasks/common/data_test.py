"""Global batch k is a function of (seed, k) and of nothing else."""

import time
from typing import Any

import numpy as np
import pytest

from tasks.common.data import Batches


class Rows:
    """`n` rows that hold their own index."""

    def __init__(self, n: int = 10) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(0.001 * (index % 3))  # so that threads and workers finish out of order
        return {"row": np.int32(index), "vector": np.full((2,), index, np.float32)}


class Broken(Rows):
    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 4:
            raise RuntimeError("row 4 cannot be read")
        return super().__getitem__(index)


class Blocks(Rows):
    def read(self, indices: list[int]) -> dict[str, np.ndarray]:
        return {"row": np.asarray(indices, np.int32)}


def take(batches: Batches, count: int, start: int = 0, **options: Any) -> list[list[int]]:
    with batches.iterate(start, **options) as iterator:
        return [next(iterator)["row"].tolist() for _ in range(count)]


def official_order(k: int) -> list[int]:
    return [(3 * k + row) % 10 for row in range(4)]


@pytest.mark.parametrize("order", ["shuffled", "sequential", official_order])
def test_batches_do_not_depend_on_threads_start_or_processes(order: Any) -> None:
    batches = Batches(Rows(), 4, seed=7, order=order)
    wanted = [batches[k]["row"].tolist() for k in range(9)]
    assert take(batches, 9) == wanted
    assert take(batches, 9, prefetch=5) == wanted
    for start in (1, 4, 8):
        assert take(batches, 1, start) == wanted[start : start + 1]
    halves = [take(batches, 9, process_index=p, process_count=2) for p in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == wanted


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_batches_do_not_depend_on_workers(workers: int) -> None:
    batches = Batches(Rows(), 4, seed=7)
    wanted = [batches[k]["row"].tolist() for k in range(3, 9)]
    assert take(batches, 6, 3, num_workers=workers) == wanted
    second = take(batches, 6, 3, num_workers=workers, process_index=1, process_count=2, prefetch=3)
    assert second == [rows[2:] for rows in wanted]


def test_an_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    stream = [row for k in range(15) for row in Batches(Rows(), 4, seed=7).indices(k)]
    epochs = [stream[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert [row for k in range(15) for row in Batches(Rows(), 4, seed=8).indices(k)] != stream


def test_sequential_and_given_orders() -> None:
    assert [Batches(Rows(), 4, order="sequential").indices(k) for k in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 0, 1],
    ]
    assert Batches(Rows(), 4, order=official_order).indices(2) == [6, 7, 8, 9]
    with pytest.raises(ValueError, match=r"order\(0\) gave 3 rows for a batch of 4"):
        Batches(Rows(), 4, order=lambda k: [1, 2, 3]).indices(0)


def test_a_source_may_read_rows_together() -> None:
    batches = Batches(Blocks(), 4, order=official_order)
    assert batches[1] == {"row": pytest.approx([3, 4, 5, 6])}
    assert take(batches, 1, 1, process_index=1, process_count=2) == [[5, 6]]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_source_surfaces(workers: int) -> None:
    with pytest.raises(RuntimeError, match="row 4 cannot be read"):
        take(Batches(Broken(), 4, seed=1), 5, num_workers=workers)


def test_a_closed_iterator_says_so() -> None:
    iterator = Batches(Rows(), 4).iterate()
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


class Uneven(Rows):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"row": np.zeros((1 + (index == 2),))}


class Renamed(Rows):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"raw" if index == 2 else "row": np.zeros(())}


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="empty"):
        Batches(Rows(0), 4)
    with pytest.raises(ValueError, match="batch_size = 0"):
        Batches(Rows(), 0)
    with pytest.raises(ValueError, match="batch_size 4 is not divisible by 3 processes"):
        Batches(Rows(), 4).iterate(process_count=3)
    with pytest.raises(ValueError, match="start = -1"):
        Batches(Rows(), 4).iterate(-1)
    with pytest.raises(ValueError, match="process_index 2 is not below process_count 2"):
        Batches(Rows(), 4).iterate(process_index=2, process_count=2)
    with pytest.raises(
        ValueError, match=r"'row' of example 2 is \(2,\) float64, of example 0 \(1,\) float64"
    ):
        Batches(Uneven(), 4, order="sequential")[0]
    with pytest.raises(ValueError, match=r"example 2 has keys \['raw'\], example 0 has \['row'\]"):
        Batches(Renamed(), 4, order="sequential")[0]


def test_an_unknown_order_is_refused(unchecked_types: None) -> None:
    with pytest.raises(ValueError, match="order = 'random'"):
        Batches(Rows(), 4, order="random")  # type: ignore[arg-type]
