"""Text from a language model: `generate` for programs, a command for people.

    python -m tasks.lm.generate --workdir=DIR --prompt="def main(" --max_new_tokens=200 --temperature=0.8
    python -m tasks.lm.generate --checkpoint=HF_FOLDER --tokenizer=FILE --prompt=... --greedy

The commands' options: `--help`, or README.md beside this file.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models import fox
from models.common.layers import linear
from models.common.sharding import constrain, gathered
from tasks.lm.data import Tokenizer
from tasks.lm.sampling import NOT_A_TOKEN, Sampling, sample, step_keys
from tasks.lm.streaming import IncrementalDecoder, StopText

Stop = Literal["length", "stop_id", "stop_text"]
OnText = Callable[[int, str], None]

# Buffers and short prompts are rounded up to multiples of this, so that prompts of similar lengths share
# programs.
_ROUNDING = 64


class Generated(NamedTuple):
    """One continuation.

    Attributes:
      prompt: as given.
      text: what follows it, without the stop text.
      ids: every new token, a stop id included.
      stop: why it ended: "length" (max_new_tokens), "stop_id" or "stop_text".
    """

    prompt: str
    text: str
    ids: tuple[int, ...]
    stop: Stop


class Timing(NamedTuple):
    """How long it took.

    Attributes:
      prompt_tokens, new_tokens: of all rows, padding not counted.
      seconds: from start to end, compilation included.
      tokens_per_second: new tokens a second over all rows, once everything is compiled; None if fewer than
        three steps were taken.
    """

    prompt_tokens: int
    new_tokens: int
    seconds: float
    tokens_per_second: float | None


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str], vocab_size: int, *, add_bos: bool = True
) -> list[np.ndarray]:
    """Token ids of every prompt, after the id that begins a document unless `add_bos` is False.

    Raises:
      ValueError: no prompts, an empty one without `add_bos`, or an id the model does not know.
    """
    if not prompts:
        raise ValueError('there is no prompt; an empty one ("") asks for text from the start of a document')
    encoded = []
    for number, prompt in enumerate(prompts):
        ids = np.asarray(tokenizer.encode(prompt), np.int32)
        if add_bos:
            ids = np.concatenate([np.array([tokenizer.bos_id], np.int32), ids])
        if not len(ids):
            raise ValueError(f"prompt {number} has no tokens; with add_bos it would begin a document")
        unknown = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(unknown):
            raise ValueError(
                f"prompt {number} holds token id {ids[unknown[0]]} (token {unknown[0]}), but the model "
                f"knows ids 0 to "
                f"{vocab_size - 1}: tokenizer {tokenizer.name!r} is not the one it was trained with"
            )
        encoded.append(ids)
    return encoded


def generate(
    params: Any,
    config: fox.FoxConfig,
    runtime: fox.FoxRuntime,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
    stop_text: Sequence[str] = (),
    add_bos: bool = True,
    max_length: int | None = None,
    prefill_chunk: int = 512,
    batch_size: int = 16,
    on_text: OnText | None = None,
    on_end: Callable[[int], None] | None = None,
) -> tuple[list[Generated], Timing]:
    """Continues every prompt.

    Rows of a batch are padded on the left; a row's text depends on the prompt, the seed and its place among
    the prompts, not on `batch_size`, `prefill_chunk` or the rows beside it (up to the rounding of the
    arithmetic).

    Args:
      params: canonical parameter tree, of host or device arrays.
      tokenizer: the one the model was trained with.
      prompts: one row each; repeat a prompt for several samples of it.
      max_new_tokens: most tokens added to each.
      sampling: how tokens are drawn; None means temperature 1.
      seed: in [0, 2^32); the same seed gives the same text.
      stop_ids: a row ends with the first of these; None means the tokenizer's end of document.
      stop_text: a row ends before the first of these texts.
      add_bos: begin every prompt with the id that begins a document.
      max_length: most tokens of prompt and continuation together; None means as many as needed.
      prefill_chunk: prompt tokens read at a time.
      batch_size: rows decoded at a time.
      on_text: called with (row, text) as text is decoded: whole characters, nothing of a stop text.
      on_end: called with a row's number when it is finished.

    Raises:
      ValueError: values out of range, unknown ids, a prompt too long for `max_length`, logits that are not
        finite.
    """
    _check_options(config, max_new_tokens, seed, stop_ids, prefill_chunk, batch_size)
    encoded = encode_prompts(tokenizer, prompts, config.vocab_size, add_bos=add_bos)
    longest = max(map(len, encoded)) + max_new_tokens
    if max_length is not None and longest > max_length:
        row = int(np.argmax([len(ids) for ids in encoded]))
        raise ValueError(
            f"prompt {row} has {len(encoded[row])} tokens; with max_new_tokens={max_new_tokens} that is "
            f"{longest}, "
            f"but max_length is {max_length}: shorten the prompt, or raise max_length"
        )
    stops = (tokenizer.eos_id,) if stop_ids is None else tuple(stop_ids)
    rows = [_Row(number, tokenizer, stops, stop_text, on_text, on_end) for number in range(len(prompts))]
    params = jax.tree.map(jnp.asarray, params)  # host arrays would be copied to the device at every step
    clock = _Clock()
    for first in range(0, len(rows), batch_size):
        decoder = _Decoder(params, config, runtime, sampling or Sampling(), seed, prefill_chunk)
        group = slice(first, first + batch_size)
        decoder.run(rows[group], encoded[group], max_new_tokens, clock)
    results = [
        Generated(prompt, "".join(row.text), tuple(row.ids), row.stop)
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    return results, clock.timing(sum(map(len, encoded)), sum(len(row.ids) for row in rows))


def _check_options(
    config: fox.FoxConfig,
    max_new_tokens: int,
    seed: int,
    stop_ids: Sequence[int] | None,
    prefill_chunk: int,
    batch_size: int,
) -> None:
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("prefill_chunk", prefill_chunk),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}")
    for stop in stop_ids or ():
        if not 0 <= stop < config.vocab_size:
            raise ValueError(f"stop id {stop} is outside the model's vocabulary of {config.vocab_size} ids")


class _Clock:
    """Counts tokens of steps whose programs were compiled before, over all batches."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._steady_seconds, self._steady_tokens = 0.0, 0
        self._last: float | None = None

    def tick(self, index: int, tokens: int) -> None:
        """Token number `index` of a batch arrived, with `tokens` new ones; 0 and 1 may have waited for the
        compiler.
        """
        now = time.perf_counter()
        if index >= 2 and self._last is not None:
            self._steady_seconds += now - self._last
            self._steady_tokens += tokens
        self._last = now

    def timing(self, prompt_tokens: int, new_tokens: int) -> Timing:
        rate = self._steady_tokens / self._steady_seconds if self._steady_tokens else None
        return Timing(prompt_tokens, new_tokens, time.perf_counter() - self._start, rate)


