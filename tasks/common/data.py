"""Deterministic batches: global batch k is a pure function of (seed, k).

Grain's MapDataset gives the order (a reshuffle per epoch, addressable by index) and the prefetching. One
Grain element here is a whole batch, not an example, so neither the number of worker processes or threads,
nor the split over processes, nor the step a run starts at can change what batch k holds.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags

Batch = dict[str, np.ndarray]


@runtime_checkable
class Source(Protocol):
    """Random access to examples. May also have `read(indices) -> Batch`, to fetch several rows at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


Order = Literal["shuffled", "sequential"] | Callable[[int], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Batches:
    """The endless sequence of global batches over a source.

    source: examples by index, each a dict of arrays or scalars with the same keys and shapes.
    batch_size: rows of a global batch.
    seed: of the shuffle.
    order: "shuffled": every epoch a new permutation of all examples, batches running on across epoch
      boundaries; "sequential": in index order, over and over; or a function k -> the source indices of
      batch k's rows, for data with an order of its own.
    """

    source: Source
    batch_size: int
    seed: int = 0
    order: Order = "shuffled"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size = {self.batch_size}: must be at least 1")
        if len(self.source) < 1:
            raise ValueError("the data source is empty: there is nothing to train on")
        if isinstance(self.order, str) and self.order not in ("shuffled", "sequential"):
            raise ValueError(f"order = {self.order!r}: must be 'shuffled', 'sequential', or a function of k")

    def indices(self, k: int, start: int = 0, stop: int | None = None) -> list[int]:
        """Source indices of rows [start, stop) of global batch k.

        Raises:
          ValueError: an order function that gives another number of rows than batch_size.
        """
        stop = self.batch_size if stop is None else stop
        if callable(self.order):
            rows = [int(index) for index in self.order(k)]
            if len(rows) != self.batch_size:
                raise ValueError(f"order({k}) gave {len(rows)} rows for a batch of {self.batch_size}")
            return rows[start:stop]
        first = k * self.batch_size
        if self.order == "sequential":
            return [(first + row) % len(self.source) for row in range(start, stop)]
        shuffled = grain.MapDataset.range(len(self.source)).shuffle(seed=self.seed % 2**32).repeat()
        return [int(shuffled[first + row]) for row in range(start, stop)]

    def rows(self, k: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of global batch k, stacked.

        Raises:
          ValueError: examples of different keys or shapes; the message names both.
        """
        indices = self.indices(k, start, stop)
        if hasattr(self.source, "read"):
            return self.source.read(indices)
        return _stack([self.source[index] for index in indices], indices)

    def __getitem__(self, k: int) -> Batch:
        """Global batch k, whole."""
        return self.rows(k, 0, self.batch_size)

    def iterate(
        self,
        start: int = 0,
        *,
        process_index: int = 0,
        process_count: int = 1,
        num_workers: int = 0,
        prefetch: int = 2,
    ) -> "BatchIterator":
        """This process's rows of batches start, start + 1, ...: a contiguous share of each.

        Args:
          start: first batch.
          process_index, process_count: which share; process_count must divide batch_size.
          num_workers: 0: threads of this process read ahead; else so many worker processes do.
          prefetch: batches read ahead (per worker).

        Raises:
          ValueError: process_count does not divide batch_size, or an argument is out of range.
        """
        if start < 0:
            raise ValueError(f"start = {start}: batches are counted from 0")
        if self.batch_size % process_count:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by {process_count} processes")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index {process_index} is not below process_count {process_count}")
        if num_workers < 0 or prefetch < 1:
            raise ValueError(f"num_workers = {num_workers} must be >= 0 and prefetch = {prefetch} >= 1")
        share = self.batch_size // process_count
        view = _Share(self, start, process_index * share, (process_index + 1) * share)
        return BatchIterator(view, num_workers, prefetch)


@dataclasses.dataclass(frozen=True)
class _Share:
    """One process's rows of batches first, first + 1, ...: what Grain iterates over."""

    batches: Batches
    first: int
    start: int
    stop: int

    def __len__(self) -> int:
        return sys.maxsize // 2

    def __getitem__(self, index: int) -> Batch:
        return self.batches.rows(self.first + int(index), self.start, self.stop)


class BatchIterator(Iterator[Batch]):
    """Batches, read ahead. Close it (or use it as a context manager) to stop its threads and processes."""

    def __init__(self, view: _Share, num_workers: int, prefetch: int) -> None:
        # A worker reads one batch at a time: its buffer, not its threads, is what reads ahead.
        threads = 1 if num_workers else prefetch
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        dataset = grain.MapDataset.source(view).to_iter_dataset(options)
        if num_workers:
            if not flags.FLAGS.is_parsed():  # Grain hands absl's flags to its workers, and we use none
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=prefetch)
            dataset = dataset.mp_prefetch(workers)
        self._iterator: Any = iter(dataset)

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise ValueError("the batch iterator is closed")
        return next(self._iterator)

    def close(self) -> None:
        """Stops reading ahead. Safe to call twice."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator.close()

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _stack(examples: list[dict[str, Any]], indices: list[int]) -> Batch:
    first = {key: np.asarray(value) for key, value in examples[0].items()}
    columns: dict[str, list[np.ndarray]] = {key: [] for key in first}
    for example, index in zip(examples, indices, strict=True):
        if example.keys() != first.keys():
            raise ValueError(
                f"example {index} has keys {sorted(example)}, example {indices[0]} has {sorted(first)}"
            )
        for key, value in example.items():
            array = np.asarray(value)
            if array.shape != first[key].shape or array.dtype != first[key].dtype:
                raise ValueError(
                    f"{key!r} of example {index} is {array.shape} {array.dtype}, "
                    f"of example {indices[0]} {first[key].shape} {first[key].dtype}"
                )
            columns[key].append(array)
    return {key: np.stack(arrays) for key, arrays in columns.items()}
