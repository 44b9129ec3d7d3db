"""Token shards on disk: what `prepare` writes and training reads by memory map.

A folder of shards:

shard-00000.tokens   token ids, little-endian uint16 or uint32, documents end to end, no special ids
shard-00000.index    .npy of one record a document: length (tokens), bytes (UTF-8), hash (of the text)
shard-00000.json     what the shard was made of, its checksums, what was left out; written last: it makes
                     the shard valid
manifest.json        the whole: tokenizer, options, inputs, totals; written when all shards are there
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64

from tasks.common.storage import checksum
from tasks.lm.data.readers import DataFileError, FolderReader, Slice
from tasks.lm.data.tokenizers import Tokenizer

FORMAT = "foxtrot-text-shards"
VERSION = 1
MANIFEST = "manifest.json"
INDEX = np.dtype([("length", "<i8"), ("bytes", "<i8"), ("hash", "<u8")])
PREPARE = "python -m tasks.lm.data prepare --input=DIR --output=DIR --tokenizer=..."


def tokenizer_record(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the manifest keeps of a tokenizer."""
    return {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Raises:
        DataFileError: none there, unfinished, damaged, or of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if any(folder.glob("shard-*.json")):
            raise DataFileError(
                f"{folder}: preparing it has not finished: run the same `prepare` command again"
            )
        raise DataFileError(f"{folder}: no {MANIFEST}: not a folder of shards; make one by `{PREPARE}`")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataFileError(f"{path}: damaged: {error}; run `prepare` again") from error
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or manifest.get("version") != VERSION
    ):
        raise DataFileError(f"{path}: not a manifest of {FORMAT} version {VERSION}; run `prepare` again")
    return manifest


def changed_inputs(manifest: dict[str, Any]) -> str | None:
    """The first difference between the input folder now and when it was prepared, or None.

    An input that has been moved away or is no folder of files is no difference: shards stand on their own.
    A file whose time has changed is read again and compared by content.
    """
    if manifest["options"].get("reader") != "folder" or not Path(manifest["input"]).exists():
        return None
    reader = FolderReader(manifest["input"], manifest["options"]["field"])
    then = {(i["path"], i["start"]): i for i in manifest["inputs"]}
    now = {(s.path, s.start): s for s in reader.plan()}
    for path, _ in sorted(then.keys() - now.keys()):
        return f"{path} is gone or shorter"
    for path, _ in sorted(now.keys() - then.keys()):
        return f"{path} is new or longer"
    for key, part in now.items():
        old = then[key]
        if part.size != old["size"]:
            return f"{part.path} had {old['size']} bytes and has {part.size}"
        if part.mtime_ns != old["mtime_ns"] and reader.digest(part) != old["digest"]:
            return f"{part.path} has other content"
    return None


class ShardDocuments:
    """Documents of a folder of shards, memory-mapped. Copies sent to other processes open their own maps.

    Args:
        folder: the folder of shards.
        tokenizer: must be the one the shards were made with (equal fingerprints).
        allow_changed_inputs: accept that the files the shards were made from have changed since.

    Raises:
        DataFileError: unfinished or damaged shards, another tokenizer, changed inputs, or ids beyond the
        vocabulary.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer, *, allow_changed_inputs: bool = False):
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder)
        self._check_tokenizer(tokenizer)
        if not allow_changed_inputs and (difference := changed_inputs(self.manifest)):
            raise DataFileError(
                f"{self.folder}: its input {self.manifest['input']} has changed since it was prepared: "
                f"{difference}. "
                "Run `prepare` again (only what changed is redone), or set data.allow_changed_inputs=True"
            )
        self._dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self._shards = self.manifest["shards"]
        index = np.concatenate([self._index(s) for s in self._shards]) if self._shards else np.zeros(0, INDEX)
        self._lengths = index["length"].astype(np.int64)
        self.document_bytes = index["bytes"].astype(np.int64)
        self.hashes: UInt64[np.ndarray, " n"] = index["hash"].astype(np.uint64)
        counts = [s["documents"] for s in self._shards]
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self._lengths)])
        self._maps: dict[int, np.ndarray] = {}

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        made_with = self.manifest["tokenizer"]
        if made_with["fingerprint"] != tokenizer.fingerprint:
            raise DataFileError(
                f"{self.folder}: made with tokenizer {made_with['name']!r} ({made_with['vocab_size']} "
                "ids, fingerprint "
                f"{made_with['fingerprint'][:12]}), but the configuration has {tokenizer.name!r} "
                f"({tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint[:12]}): set "
                "data.tokenizer and "
                "data.tokenizer_path to the one it was made with, or prepare again with this one"
            )
        if self.manifest["max_id"] >= tokenizer.vocab_size:
            raise DataFileError(
                f"{self.folder}: holds token id {self.manifest['max_id']}, but the vocabulary has "
                f"{tokenizer.vocab_size}"
            )

    def _index(self, shard: dict[str, Any]) -> np.ndarray:
        """The index of one shard, once both files are seen to have the size (`verify` checks every byte)."""
        path = self.folder / f"{shard['name']}.index"
        tokens = self.folder / f"{shard['name']}.tokens"
        expected = shard["tokens"] * self._dtype.itemsize
        if not tokens.is_file() or tokens.stat().st_size != expected:
            raise DataFileError(
                f"{tokens}: missing or not {expected} bytes long: damaged; run `prepare` again"
            )
        try:
            index = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise DataFileError(f"{path}: damaged: {error}; run `prepare` again") from error
        if (
            index.dtype != INDEX
            or len(index) != shard["documents"]
            or index["length"].sum() != shard["tokens"]
        ):
            raise DataFileError(f"{path}: does not fit the manifest: damaged; run `prepare` again")
        return index

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    @property
    def lengths(self) -> np.ndarray:
        return self._lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def read(self, index: int, start: int, stop: int) -> np.ndarray:
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        if shard not in self._maps:
            path = self.folder / f"{self._shards[shard]['name']}.tokens"
            self._maps[shard] = np.memmap(path, self._dtype, mode="r")
        base = self._offsets[index] - self._offsets[self._first[shard]]
        return np.asarray(self._maps[shard][base + start : base + stop]).astype(np.int32)

    def name(self, index: int) -> str:
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        within = index - int(self._first[shard])
        files = [f for f in self._shards[shard]["files"] if f["first"] <= within]
        return f"{files[-1]['path']}#{within - files[-1]['first']}"

    def verify(self) -> None:
        """Read every byte and compare checksums.

        Raises:
            DataFileError: names the first damaged file.
        """
        for shard in self._shards:
            for kind in ("tokens", "index"):
                path = self.folder / f"{shard['name']}.{kind}"
                if checksum(path) != shard[f"{kind}_crc32"]:
                    raise DataFileError(f"{path}: damaged (checksum differs); run `prepare` again")


def slice_record(part: Slice, digest: str) -> dict[str, Any]:
    """What the manifest keeps of a slice of the input."""
    return {**asdict(part), "digest": digest}
