"""Streamed text equals the one-shot decode, and never shows half a character or part of a stop text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.lm.data import BytesTokenizer, Tokenizer
from tasks.lm.data.tokenizers import JsonEscaped, train_bpe
from tasks.lm.streaming import IncrementalDecoder, StopText

TEXT = 'naïve “日本語” 🦊🦊\n\ttab "quoted" back\\slash é\u0301 \\u0041 \N{MUSICAL SYMBOL G CLEF}'


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A byte-level BPE whose vocabulary is too small to hold multi-byte characters whole."""
    return train_bpe(["plain text, mostly", "日本"], 300, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


class TextOnly(Tokenizer):
    """A tokenizer that knows no bytes of its ids and drops the first word's space, as some do."""

    name = "words"
    token_bytes = None
    words = (" the", " fox", " é", "\N{REPLACEMENT CHARACTER}", "!")

    def decode(self, ids):
        return "".join(self.words[i] for i in ids).removeprefix(" ")


def pieces(tokenizer, ids):
    decoder = IncrementalDecoder(tokenizer)
    return [decoder.push([i]) for i in ids], decoder.finish()


@pytest.mark.parametrize("kind", ["bytes", "bpe", "bytes+json", "bpe+json"])
def test_streaming_equals_one_shot_and_shows_whole_characters(kind, bpe):
    tokenizer = BytesTokenizer() if kind.startswith("bytes") else bpe
    tokenizer = JsonEscaped(tokenizer) if kind.endswith("json") else tokenizer
    ids = tokenizer.encode(TEXT)
    streamed, rest = pieces(tokenizer, ids)
    assert "".join(streamed) + rest == tokenizer.decode(ids) == TEXT
    assert rest == ""
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in streamed)
    shown = ""
    for piece in streamed:
        shown += piece
        assert TEXT.startswith(shown)
    assert sum(map(bool, streamed)) > len(TEXT) / 3  # it does stream, rather than wait for the end


@given(st.binary(max_size=40), st.integers(1, 5))
def test_any_bytes_stream_as_they_decode(content, step):
    tokenizer = BytesTokenizer()
    ids = np.frombuffer(content, np.uint8).astype(np.int32)
    decoder = IncrementalDecoder(tokenizer)
    text = "".join(decoder.push(ids[i : i + step]) for i in range(0, len(ids), step)) + decoder.finish()
    assert text == tokenizer.decode(ids)


def test_a_cut_character_waits_and_ends_as_replacement():
    streamed, rest = pieces(BytesTokenizer(), "a🦊".encode()[:-1])
    assert streamed == ["a", "", "", ""]
    assert rest == "\N{REPLACEMENT CHARACTER}"


def test_special_ids_give_no_text():
    tokenizer = BytesTokenizer()
    assert pieces(tokenizer, [tokenizer.bos_id, 65, tokenizer.eos_id]) == (["", "A", ""], "")


def test_an_escape_cut_at_every_place_waits_for_its_end():
    tokenizer = JsonEscaped(BytesTokenizer())
    for escaped, text in ((r"\u00e9", "é"), (r"\ud83e\udd8a", "🦊"), (r"\n", "\n"), (r"\\", "\\")):
        ids = np.frombuffer(escaped.encode(), np.uint8).astype(np.int32)
        streamed, rest = pieces(tokenizer, ids)
        assert streamed == [""] * (len(ids) - 1) + [text]
        assert rest == ""


def test_a_broken_escape_does_not_block_the_stream():
    tokenizer = JsonEscaped(BytesTokenizer())
    broken = list(rb"a\u12 and \ud83e more")
    streamed, rest = pieces(tokenizer, broken)
    assert ("".join(streamed) + rest).replace("\ud83e", "") == "a\N{REPLACEMENT CHARACTER} and  more"
    assert streamed[-4:] == list("more")


def test_half_a_character_inside_escaped_text_waits():
    streamed, rest = pieces(JsonEscaped(BytesTokenizer()), "a🦊".encode())
    assert (streamed, rest) == (["a", "", "", "", "🦊"], "")


def test_a_tokenizer_without_bytes_streams_with_context():
    tokenizer = TextOnly()
    ids = [0, 1, 2, 4, 0]
    streamed, rest = pieces(tokenizer, ids)
    assert streamed == ["the", " fox", " é", "!", " the"]
    assert rest == ""
    assert pieces(tokenizer, [0, 3]) == (["the", ""], "\N{REPLACEMENT CHARACTER}")


def test_stop_text_is_cut_and_its_beginnings_are_kept_back():
    stop = StopText(["\n\n", "END"])
    assert [stop.push(t) for t in ("one\n", "two E", "N", "X\n", "\nrest")] == [
        "one",
        "\ntwo ",
        "",
        "ENX",
        "",
    ]
    assert stop.found
    assert stop.push("more") == ""
    open_end = StopText(["END"])
    assert open_end.push("the EN") == "the "
    assert open_end.finish() == "EN"
    assert not open_end.found


def test_the_earliest_of_several_stop_texts_wins():
    stop = StopText(["late", "ly"])
    assert stop.push("early late") == "ear"


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ValueError, match="empty stop text"):
        StopText(["a", ""])
