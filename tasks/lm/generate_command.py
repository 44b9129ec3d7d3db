"""The command `python -m tasks.lm.generate`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from io import TextIOBase, TextIOWrapper
from pathlib import Path
from typing import TextIO

from tasks.common.config import make_parser, parse_command_line
from tasks.common.errors import ConfigError
from tasks.lm.config import SCHEMA
from tasks.lm.data import Tokenizer
from tasks.lm.generate import Generated, Timing, generate
from tasks.lm.sampling import Sampling
from tasks.lm.subject import add_subject_options, read_subject


def main(argv: Sequence[str] | None = None) -> None:
    """Continues prompts and prints the text as it is decoded; figures go to stderr.

    Raises:
      ConfigError: any wrong option, in one line.
    """
    parser = make_parser("Continue prompts with a trained language model.")
    add_subject_options(parser)
    _add_options(parser)
    command = parse_command_line(parser, argv, schema=SCHEMA)
    options = command.options
    subject = read_subject(command)
    prompts = _read_prompts(options)
    sampling = _refusing(lambda: Sampling(options.temperature, options.top_k, options.top_p, options.greedy))
    tokenizer = subject.tokenizer()
    config, params = subject.load()
    printer = Printer(prompts, sys.stdout)
    results, timing = _refusing(
        lambda: generate(
            params,
            config,
            subject.runtime,
            tokenizer,
            prompts,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
            seed=options.seed,
            stop_ids=_stop_ids(options, tokenizer),
            stop_text=options.stop_text,
            add_bos=not options.no_bos,
            max_length=options.max_length,
            prefill_chunk=options.prefill_chunk,
            batch_size=options.batch,
            on_text=printer.add,
            on_end=printer.end,
        )
    )
    print(_summary(results, timing), file=sys.stderr)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--prompt",
        action="append",
        default=[],
        help='text to continue; repeat for several (default: none, "")',
    )
    add(
        "--prompt_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a file whose text is a prompt; repeatable",
    )
    add("--num_samples", type=int, default=1, help="continuations of each prompt")
    add("--batch", type=int, default=16, help="continuations decoded at a time")
    add("--max_new_tokens", type=int, default=256)
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top_k", type=int, default=None, help="keep the k most likely tokens")
    add("--top_p", type=float, default=1.0, help="keep the most likely tokens that make up this probability")
    add("--greedy", action="store_true", help="always the most likely token")
    add("--seed", type=int, default=0)
    add(
        "--stop_ids",
        default=None,
        metavar="ID,ID",
        help="token ids that end a text (default: end of document)",
    )
    add("--ignore_eos", action="store_true", help="do not stop at the end of a document")
    add("--stop_text", action="append", default=[], help="text that ends a continuation; repeatable")
    add("--no_bos", action="store_true", help="do not begin prompts with the id that begins a document")
    add("--max_length", type=int, default=None, help="most tokens of prompt and continuation together")
    add("--prefill_chunk", type=int, default=512, help="prompt tokens read at a time")


def _refusing[T](make: Callable[[], T]) -> T:
    """Calls `make`; what it refuses is the user's input."""
    try:
        return make()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _read_prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    for name in options.prompt_file:
        try:
            prompts.append(Path(name).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt_file={name}: cannot be read as UTF-8 text: {error}") from error
    if options.num_samples < 1:
        raise ConfigError(f"--num_samples must be at least 1, got {options.num_samples}")
    return [prompt for prompt in prompts or [""] for _ in range(options.num_samples)]


def _stop_ids(options: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    if options.stop_ids is None:
        return [] if options.ignore_eos else [tokenizer.eos_id]
    try:
        return [int(part) for part in options.stop_ids.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"--stop_ids={options.stop_ids}: give token ids such as 50256 or 10,13") from None


def _summary(results: Sequence[Generated], timing: Timing) -> str:
    rate = timing.tokens_per_second
    speed = "" if rate is None else f", {rate:.1f} tokens/s after the first two steps"
    ends = ", ".join(
        f"{sum(r.stop == stop for r in results)} by {stop}" for stop in sorted({r.stop for r in results})
    )
    return (
        f"[{timing.prompt_tokens} prompt tokens, {timing.new_tokens} new tokens in {timing.seconds:.1f} "
        f"s{speed}; "
        f"{len(results)} text(s) ended {ends}]"
    )


class Printer:
    """Prints texts in order: the first unfinished one streams, later ones wait for it.

    A single text follows its prompt directly; several get a heading each.
    """

    def __init__(self, prompts: Sequence[str], out: TextIO | TextIOBase):
        self._prompts, self._out = prompts, out
        self._waiting: dict[int, list[str]] = {row: [] for row in range(len(prompts))}
        self._ended: set[int] = set()
        self._current = 0
        if isinstance(out, TextIOWrapper):
            # A lone surrogate, or a terminal that is not UTF-8, must not end the stream.
            out.reconfigure(errors="replace")
        self._is_open = False

    def add(self, row: int, text: str) -> None:
        """New text of a row."""
        self._begin()
        if row == self._current:
            self._write(text)
        else:
            self._waiting[row].append(text)

    def end(self, row: int) -> None:
        """A row is finished; shows those that waited for it."""
        self._begin()
        self._ended.add(row)
        while self._current in self._ended:
            self._write("\n")
            self._current += 1
            if self._current < len(self._prompts):
                self._open()
                self._write("".join(self._waiting.pop(self._current)))

    def _begin(self) -> None:
        """Shows the first prompt; not before there is text, so that what is refused prints nothing."""
        if not self._is_open:
            self._is_open = True
            self._open()

    def _open(self) -> None:
        if len(self._prompts) > 1:
            self._write(f"--- {self._current + 1} of {len(self._prompts)} ---\n")
        self._write(self._prompts[self._current])

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
