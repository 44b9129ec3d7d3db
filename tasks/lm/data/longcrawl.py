"""LongCrawl64: pre-tokenised zarr arrays (documents, 65536) through tensorstore, in the official batch order.

Documents are taken in groups of batch_size in file order (the remainder is dropped), each cut into windows
of T. Batch b reads window b div G of group b mod G, with G groups: every document's first window comes
before any second window. Labels are the window, inputs the window shifted right by one with BOS first.
(FoX, released training code.)
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from tasks.common.optional import need
from tasks.lm.data.packing import window_example
from tasks.lm.data.readers import DataFileError

_CACHE_BYTES = 256 << 20


def _reason(error: Exception) -> str:
    """tensorstore's message without the specification it appends."""
    return str(error).partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0]


class ZarrDocuments:
    """Rows of a two-dimensional zarr array (version 2 or 3, any codec tensorstore reads, blosc included).

    Args:
        path: the array's folder (the one that holds .zarray or zarr.json).
        vocab_size: ids at or above it stop the run when they are met.

    Raises:
        ImportError: tensorstore is missing.
        DataFileError: not a zarr array, or not one of token ids.
    """

    def __init__(self, path: str | Path, vocab_size: int):
        self.path, self.vocab_size = Path(path).expanduser().resolve(), vocab_size
        self._array: Any = None
        shape, dtype = self._open().shape, self._open().dtype.numpy_dtype
        if len(shape) != 2 or dtype.kind not in "ui" or 0 in shape:
            raise DataFileError(
                f"{self.path}: expected integer ids (documents, tokens), got {dtype} {tuple(shape)}"
            )
        self._lengths = np.full(shape[0], shape[1], np.int64)
        self.document_length = int(shape[1])

    def _open(self) -> Any:
        if self._array is None:
            tensorstore = need("tensorstore", "data.source='longcrawl64'")
            drivers = {".zarray": "zarr", "zarr.json": "zarr3"}
            driver = next((d for f, d in drivers.items() if (self.path / f).is_file()), None)
            if driver is None:
                raise DataFileError(f"{self.path}: not a zarr array: neither .zarray nor zarr.json is in it")
            spec = {
                "driver": driver,
                "kvstore": {"driver": "file", "path": f"{self.path}/"},
                # Zarr reads a chunk that is not there as zeros: an incomplete download would train on them.
                "fill_missing_data_reads": False,
                "context": {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}},
            }
            try:
                self._array = tensorstore.open(spec, read=True).result()
            except ValueError as error:
                raise DataFileError(f"{self.path}: {_reason(error)}") from error
        return self._array

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}

    @property
    def lengths(self) -> np.ndarray:
        return self._lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def rows(self, first: int, after: int, start: int, stop: int) -> Int[np.ndarray, "n T"]:
        """Tokens start..stop of documents first..after, int32, in one read.

        Raises:
            DataFileError: a chunk is missing or damaged, or an id is beyond the vocabulary.
        """
        try:
            ids = self._open()[first:after, start:stop].read().result().astype(np.int32)
        except (ValueError, FileNotFoundError) as error:
            raise DataFileError(f"{self.path}, documents {first}..{after - 1}: {_reason(error)}") from error
        if ids.size and (ids.max() >= self.vocab_size or ids.min() < 0):
            row = int(np.argmax((ids >= self.vocab_size).any(1) | (ids < 0).any(1)))
            raise DataFileError(
                f"{self.path}, document {first + row}: token id {ids[row].max()} is beyond the vocabulary of "
                f"{self.vocab_size}"
            )
        return ids

    def read(self, index: int, start: int, stop: int) -> np.ndarray:
        return self.rows(index, index + 1, start, stop)[0]

    def name(self, index: int) -> str:
        return f"{self.path.name}[{index}]"


class LongCrawlExamples:
    """Training examples in the official order: batch b is the b-th batch_size of them.

    Args:
        documents: the training array.
        seq_len: T; must divide the documents' length.
        batch_size: global batch size; decides the order.
        bos_id: first input of every window.

    Raises:
        ValueError: seq_len does not divide the documents, or there are fewer documents than batch_size.
    """

    ordered = True

    def __init__(self, documents: ZarrDocuments, seq_len: int, batch_size: int, *, bos_id: int):
        if seq_len < 1 or documents.document_length % seq_len:
            raise ValueError(
                f"seq_len={seq_len} does not divide the {documents.document_length} tokens of each "
                "document of "
                f"{documents.path}: use a power of two up to that"
            )
        if not 1 <= batch_size <= len(documents):
            raise ValueError(
                f"batch_size={batch_size} must be 1..{len(documents)} (documents in {documents.path})"
            )
        self.documents, self.seq_len, self.batch_size, self.bos_id = documents, seq_len, batch_size, bos_id
        self.groups = len(documents) // batch_size
        self.num_batches = self.groups * (documents.document_length // seq_len)

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        batch, row = divmod(int(index) % len(self), self.batch_size)
        return {k: v[0] for k, v in self._rows(batch, row, row + 1).items()}

    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Several examples stacked, [n, T] each. Rows of one batch that follow one another take one read."""
        parts = []
        for (batch, _), run in groupby(enumerate(indices), lambda item: self._run_of(*item)):
            rows = [index % self.batch_size for _, index in run]
            parts.append(self._rows(batch, rows[0], rows[-1] + 1))
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

    def _run_of(self, position: int, index: int) -> tuple[int, int]:
        """Equal for neighbours in a batch: its number, and by how much index is ahead of position."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return index // self.batch_size, index - position

    def _rows(self, batch: int, first: int, after: int) -> dict[str, np.ndarray]:
        """Rows first..after of a batch."""
        window, group = divmod(batch, self.groups)
        base, start = group * self.batch_size, window * self.seq_len
        rows = self.documents.rows(base + first, base + after, start, start + self.seq_len)
        examples = [window_example(r, self.seq_len, self.bos_id, self.bos_id) for r in rows]
        return {k: np.stack([e[k] for e in examples]) for k in examples[0]}

    def batch(self, batch: int, process_index: int = 0, process_count: int = 1) -> dict[str, np.ndarray]:
        """A process's contiguous share of batch `batch` in one read, arrays [batch_size / process_count, T].

        Raises:
            ValueError: batch_size is not a multiple of process_count.
            IndexError: batch outside 0..num_batches - 1.
        """
        if self.batch_size % process_count:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of process_count={process_count}"
            )
        if not 0 <= batch < self.num_batches:
            raise IndexError(f"batch {batch} of {self.num_batches}")
        share = self.batch_size // process_count
        return self._rows(batch, process_index * share, (process_index + 1) * share)


def find_arrays(path: str | Path, validation_path: str | Path = "") -> tuple[Path, Path | None]:
    """(training array, held-out array or None) in a folder of train.zarr, heldout.zarr; or the array itself.

    Raises:
        DataFileError: nothing there.
    """
    base = Path(path).expanduser()
    train = base / "train.zarr" if (base / "train.zarr").is_dir() else base
    held_out = Path(validation_path).expanduser() if validation_path else base / "heldout.zarr"
    if not train.is_dir():
        raise DataFileError(f"{base}: no such folder; expected a zarr array, or a folder with train.zarr")
    if validation_path and not held_out.is_dir():
        raise DataFileError(f"data.validation_path: {held_out}: no such folder")
    return train, held_out if held_out.is_dir() else None