class _Row:
    """One continuation as it grows."""

    def __init__(
        self,
        number: int,
        tokenizer: Tokenizer,
        stop_ids: tuple[int, ...],
        stop_text: Sequence[str],
        on_text: OnText | None,
        on_end: Callable[[int], None] | None,
    ):
        self.number, self.ids, self.text = number, [], []  # type: tuple[int, list[int], list[str]]
        self.stop: Stop = "length"
        self.done = False
        self._stop_ids, self._on_text, self._on_end = stop_ids, on_text, on_end
        self._decoder, self._stop_text = IncrementalDecoder(tokenizer), StopText(stop_text)

    def accept(self, token: int) -> None:
        """Takes the next token.

        Raises:
          ValueError: there is none, because the logits were not finite.
        """
        if token == NOT_A_TOKEN:
            raise ValueError(
                f"the model's logits are not finite at new token {len(self.ids)} of prompt {self.number}: "
                f"the "
                "parameters are broken, or compute_dtype cannot hold the activations (try bfloat16 or "
                "float32)"
            )
        self.ids.append(token)
        if token in self._stop_ids:
            self.finish("stop_id")
            return
        self._show(self._stop_text.push(self._decoder.push([token])))
        if self._stop_text.found:
            self.finish("stop_text")

    def finish(self, stop: Stop) -> None:
        """Ends the row and shows what was kept back."""
        self.stop, self.done = stop, True
        self._show(self._stop_text.push(self._decoder.finish()))
        self._show(self._stop_text.finish())
        if self._on_end is not None:
            self._on_end(self.number)

    def _show(self, text: str) -> None:
        if text:
            self.text.append(text)
            if self._on_text is not None:
                self._on_text(self.number, text)


