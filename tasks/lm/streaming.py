"""Text as it is decoded: whole characters only, and nothing of a stop text."""

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

from tasks.lm.data import Tokenizer

# The unfinished end of a JSON escape, or the first half of a surrogate pair.
_OPEN_ESCAPE = re.compile(
    r"(?<!\\)(?:\\\\)*(\\(?:u[0-9a-fA-F]{0,3})?|\\u[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?)$"
)
# A character is finished within a few tokens; U+FFFD that lasts longer than this is the model's own.
_MOST_PENDING = 32


class IncrementalDecoder:
    """Turns token ids into text piece by piece; the pieces joined equal the one-shot decode.

    Half a character (a UTF-8 sequence cut by a byte or BPE token, an open JSON escape) is kept back until the
    rest arrives, or `finish` is called.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._escaped = tokenizer.name.endswith("+json")
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._shown = 0  # ids whose text is out; those after it are pending
        self._context = 0  # ids before `_shown` kept because some decoders treat a first token differently

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """The text these ids complete; empty while a character is unfinished."""
        new = [int(i) for i in ids]
        if self._escaped:
            return self._push_escaped(new)
        if self._tokenizer.token_bytes is not None:
            return self._utf8.decode(self._tokenizer.decode_bytes(new))
        return self._push_text(new)

    def finish(self) -> str:
        """What was kept back, unfinished characters as U+FFFD."""
        if self._escaped:
            text = self._tokenizer.decode(self._ids) if self._ids else ""
            self._ids = []
            return text
        if self._tokenizer.token_bytes is not None:
            return self._utf8.decode(b"", final=True)
        text = self._pending_text()
        self._context = self._shown = len(self._ids)
        return text

    def _push_escaped(self, ids: list[int]) -> str:
        self._ids += ids
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        raw = utf8.decode(self._tokenizer.decode_bytes(self._ids))
        half_character, _ = utf8.getstate()
        if half_character or _OPEN_ESCAPE.search(raw):
            return ""
        return self.finish()

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        return self._tokenizer.decode(self._ids[self._context :])[len(before) :]

    def _push_text(self, ids: list[int]) -> str:
        self._ids += ids
        text = self._pending_text()
        waiting = len(self._ids) - self._shown
        if not text or (text.endswith("\N{REPLACEMENT CHARACTER}") and waiting < _MOST_PENDING):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text


class StopText:
    """Passes text through until one of `stops` appears; keeps back what could be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        if any(not stop for stop in stops):
            raise ValueError("an empty stop text would stop everything at once; give at least one character")
        self._stops = tuple(stops)
        self._kept = ""
        self.found = False

    def push(self, text: str) -> str:
        """The part of the text that is certain to come before any stop text. Empty once one was found."""
        if self.found:
            return ""
        text = self._kept + text
        hits = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if hits:
            self.found, self._kept = True, ""
            return text[: min(hits)]
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                self._kept = text[-size:]
                return text[:-size]
        self._kept = ""
        return text

    def finish(self) -> str:
        """What was kept back, now that no more text comes."""
        text, self._kept = self._kept, ""
        return text
