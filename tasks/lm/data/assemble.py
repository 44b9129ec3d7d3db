"""From a DataConfig to examples: the one function trainers and evaluators call."""

import logging
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.common.data_command import progress_bar
from tasks.lm.data.config import DataConfig
from tasks.lm.data.documents import (
    Documents,
    FlatDocuments,
    Subset,
    content_hashes,
    held_out,
    scattered_order,
    split,
)
from tasks.lm.data.longcrawl import LongCrawlExamples, ZarrDocuments, find_arrays
from tasks.lm.data.packing import DocumentStarts, Examples, PackedExamples, WindowExamples
from tasks.lm.data.prepare import prepare
from tasks.lm.data.readers import FolderReader, Reader, TfdsReader
from tasks.lm.data.shards import MANIFEST, ShardDocuments
from tasks.lm.data.stdlib import stdlib_texts
from tasks.lm.data.tokenizers import (
    BytesTokenizer,
    GPT2Tokenizer,
    HFTokenizer,
    JsonEscaped,
    PretokenizedGPT2,
    Tokenizer,
    cached_bpe,
)

_log = logging.getLogger(__name__)


class LMData(NamedTuple):
    """What `build` returns.

    train: training examples by index. Shuffle them, unless `train.ordered` (LongCrawl64's official batch
    order).
    validation: all held-out documents as examples of the same length, in order; None if nothing is held out.
    validation_documents: the first eval_length tokens of every held-out document that has as many (may be
    none).
    tokenizer: to encode prompts, decode samples, and count bytes per token.
    train_documents, held_out_documents: the documents behind them.
    """

    train: Examples
    validation: Examples | None
    validation_documents: DocumentStarts
    tokenizer: Tokenizer
    train_documents: Documents
    held_out_documents: Documents


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer a configuration names. A `bpe` is trained on the embedded training split, once.

    Raises:
        ImportError: an optional package is missing.
        ValueError: its files are missing or damaged.
    """
    if config.source == "longcrawl64" and not config.tokenizer_path:
        return PretokenizedGPT2()
    if config.tokenizer == "gpt2":
        tokenizer: Tokenizer = GPT2Tokenizer(config.tokenizer_path)
    elif config.tokenizer == "hf":
        tokenizer = HFTokenizer(config.tokenizer_path, config.bos_token, config.eos_token)
    elif config.tokenizer == "bpe":
        texts = [text for _, text in stdlib_texts()]
        # Learnt from the training split where that is what is trained on; else the usual split, so that
        # shards made with it fit whatever validation_fraction they are trained with.
        fraction = config.validation_fraction if config.source == "stdlib" else DataConfig.validation_fraction
        out = held_out(content_hashes(t.encode() for t in texts), fraction)
        train = [t for t, o in zip(texts, out, strict=True) if not o]
        tokenizer = cached_bpe(train, config.bpe_vocab_size, config.cache())
    else:
        tokenizer = BytesTokenizer()
    return JsonEscaped(tokenizer) if config.json_escape or config.source == "longcrawl64" else tokenizer


def _stdlib(config: DataConfig, tokenizer: Tokenizer) -> tuple[Documents, Documents]:
    names, texts = zip(*stdlib_texts(), strict=True)
    documents = FlatDocuments(tokenizer.encode_batch(texts), names)
    return split(documents, content_hashes(t.encode() for t in texts), config.validation_fraction)


def open_shards(config: DataConfig, tokenizer: Tokenizer) -> ShardDocuments:
    """The shards behind sources `text` and `tfds`. Raw text is made into shards in the cache first, once.

    Raises:
        ImportError: an optional package is missing.
        DataFileError: what cannot be read, and why.
    """
    folder = Path(config.path).expanduser()
    if config.source == "text" and ((folder / MANIFEST).is_file() or any(folder.glob("shard-*.json"))):
        return ShardDocuments(folder, tokenizer, allow_changed_inputs=config.allow_changed_inputs)
    if config.source == "text":
        reader: Reader = FolderReader(config.path, config.text_field)
    else:
        reader = TfdsReader(config.tfds_name, config.path, config.tfds_split, config.text_field)
    options = [reader.location, reader.options, tokenizer.fingerprint, config.cut, config.on_error]
    output = config.cache() / f"shards-{blake2b(repr(options).encode(), digest_size=8).hexdigest()}"
    with progress_bar("tokenising", "bytes") as progress:
        manifest = prepare(
            reader, tokenizer, output, cut=config.cut, on_error=config.on_error, progress=progress
        )
    for entry in manifest["skipped"]:
        _log.warning("left out: %s: %s", entry["name"], entry["reason"])
    return ShardDocuments(output, tokenizer)


def build(
    config: DataConfig,
    seq_len: int,
    *,
    batch_size: int | None = None,
    eval_length: int | None = None,
    vocab_size: int | None = None,
) -> LMData:
    """Open a source and make its examples; checks everything that can be checked without training.

    Args:
        config: what and how.
        seq_len: T, tokens in an example.
        batch_size: global batch size; needed by longcrawl64, whose official order depends on it.
        eval_length: tokens of each validation document (default: seq_len).
        vocab_size: the model's vocabulary; it must hold every id of the tokenizer and of the data.

    Raises:
        ImportError: an optional package is missing.
        ValueError: files missing, damaged or changed, shards of another tokenizer, vocabulary too small, ...
    """
    tokenizer = make_tokenizer(config)
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size} is smaller than the {tokenizer.vocab_size} ids of the tokenizer "
            f"{tokenizer.name!r}: set it to {tokenizer.vocab_size} or more"
        )
    if config.source == "longcrawl64":
        train_documents, held_out_documents, train = _longcrawl(config, tokenizer, seq_len, batch_size)
    else:
        if config.source == "stdlib":
            train_documents, held_out_documents = _stdlib(config, tokenizer)
        elif config.source == "text" and config.validation_path:
            train_documents, held_out_documents = _given_split(config, tokenizer)
        else:
            shards = open_shards(config, tokenizer)
            train_documents, held_out_documents = split(shards, shards.hashes, config.validation_fraction)
        train = _examples(config, train_documents, seq_len, tokenizer)
    ids = {"bos_id": tokenizer.bos_id, "pad_id": tokenizer.pad_id}
    return LMData(
        train=train,
        validation=_examples(config, held_out_documents, seq_len, tokenizer)
        if len(held_out_documents)
        else None,
        validation_documents=DocumentStarts(held_out_documents, eval_length or seq_len, **ids),
        tokenizer=tokenizer,
        train_documents=train_documents,
        held_out_documents=held_out_documents,
    )


def _given_split(config: DataConfig, tokenizer: Tokenizer) -> tuple[Documents, Documents]:
    """The documents of `path` and of `validation_path`, each in a scattered order: a part of the held-out
    ones is a fair sample.

    Raises:
        ValueError: a text is on both sides.
    """
    train = open_shards(config, tokenizer)
    held = open_shards(replace(config, path=config.validation_path), tokenizer)
    common = np.flatnonzero(np.isin(held.hashes, train.hashes))
    if len(common):
        raise ValueError(
            f"{len(common)} document(s) of {config.validation_path} are also in {config.path}, the first is "
            f"{held.name(int(common[0]))}: what is held out must not be trained on"
        )
    return Subset(train, scattered_order(len(train))), Subset(held, scattered_order(len(held)))


def _longcrawl(
    config: DataConfig, tokenizer: Tokenizer, seq_len: int, batch_size: int | None
) -> tuple[Documents, Documents, Examples]:
    if batch_size is None:
        raise ValueError(
            "data.source='longcrawl64' needs the global batch size: its official order depends on it"
        )
    train_path, held_out_path = find_arrays(config.path, config.validation_path)
    documents = ZarrDocuments(train_path, tokenizer.vocab_size)
    train = LongCrawlExamples(documents, seq_len, batch_size, bos_id=tokenizer.bos_id)
    if held_out_path is None:
        return documents, FlatDocuments([], []), train
    return documents, ZarrDocuments(held_out_path, tokenizer.vocab_size), train


def _examples(config: DataConfig, documents: Documents, seq_len: int, tokenizer: Tokenizer) -> Examples:
    ids = {"bos_id": tokenizer.bos_id, "pad_id": tokenizer.pad_id}
    if config.mode == "windows":
        return WindowExamples(documents, seq_len, **ids)
    return PackedExamples(documents, seq_len, eos_id=tokenizer.eos_id, **ids)