class _Decoder:
    """Runs one batch: the prompts in chunks, then one token of every row at a time."""

    def __init__(
        self,
        params: Any,
        config: fox.FoxConfig,
        runtime: fox.FoxRuntime,
        sampling: Sampling,
        seed: int,
        prefill_chunk: int,
    ):
        self._params, self._config, self._runtime, self._sampling = params, config, runtime, sampling
        self._key = jax.random.key(seed)
        self._prefill_chunk = prefill_chunk

    def run(self, rows: list[_Row], prompts: list[np.ndarray], max_new_tokens: int, clock: _Clock) -> None:
        longest = max(map(len, prompts))
        numbers = jnp.asarray([row.number for row in rows])
        logits, state = self._read_prompts(prompts, _round_up(longest + max_new_tokens, _ROUNDING))
        tokens = _draw(self._sampling, logits, self._key, numbers, 0)
        for index in range(max_new_tokens):
            upcoming = None
            if index + 1 < max_new_tokens:
                # Sent off before the host looks at the last token: the device never waits for the text.
                logits, state = _step(self._config, self._runtime, self._params, state, tokens)
                upcoming = _draw(self._sampling, logits, self._key, numbers, index + 1)
            arrived = np.asarray(tokens)
            live = [(row, int(token)) for row, token in zip(rows, arrived, strict=True) if not row.done]
            clock.tick(index, len(live))
            for row, token in live:
                row.accept(token)
            if all(row.done for row in rows):
                return
            tokens = upcoming
        for row in rows:
            if not row.done:
                row.finish("length")

    def _read_prompts(self, prompts: list[np.ndarray], max_length: int) -> tuple[jax.Array, Any]:
        """(logits [B, V] after the prompts, state): padded on the left to a multiple of the chunk."""
        longest = max(map(len, prompts))
        chunk = min(self._prefill_chunk, _round_up(longest, _ROUNDING))
        width = _round_up(longest, chunk)
        tokens = np.zeros((len(prompts), width), np.int32)
        mask = np.zeros((len(prompts), width), bool)
        for row, ids in enumerate(prompts):
            tokens[row, width - len(ids) :] = ids
            mask[row, width - len(ids) :] = True
        state = fox.init_state(self._config, len(prompts), max_length, jnp.dtype(self._runtime.compute_dtype))
        state = jax.tree.map(lambda x: constrain(x, ("batch",) + (None,) * (x.ndim - 1)), state)
        logits = None
        for start in range(0, width, chunk):
            part = slice(start, start + chunk)
            logits, state = _prefill(
                self._config,
                self._runtime,
                self._params,
                state,
                jnp.asarray(tokens[:, part]),
                jnp.asarray(mask[:, part]),
            )
        assert logits is not None
        return logits, state


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _last_logits(runtime: fox.FoxRuntime, params: Any, hidden: jax.Array) -> jax.Array:
    """[B, V] of the last position, whole on every device."""
    return gathered(linear(hidden[:, -1:], params["lm_head"], runtime.compute_dtype)[:, 0])


@functools.partial(jax.jit, static_argnames=("config", "runtime"), donate_argnames=("state",))
def _prefill(
    config: fox.FoxConfig,
    runtime: fox.FoxRuntime,
    params: Any,
    state: fox.FoxState,
    tokens: jax.Array,
    mask: jax.Array,
) -> tuple[jax.Array, fox.FoxState]:
    hidden, new = fox.apply(config, runtime, params, tokens, state, mask=mask, output="hidden")
    assert new is not None
    return _last_logits(runtime, params, hidden), new


@functools.partial(jax.jit, static_argnames=("sampling",))
def _draw(
    sampling: Sampling, logits: jax.Array, key: jax.Array, rows: jax.Array, index: jax.Array | int
) -> jax.Array:
    return sample(logits, step_keys(key, rows, index), sampling)


@functools.partial(jax.jit, static_argnames=("config", "runtime"), donate_argnames=("state",))
def _step(
    config: fox.FoxConfig, runtime: fox.FoxRuntime, params: Any, state: fox.FoxState, tokens: jax.Array
) -> tuple[jax.Array, fox.FoxState]:
    """Reads each row's last token; logits [B, V] of the next."""
    hidden, new = fox.apply(config, runtime, params, tokens[:, None], state, output="hidden")
    assert new is not None
    return _last_logits(runtime, params, hidden), new


if __name__ == "__main__":
    from tasks.common.errors import run_main
    from tasks.lm.generate_command import main

    run_main(main)
