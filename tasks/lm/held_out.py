"""A model and byte n-gram models on the same held-out documents, per byte of their text."""

from typing import Any

import numpy as np

from tasks.common.progress import Progressing, no_progress
from tasks.lm.data import Documents, PackedExamples, Tokenizer
from tasks.lm.data.documents import Subset
from tasks.lm.data.ngram import NgramModels, byte_documents
from tasks.lm.evaluators import Scorer, Totals, score_examples


def first_documents(documents: Documents, tokens: int) -> Subset:
    """The first documents that together have at most `tokens` tokens; at least one."""
    count = int(np.searchsorted(np.cumsum(documents.lengths), tokens, side="right"))
    return Subset(documents, np.arange(max(1, count)))


def score_documents(
    scorer: Scorer,
    params: Any,
    documents: Documents,
    seq_len: int,
    tokenizer: Tokenizer,
    progress: Progressing = no_progress,
) -> Totals:
    """Loss of every token and end of the documents, packed into rows of `seq_len`.

    A row starts from an empty state, so that long documents are read in pieces, as in training.
    """
    packed = PackedExamples(
        documents, seq_len, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id
    )
    return score_examples(scorer, params, packed, tokenizer.token_bytes, progress=progress)


def ngram_nats_per_byte(
    train: Documents, held_out: Documents, tokenizer: Tokenizer, train_bytes: int
) -> dict[str, float]:
    """Unigram, bigram and trigram byte models fitted on the training split, on the held-out documents.

    Args:
      train, held_out: documents of one tokenizer that can decode.
      train_bytes: how much of the training split to use, at most.
    """
    models = NgramModels(list(byte_documents(train, tokenizer, train_bytes)))
    scores = models.score(list(byte_documents(held_out, tokenizer)))
    return {order: score.nats_per_byte for order, score in scores.items()}
