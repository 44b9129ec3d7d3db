"""Tokenizers: bytes (no dependency), GPT-2 BPE from rank files, tokenizer.json, BPE trained here.

All have the same face (`Tokenizer`). Nothing is ever downloaded.
"""

import base64
import binascii
import json
import warnings
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from tasks.common.optional import need
from tasks.common.storage import atomic_write

GPT2_RANKS = 50256
# The published GPT-2 pre-tokenisation pattern.
_GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_BOS_NAMES = ("<|bos|>", "<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>", "[BOS]", "[CLS]")
_EOS_NAMES = ("<|eos|>", "<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "[EOS]", "[SEP]")
_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>")


class Tokenizer:
    """What every tokenizer offers. Text in, int32 ids out; special ids are never produced from text."""

    name: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    fingerprint: str
    """Hex digest of everything that decides the ids: equal fingerprints give equal ids."""
    can_decode: bool = True
    token_bytes: np.ndarray | None
    """int32 [vocab_size]: UTF-8 bytes each id stands for, 0 for special ids. None where not known."""

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens]: ids of the text, without marks for its begin and end."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text; on all cores where the package behind it can."""
        return [self.encode(t) for t in texts]

    def decode_bytes(self, ids: Any) -> bytes:
        """The bytes that ids [tokens] stand for; special ids stand for none."""
        raise NotImplementedError

    def decode(self, ids: Any) -> str:
        """The text of ids [tokens]; broken UTF-8 sequences (a slice of a text) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


def _digest(*parts: str | bytes) -> str:
    state = blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()


class BytesTokenizer(Tokenizer):
    """Ids 0..255 are the bytes of the UTF-8 text; 256 begins, 257 ends a document, 258 pads."""

    name = "bytes"
    vocab_size, bos_id, eos_id, pad_id = 259, 256, 257, 258
    fingerprint = _digest("bytes", "256+bos+eos+pad")

    def __init__(self) -> None:
        self.token_bytes = np.concatenate([np.ones(256, np.int32), np.zeros(3, np.int32)])

    def encode(self, text: str) -> np.ndarray:
        # surrogatepass: a lone surrogate from a JSON file is kept rather than stopping a run.
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Any) -> bytes:
        ids = np.asarray(ids)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes()


class PretokenizedGPT2(Tokenizer):
    """Stands in for GPT-2 BPE where data is tokenised already and no rank files are at hand: ids, no text."""

    name = "gpt2-ids"
    vocab_size, bos_id, eos_id, pad_id = GPT2_RANKS + 1, GPT2_RANKS, GPT2_RANKS, GPT2_RANKS
    fingerprint = _digest("gpt2-ids")
    token_bytes = None
    can_decode = False

    def encode(self, text: str) -> np.ndarray:
        raise ValueError(self._message())

    def decode_bytes(self, ids: Any) -> bytes:
        raise ValueError(self._message())

    @staticmethod
    def _message() -> str:
        return (
            "this run has GPT-2 token ids but no rank files to turn them into text: set "
            "data.tokenizer='gpt2' and "
            "data.tokenizer_path=<a .tiktoken file, or a folder with encoder.json and vocab.bpe>"
        )


def _byte_symbols() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted: symbol -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _ranks_from_gpt2_files(folder: Path) -> dict[bytes, int]:
    """Token bytes -> rank from encoder.json, checked against the merge order of vocab.bpe."""
    symbols = _byte_symbols()
    try:
        encoder = json.loads((folder / "encoder.json").read_text("utf-8"))
        merges = (folder / "vocab.bpe").read_text("utf-8").splitlines()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder}: encoder.json or vocab.bpe is damaged: {error}") from error
    encoder.pop("<|endoftext|>", None)
    try:
        ranks = {bytes(symbols[c] for c in token): int(rank) for token, rank in encoder.items()}
    except KeyError as error:
        raise ValueError(f"{folder / 'encoder.json'}: {error} is no GPT-2 byte symbol") from error
    pairs = [m for m in merges if m and not m.startswith("#version")]
    for i, pair in enumerate(pairs):
        joined = bytes(symbols[c] for c in pair.replace(" ", ""))
        if ranks.get(joined) != 256 + i:
            raise ValueError(
                f"{folder}: merge {i} of vocab.bpe ({pair!r}) is not rank {256 + i} of encoder.json"
            )
    return ranks


def _ranks_from_tiktoken(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{path}:{number}: expected '<base64 token> <rank>', got {line[:60]!r}"
            ) from error
    return ranks


class GPT2Tokenizer(Tokenizer):
    """GPT-2 BPE. `path`: a .tiktoken rank file, or a folder (or a file in it) of encoder.json and vocab.bpe.

    The id after the last rank (50256 for the full table) begins, ends and pads documents.

    Raises:
        ImportError: tiktoken is not installed.
        ValueError: files missing, damaged, or of another vocabulary.
    """

    name = "gpt2"

    def __init__(self, path: str | Path):
        tiktoken = need("tiktoken", "GPT-2 BPE")
        path = Path(path)
        if path.is_file() and path.suffix == ".tiktoken":
            ranks = _ranks_from_tiktoken(path)
        else:
            folder = path if path.is_dir() else path.parent
            if not (folder / "encoder.json").is_file() or not (folder / "vocab.bpe").is_file():
                raise ValueError(
                    f"{path}: expected a .tiktoken file, or a folder with encoder.json and vocab.bpe"
                )
            ranks = _ranks_from_gpt2_files(folder)
        if sorted(ranks.values()) != list(range(len(ranks))) or any(
            bytes([b]) not in ranks for b in range(256)
        ):
            raise ValueError(
                f"{path}: ranks must be 0..{len(ranks) - 1} without gaps and hold all 256 single bytes"
            )
        if len(ranks) > GPT2_RANKS:
            raise ValueError(
                f"{path}: {len(ranks)} ranks, but GPT-2 has {GPT2_RANKS}: another vocabulary, whose text "
                "is split "
                "differently; give r50k_base.tiktoken, or that vocabulary's tokenizer.json with "
                "data.tokenizer='hf'"
            )
        end = len(ranks)
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": end}
        )
        self.bos_id = self.eos_id = self.pad_id = end
        self.vocab_size = end + 1
        self._table = [*sorted(ranks, key=ranks.__getitem__), b""]
        self.token_bytes = np.array([len(t) for t in self._table], np.int32)
        self.fingerprint = _digest("gpt2", _GPT2_PATTERN, *self._table)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoding.encode_ordinary(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._encoding.encode_ordinary_batch(list(texts))]

    def decode_bytes(self, ids: Any) -> bytes:
        return b"".join(self._table[i] for i in np.asarray(ids).tolist() if 0 <= i < self.vocab_size)


def _special(tokenizer: Any, wanted: str, names: tuple[str, ...], what: str, path: Path) -> int | None:
    for name in (wanted,) if wanted else names:
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    if wanted:
        raise ValueError(f"{path}: there is no token {wanted!r} to {what} a document")
    return None


class HFTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json. The tokens that begin and end documents are found by their usual names.

    Args:
        path: the file, or a folder that holds tokenizer.json.
        bos_token, eos_token: their names where they are unusual.

    Raises:
        ImportError: tokenizers is not installed.
        ValueError: not a tokenizer.json, or no token to begin or end documents with.
    """

    name = "hf"

    def __init__(self, path: str | Path, bos_token: str = "", eos_token: str = ""):
        package = need("tokenizers", "a tokenizer.json")
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"{path}: no such tokenizer.json")
        content = path.read_bytes()
        try:
            self._tokenizer = package.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{path}: not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        eos = _special(self._tokenizer, eos_token, _EOS_NAMES, "end", path)
        bos = _special(self._tokenizer, bos_token, _BOS_NAMES, "begin", path)
        eos = bos if eos is None else eos
        bos = eos if bos is None else bos
        if eos is None or bos is None:
            raise ValueError(
                f"{path}: no token named like {', '.join(_EOS_NAMES[:5])}: name the one that begins and "
                "the one that "
                "ends documents by data.bos_token and data.eos_token"
            )
        self.bos_id, self.eos_id = bos, eos
        pad = _special(self._tokenizer, "", _PAD_NAMES, "pad", path)
        self.pad_id = self.eos_id if pad is None else pad
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.fingerprint = _digest("hf", content, str(self.bos_id), str(self.eos_id))
        self._table = self._byte_table(json.loads(content))
        self.token_bytes = None if self._table is None else np.array([len(t) for t in self._table], np.int32)

    def _byte_table(self, description: dict) -> list[bytes] | None:
        """Bytes of each id, for byte-level BPE; None for other kinds, whose tokens are not byte strings."""
        if (description.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        symbols = _byte_symbols()
        special = {t["id"] for t in description.get("added_tokens", [])}
        table = [b""] * self.vocab_size
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index not in special:
                table[index] = bytes(symbols[c] for c in token if c in symbols)
        return table

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encoded]

    def decode_bytes(self, ids: Any) -> bytes:
        if self._table is None:
            return self.decode(ids).encode("utf-8", "replace")
        return b"".join(self._table[i] for i in np.asarray(ids).tolist() if 0 <= i < self.vocab_size)

    def decode(self, ids: Any) -> str:
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)


