"""Tokenised documents by index, and how they are split into training and held-out ones.

Every source ends in one of these: token ids per document, readable in slices without a pass over the data.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, UInt64


@runtime_checkable
class Documents(Protocol):
    """Random access to tokenised documents. Ids are what the tokenizer gave: no begin or end marks inside."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: tokens in each document."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: tokens `start`..`stop` of document `index`, 0 <= start <= stop <= length."""
        ...

    def name(self, index: int) -> str:
        """Where the document came from, for messages."""
        ...


class FlatDocuments:
    """Documents held in one array in memory (the embedded source, tests, small folders)."""

    def __init__(self, arrays: Sequence[np.ndarray], names: Sequence[str]):
        if len(arrays) != len(names):
            raise ValueError(f"{len(arrays)} documents but {len(names)} names")
        self._lengths = np.array([len(a) for a in arrays], np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self._lengths)])
        self._tokens = np.concatenate(arrays) if len(arrays) else np.zeros(0, np.int32)
        self._names = list(names)

    @property
    def lengths(self) -> np.ndarray:
        return self._lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def read(self, index: int, start: int, stop: int) -> np.ndarray:
        base = self._offsets[index]
        return self._tokens[base + start : base + stop].astype(np.int32)

    def name(self, index: int) -> str:
        return self._names[index]


class Subset:
    """Some documents of a source, in a given order."""

    def __init__(self, documents: Documents, indices: Int[np.ndarray, " n"]):
        self.source = documents
        self._indices = np.asarray(indices, np.int64)
        self._lengths = documents.lengths[self._indices]

    @property
    def lengths(self) -> np.ndarray:
        return self._lengths

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int, start: int, stop: int) -> np.ndarray:
        return self.source.read(int(self._indices[index]), start, stop)

    def name(self, index: int) -> str:
        return self.source.name(int(self._indices[index]))


def content_hash(content: bytes) -> int:
    """64-bit hash of a document's bytes: what the split and the change checks go by."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big")


def content_hashes(contents: Iterable[bytes]) -> UInt64[np.ndarray, " n"]:
    """`content_hash` of each document, uint64."""
    return np.array([content_hash(c) for c in contents], np.uint64)


def held_out(hashes: UInt64[np.ndarray, " n"], fraction: float) -> Bool[np.ndarray, " n"]:
    """True for the documents kept for validation: those with a hash in the lowest `fraction` of its range.

    Membership depends on a document's content alone, so adding, renaming or reordering files moves no other
    document across, and two copies of a text are always on one side. If no document falls in, the one with
    the lowest hash (and its copies) is taken, so that a small folder has something to validate on.

    Args:
        hashes: content hash of each document.
        fraction: expected share of documents, 0 <= fraction < 1; 0 keeps none out.

    Raises:
        ValueError: `fraction` outside [0, 1), or nothing would be left to train on.
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"validation_fraction must be in [0, 1), got {fraction}")
    if fraction == 0.0 or len(hashes) == 0:
        return np.zeros(len(hashes), bool)
    chosen = hashes < np.uint64(int(fraction * 2**64))
    if not chosen.any():
        chosen = hashes == hashes.min()
    if chosen.all():
        raise ValueError(
            f"all {len(hashes)} document(s) fall into the validation split, none is left to train on: the "
            "split is by document, so give more than one (for one long text: set cut=65536, which makes "
            "documents of it by cutting at line ends), lower validation_fraction, or set "
            "it to 0 to validate on nothing"
        )
    return chosen


def scattered_order(count: int) -> Int[np.ndarray, " count"]:
    """A fixed pseudo-random order of `count` documents, the same in every version of every library.

    Neighbouring files (one folder, one crawl) would otherwise share packed rows. splitmix64 of the index is
    the sort key.
    """
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable").astype(np.int64)


def split(
    documents: Documents, hashes: UInt64[np.ndarray, " n"], validation_fraction: float
) -> tuple[Subset, Subset]:
    """Training documents (in a scattered order) and held-out ones (in source order); see `held_out`."""
    out = held_out(hashes, validation_fraction)
    train = np.flatnonzero(~out)
    return Subset(documents, train[scattered_order(len(train))]), Subset(documents, np.flatnonzero(out))
