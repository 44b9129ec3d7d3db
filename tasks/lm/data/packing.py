"""From documents to training examples of a fixed length, by index, without a pass over the data.

Two modes:

packed    The documents are laid end to end, each as `BOS t0 .. t(n-1)` with labels `t0 .. t(n-1) EOS`, and
          the stream is cut into rows of T. `reset` marks document starts and row starts: nothing is
          attended or carried across a mark. A document longer than its row goes on in the next one from a
          fresh state.
windows   Each document is cut into windows of T (the paper's protocol): labels are the window itself,
          inputs the window shifted right by one with BOS first, so the token before the window is not used
          and a document's end is not predicted. The last window of a document is padded.

Both pad with `pad_id`, `loss_mask` False, the padding being a segment of its own. Example i comes from
prefix sums by binary search, O(log documents).
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from tasks.lm.data.documents import Documents

Example = Mapping[str, np.ndarray]


@runtime_checkable
class Examples(Protocol):
    """Training examples by index. `ordered` asks for batches in index order (no shuffling)."""

    seq_len: int
    ordered: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """tokens, labels int32 [T]; reset, loss_mask bool [T]."""
        ...


def _check(seq_len: int, documents: Documents) -> None:
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}")
    if len(documents) == 0:
        raise ValueError("no documents to make examples from")


def _check_index(index: int, length: int) -> int:
    if not -length <= index < length:
        raise IndexError(f"example {index} of {length}")
    return int(index) % length


def window_example(
    window: Int[np.ndarray, " n"], seq_len: int, bos_id: int, pad_id: int
) -> dict[str, np.ndarray]:
    """One example with labels `window` (n <= seq_len tokens): inputs shifted right, BOS first; then pads."""
    n = len(window)
    tokens = np.full(seq_len, pad_id, np.int32)
    labels = np.full(seq_len, pad_id, np.int32)
    tokens[0] = bos_id
    tokens[1:n] = window[: n - 1]
    labels[:n] = window
    reset = np.zeros(seq_len, bool)
    reset[0] = True
    reset[n : n + 1] = True
    return {"tokens": tokens, "labels": labels, "reset": reset, "loss_mask": np.arange(seq_len) < n}


class PackedExamples:
    """Mode `packed`: rows of the stream of all documents.

    Args:
        documents: the documents, in stream order.
        seq_len: T, tokens in a row.
        bos_id, eos_id, pad_id: special ids.

    Raises:
        ValueError: no documents, or seq_len < 1.
    """

    ordered = False

    def __init__(self, documents: Documents, seq_len: int, *, bos_id: int, eos_id: int, pad_id: int):
        _check(seq_len, documents)
        self.documents, self.seq_len = documents, seq_len
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        # starts[i]: where document i begins in the stream; it takes its length plus one (BOS in, EOS out).
        self.starts = np.concatenate([[0], np.cumsum(documents.lengths + 1)]).astype(np.int64)

    def __len__(self) -> int:
        return int(-(-self.starts[-1] // self.seq_len))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = _check_index(index, len(self)) * self.seq_len
        tokens = np.full(self.seq_len, self.pad_id, np.int32)
        labels = np.full(self.seq_len, self.pad_id, np.int32)
        reset = np.zeros(self.seq_len, bool)
        reset[0] = True
        end = min(row + self.seq_len, int(self.starts[-1]))
        document = int(np.searchsorted(self.starts, row, side="right")) - 1
        position = row
        while position < end:
            first, after = int(self.starts[document]), int(self.starts[document + 1])
            stop = min(after, end)
            self._fill(tokens, labels, reset, document, position - first, stop - first, position - row)
            position, document = stop, document + 1
        filled = end - row
        reset[filled : filled + 1] = True
        return {
            "tokens": tokens,
            "labels": labels,
            "reset": reset,
            "loss_mask": np.arange(self.seq_len) < filled,
        }

    def _fill(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        reset: np.ndarray,
        document: int,
        start: int,
        stop: int,
        at: int,
    ) -> None:
        """Write stream positions start..stop of a document (position 0 holds BOS) from column `at` on."""
        n = stop - start
        length = int(self.documents.lengths[document])
        # Inputs are ids start-1..stop-1 and labels start..stop: one read serves both.
        ids = self.documents.read(document, max(start - 1, 0), min(stop, length))
        if start == 0:
            ids = np.concatenate([np.array([self.bos_id], np.int32), ids])
            reset[at] = True
        if stop > length:
            ids = np.concatenate([ids, np.array([self.eos_id], np.int32)])
        tokens[at : at + n] = ids[:n]
        labels[at : at + n] = ids[1 : n + 1]


class WindowExamples:
    """Mode `windows`: every window of T tokens of every document, in order. Empty documents give none.

    Raises:
        ValueError: no documents, or seq_len < 1, or all documents empty.
    """

    ordered = False

    def __init__(self, documents: Documents, seq_len: int, *, bos_id: int, pad_id: int):
        _check(seq_len, documents)
        self.documents, self.seq_len, self.bos_id, self.pad_id = documents, seq_len, bos_id, pad_id
        windows = -(-documents.lengths // seq_len)
        self.starts = np.concatenate([[0], np.cumsum(windows)]).astype(np.int64)
        if self.starts[-1] == 0:
            raise ValueError("all documents are empty")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = _check_index(index, len(self))
        document = int(np.searchsorted(self.starts, index, side="right")) - 1
        start = (index - int(self.starts[document])) * self.seq_len
        stop = min(start + self.seq_len, int(self.documents.lengths[document]))
        window = self.documents.read(document, start, stop)
        return window_example(window, self.seq_len, self.bos_id, self.pad_id)


class DocumentStarts:
    """The first `length` tokens of every document that has at least `min_tokens`, BOS at position 0.

    What loss by position is measured on; there may be no such document. Examples are as in mode `windows`:
    documents shorter than `length` are padded and masked, so that later positions rest on fewer of them.

    Args:
        documents: usually the held-out ones.
        length: tokens of an example.
        bos_id, pad_id: special ids.
        min_tokens: None means `length`, the paper's protocol: every position rests on the same documents.

    Attributes:
        indices: the documents used.

    Raises:
        ValueError: not 1 <= min_tokens <= length.
    """

    ordered = True

    def __init__(
        self, documents: Documents, length: int, *, bos_id: int, pad_id: int, min_tokens: int | None = None
    ):
        least = length if min_tokens is None else min_tokens
        if not 1 <= least <= length:
            raise ValueError(f"length = {length}, min_tokens = {least}: must be 1 <= min_tokens <= length")
        self.documents, self.seq_len, self.bos_id, self.pad_id = documents, length, bos_id, pad_id
        self.indices = np.flatnonzero(documents.lengths >= least)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        document = int(self.indices[_check_index(index, len(self))])
        stop = min(self.seq_len, int(self.documents.lengths[document]))
        return window_example(self.documents.read(document, 0, stop), self.seq_len, self.bos_id, self.pad_id)
