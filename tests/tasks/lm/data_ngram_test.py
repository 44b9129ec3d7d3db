"""Byte n-gram models against sums by hand and on the embedded source."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest

from tasks.lm.data import DataConfig, build
from tasks.lm.data.documents import FlatDocuments
from tasks.lm.data.ngram import NgramModels, byte_documents
from tasks.lm.data.tokenizers import BytesTokenizer, train_bpe

EDGE = 256
TRAIN = [b"abracadabra", b"abba", b""]


def interpolated(order: int, history: tuple[int, ...], symbol: int, strengths: tuple[float, ...]) -> float:
    """The definition, by dictionaries and recursion."""
    if order == 0:
        return 1 / 257
    context = history[len(history) - order + 1 :]
    counts: Counter[int] = Counter()
    for content in TRAIN:
        stream = [EDGE, EDGE, *content, EDGE]
        for i in range(2, len(stream)):
            if tuple(stream[i - order + 1 : i]) == context:
                counts[stream[i]] += 1
    unseen = strengths[order - 1] * max(len(counts), 1)
    lower = interpolated(order - 1, history, symbol, strengths)
    return (counts[symbol] + unseen * lower) / (counts.total() + unseen)


@pytest.fixture(scope="module")
def models() -> NgramModels:
    return NgramModels(TRAIN)


def test_probabilities_are_the_definitions(models: NgramModels) -> None:
    content = b"abrax"
    stream = [EDGE, EDGE, *content, EDGE]
    for order, name in enumerate(("unigram", "bigram", "trigram"), 1):
        expected = [
            -math.log(interpolated(order, (stream[i - 2], stream[i - 1]), stream[i], models.strengths))
            for i in range(2, len(stream))
        ]
        np.testing.assert_allclose(models.nats(content, name), expected, rtol=1e-12)


def test_probabilities_sum_to_one_after_any_context(models: NgramModels) -> None:
    symbols = np.arange(257)
    for a, b in product((EDGE, ord("a"), ord("b"), ord("q")), repeat=2):
        grams = (np.full(257, a), np.full(257, b), symbols)
        for probabilities in models._counts.probability(grams, models.strengths):
            assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)


def test_score_is_the_nats_of_bytes_and_ends_per_byte(models: NgramModels) -> None:
    held_out = [b"cab", b"abra", b""]
    for order, score in models.score(held_out).items():
        assert score.nats == pytest.approx(sum(models.nats(c, order).sum() for c in held_out))
        assert score.bytes == 7
        assert score.bits_per_byte == pytest.approx(score.nats / 7 / math.log(2))


def test_strengths_come_from_training_documents_alone() -> None:
    text = [bytes([97 + (i * j) % 7 for j in range(50)]) for i in range(40)]
    assert NgramModels(text).strengths == NgramModels(list(text)).strengths
    noise = [np.random.default_rng(i).integers(0, 256, 300, np.uint8).tobytes() for i in range(40)]
    # In noise higher orders know nothing: they are trusted least; in text that repeats itself, most.
    assert NgramModels(noise).strengths == (1.0, 2.0, 2.0)
    assert NgramModels(text).strengths[2] == 0.5


def test_nothing_to_fit_or_score_is_said(models: NgramModels) -> None:
    with pytest.raises(ValueError, match="no bytes to fit"):
        NgramModels([b""])
    with pytest.raises(ValueError, match="no bytes to score"):
        models.score([b""])
    with pytest.raises(ValueError, match="order must be one of unigram, bigram, trigram, got '4-gram'"):
        models.nats(b"a", "4-gram")


def test_bytes_of_documents_come_back_from_any_tokenizer(tmp_path) -> None:
    texts = ["na\u00efve text\n", "", "more \u2603"]
    for tokenizer in (BytesTokenizer(), train_bpe(texts, 270, tmp_path / "t.json")):
        documents = FlatDocuments([tokenizer.encode(t) for t in texts], ["a", "b", "c"])
        assert list(byte_documents(documents, tokenizer)) == [t.encode() for t in texts]
        assert list(byte_documents(documents, tokenizer, limit_bytes=3)) == [texts[0].encode()]


def test_the_trigram_on_the_standard_library_is_where_it_should_be() -> None:
    """About 1.85 nats a byte; the split moves with Python's version, by up to 0.1."""
    data = build(DataConfig(), 256)
    fitted = NgramModels(list(byte_documents(data.train_documents, data.tokenizer)))
    scores = fitted.score(list(byte_documents(data.held_out_documents, data.tokenizer)))
    assert scores["unigram"].nats_per_byte == pytest.approx(3.15, abs=0.15)
    assert scores["bigram"].nats_per_byte == pytest.approx(2.45, abs=0.15)
    assert scores["trigram"].nats_per_byte == pytest.approx(1.85, abs=0.12)