class JsonEscaped(Tokenizer):
    """Any tokenizer, on JSON-escaped text: what LongCrawl64 was made with.

    A newline is tokenised as backslash and n, non-ASCII as backslash, u and four digits. `token_bytes` and
    `decode_bytes` count the escaped text.
    """

    def __init__(self, inner: Tokenizer):
        self._inner = inner
        self.name = f"{inner.name}+json"
        self.vocab_size, self.token_bytes = inner.vocab_size, inner.token_bytes
        self.bos_id, self.eos_id, self.pad_id = inner.bos_id, inner.eos_id, inner.pad_id
        self.fingerprint = _digest("json-escaped", inner.fingerprint)

    def encode(self, text: str) -> np.ndarray:
        return self._inner.encode(json.dumps(text)[1:-1])

    def decode_bytes(self, ids: Any) -> bytes:
        return self._inner.decode_bytes(ids)

    def decode(self, ids: Any) -> str:
        escaped = self._inner.decode(ids)
        try:
            return json.loads(f'"{escaped}"')
        except json.JSONDecodeError:
            # A slice of a document may begin or end inside an escape, and a model can write one that is none:
            # it stays as it is, which Python does with a warning meant for source code.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                return escaped.encode("latin-1", "backslashreplace").decode("unicode_escape", "replace")


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> HFTokenizer:
    """Train a byte-level BPE and write it to `path` as a tokenizer.json. The same texts give the same file.

    Args:
        texts: what to learn from.
        vocab_size: ids in all, the three special ones (bos, eos, pad) included; at least 259.
        path: where the tokenizer.json goes.

    Raises:
        ImportError: tokenizers is not installed.
        ValueError: vocab_size < 259.
    """
    package = need("tokenizers", "training a BPE")
    if vocab_size < 259:
        raise ValueError(f"vocab_size must be at least 259 (256 bytes and 3 special ids), got {vocab_size}")
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"],
        initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    atomic_write(path, tokenizer.to_str())
    return HFTokenizer(path)


def cached_bpe(texts: list[str], vocab_size: int, cache: Path) -> HFTokenizer:
    """`train_bpe`, done once: the file's name carries the fingerprint of texts, size and package version."""
    package = need("tokenizers", "a BPE trained on the embedded text")
    key = _digest("bpe", str(vocab_size), package.__version__, *texts)
    path = cache / f"bpe-{vocab_size}-{key}.json"
    try:
        tokenizer = HFTokenizer(path)
    except ValueError:  # not there yet, or damaged
        tokenizer = train_bpe(texts, vocab_size, path)
    tokenizer.name = "bpe"
    return tokenizer
