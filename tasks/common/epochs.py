"""The order of training examples that are drawn anew every time they are seen."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import grain


@dataclass(frozen=True)
class EpochOrder:
    """The order of training: batch k -> indices of its rows, for `Batches`.

    Every epoch is a new permutation of all items, batches running on across its end. With repeats, an epoch
    shows every item that many times in a row, drawn anew each time (repeated augmentation). An index counts
    draws as well as items: index = draw * items + item.

    items, batch_size: how many.
    seed: of the shuffle.
    repeats: times in a row, at least 1.
    """

    items: int
    batch_size: int
    seed: int
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats = {self.repeats}: must be at least 1")

    @cached_property
    def _shuffled(self) -> Any:
        return grain.MapDataset.range(self.items).shuffle(seed=self.seed % 2**32).repeat()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_shuffled"}

    def __call__(self, k: int) -> list[int]:
        rows = []
        for position in range(k * self.batch_size, (k + 1) * self.batch_size):
            shown, repeat = divmod(position, self.repeats)
            draw = shown // self.items * self.repeats + repeat
            rows.append(draw * self.items + int(self._shuffled[shown]))
        return rows
