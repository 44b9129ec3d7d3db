"""Byte n-gram models: what a language model has to beat before its loss says anything.

Interpolated Witten-Bell smoothing with a strength per order: P_n(c | h) = (N(h, c) + s_n U(h) P_{n-1}(c)) /
(N(h) + s_n U(h)), with N counts, U(h) the number of different symbols seen after h (at least 1), P_0
uniform. The strengths are chosen on a tenth of the training documents (see `fit`). Symbols are the 256
bytes and the end of the document; contexts before its start are a mark of their own. So the models predict
exactly the labels of mode `packed`, with full context, and figures are comparable: nats summed over bytes
and ends, divided by the number of bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import log

import numpy as np
from jaxtyping import Float, Int

from tasks.lm.data.documents import Documents, scattered_order
from tasks.lm.data.tokenizers import Tokenizer

ORDERS = ("unigram", "bigram", "trigram")
_SYMBOLS = 257
_EDGE = 256  # as a label: the end of the document; as context: its beginning
_STRENGTHS = (0.5, 1.0, 2.0)


def byte_documents(
    documents: Documents, tokenizer: Tokenizer, limit_bytes: int | None = None
) -> Iterator[bytes]:
    """The documents' bytes, until `limit_bytes` in all are reached (None: all)."""
    left = float("inf") if limit_bytes is None else limit_bytes
    for index, length in enumerate(documents.lengths):
        if left <= 0:
            return
        content = tokenizer.decode_bytes(documents.read(index, 0, int(length)))
        left -= len(content)
        yield content


def _grams(contents: Sequence[bytes]) -> tuple[Int[np.ndarray, " n"], ...]:
    """(two back, one back, label) for every byte and every end."""
    edge = bytes(0)
    size = sum(len(c) + 3 for c in contents)
    stream = np.full(size, _EDGE, np.int32)
    label = np.zeros(size, bool)
    at = 0
    for content in contents:
        n = len(content)
        stream[at + 2 : at + 2 + n] = np.frombuffer(content or edge, np.uint8)
        label[at + 2 : at + 3 + n] = True
        at += n + 3
    where = np.flatnonzero(label)
    return stream[where - 2], stream[where - 1], stream[where]


class _Counts:
    """Counts of labels after 0, 1 and 2 symbols."""

    def __init__(self, contents: Sequence[bytes]):
        a, b, c = _grams(contents)
        s = _SYMBOLS
        self.tables = (
            np.bincount(c, minlength=s),
            np.bincount(b * s + c, minlength=s * s).reshape(s, s),
            np.bincount((a * s + b) * s + c, minlength=s**3).reshape(s, s, s),
        )

    def probability(self, grams: tuple[np.ndarray, ...], strengths: Sequence[float]) -> list[np.ndarray]:
        """P of each label under orders 1, 2, 3, float64."""
        a, b, c = grams
        lower = np.full(c.shape, 1 / _SYMBOLS)
        out = []
        for table, context, strength in zip(self.tables, ((), (b,), (a, b)), strengths, strict=True):
            totals = table.sum(-1)[context]
            unseen = strength * np.maximum((table > 0).sum(-1)[context], 1)
            lower = (table[(*context, c)] + unseen * lower) / (totals + unseen)
            out.append(lower)
        return out


@dataclass(frozen=True)
class Score:
    """Held-out figures of one model: total nats, the bytes they are spread over."""

    nats: float
    bytes: int

    @property
    def nats_per_byte(self) -> float:
        return self.nats / self.bytes

    @property
    def bits_per_byte(self) -> float:
        return self.nats_per_byte / log(2)


class NgramModels:
    """Unigram, bigram and trigram byte models fitted on the same documents.

    Args:
        contents: the training documents, as bytes.

    Raises:
        ValueError: nothing to fit on.
    """

    def __init__(self, contents: Sequence[bytes]):
        if sum(map(len, contents)) == 0:
            raise ValueError("no bytes to fit n-gram models on")
        self.strengths = self._choose(contents)
        self._counts = _Counts(contents)

    @staticmethod
    def _choose(contents: Sequence[bytes]) -> tuple[float, ...]:
        """Strengths that predict a tenth of the training documents best from the other nine tenths."""
        order = scattered_order(len(contents))
        cut = len(contents) // 10
        if cut == 0:
            return (1.0, 1.0, 1.0)
        grams = _grams([contents[i] for i in order[:cut]])
        counts = _Counts([contents[i] for i in order[cut:]])
        trials = ((1.0, *pair) for pair in product(_STRENGTHS, repeat=2))
        return min(trials, key=lambda s: -np.log(counts.probability(grams, s)[-1]).sum())

    def nats(self, content: bytes, order: str = "trigram") -> Float[np.ndarray, " n"]:
        """-ln P of every byte of a document and of its end, float64 [len + 1]."""
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        return -np.log(self._counts.probability(_grams([content]), self.strengths)[ORDERS.index(order)])

    def score(self, contents: Sequence[bytes]) -> dict[str, Score]:
        """Figures on held-out documents, by order.

        Raises:
            ValueError: nothing to score.
        """
        size = sum(map(len, contents))
        if size == 0:
            raise ValueError("no bytes to score n-gram models on")
        probabilities = self._counts.probability(_grams(contents), self.strengths)
        return {o: Score(float(-np.log(p).sum()), size) for o, p in zip(ORDERS, probabilities, strict=True)}
