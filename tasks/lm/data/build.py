"""From a DataConfig to examples: the one function trainers and evaluators call."""

from typing import NamedTuple

from tasks.lm.data.config import DataConfig
from tasks.lm.data.documents import Documents, FlatDocuments, content_hashes, held_out, split
from tasks.lm.data.packing import Examples, PackedExamples, WholeDocuments, WindowExamples
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


class LMData(NamedTuple):
    """What `build` returns.

    train: training examples by index. Shuffle them, unless `train.ordered` (LongCrawl64's official batch order).
    validation: all held-out documents as examples of the same length, in order; None if nothing is held out.
    validation_documents: the first eval_length tokens of every held-out document that has as many (may be none).
    tokenizer: to encode prompts, decode samples, and count bytes per token.
    train_documents, held_out_documents: the documents behind them.
    """

    train: Examples
    validation: Examples | None
    validation_documents: WholeDocuments
    tokenizer: Tokenizer
    train_documents: Documents
    held_out_documents: Documents


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer a configuration names. A `bpe` is trained on the embedded training split, once, and cached.

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
        out = held_out(content_hashes(t.encode() for t in texts), config.validation_fraction)
        train = [t for t, o in zip(texts, out, strict=True) if not o]
        tokenizer = cached_bpe(train, config.bpe_vocab_size, config.cache())
    else:
        tokenizer = BytesTokenizer()
    return JsonEscaped(tokenizer) if config.json_escape or config.source == "longcrawl64" else tokenizer


def _stdlib(config: DataConfig, tokenizer: Tokenizer) -> tuple[Documents, Documents]:
    names, texts = zip(*stdlib_texts(), strict=True)
    documents = FlatDocuments(tokenizer.encode_batch(texts), names)
    return split(documents, content_hashes(t.encode() for t in texts), config.validation_fraction)


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
    train_documents, held_out_documents = _stdlib(config, tokenizer)
    train = _examples(config, train_documents, seq_len, tokenizer)
    return LMData(
        train=train,
        validation=_examples(config, held_out_documents, seq_len, tokenizer)
        if len(held_out_documents)
        else None,
        validation_documents=WholeDocuments(
            held_out_documents, eval_length or seq_len, bos_id=tokenizer.bos_id
        ),
        tokenizer=tokenizer,
        train_documents=train_documents,
        held_out_documents=held_out_documents,
    )


def _examples(config: DataConfig, documents: Documents, seq_len: int, tokenizer: Tokenizer) -> Examples:
    ids = {"bos_id": tokenizer.bos_id, "pad_id": tokenizer.pad_id}
    if config.mode == "windows":
        return WindowExamples(documents, seq_len, **ids)
    return PackedExamples(documents, seq_len, eos_id=tokenizer.eos_id, **ids)
