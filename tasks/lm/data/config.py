"""The data section of a configuration."""

import os
from dataclasses import dataclass
from pathlib import Path

SOURCES = ("stdlib", "text", "longcrawl64", "tfds")
TOKENIZERS = ("bytes", "gpt2", "hf", "bpe")
MODES = ("packed", "windows")


@dataclass(frozen=True)
class DataConfig:
    """Which text, tokenised how, cut how. Validates itself.

    source:  stdlib (the running Python's own sources; no files needed), text (a folder of text, or of the
             shards that `python -m tasks.lm.data prepare` made), longcrawl64 (zarr), tfds (a prepared TFDS
             data set).
    path:    text: the folder. longcrawl64: the folder of train.zarr and heldout.zarr, or the training array
             itself.
             tfds: data_dir (default: TFDS's own), or the folder of one prepared data set.
    validation_path: text: a folder of held-out text, or of shards made from it; all of `path` is then for
             training. longcrawl64: the held-out array, if it is not `<path>/heldout.zarr`.
    tokenizer, tokenizer_path: bytes; gpt2 (rank files); hf (tokenizer.json); bpe (trained on the embedded
    text).
    bos_token, eos_token: hf: names of the tokens that begin and end documents, where they are unusual.
    json_escape: tokenise JSON-escaped text (what LongCrawl64 was made with; always on there).
    bpe_vocab_size: size of the BPE trained here.
    mode:    packed or windows, see `packing.py`.
    validation_fraction: expected share of documents held out (by content hash), where there is no held-out
    set.
    text_field: field that holds the text, in JSON lines and TFDS examples.
    cut:     text: documents of more UTF-8 bytes than this are cut at line ends; 0: never.
    on_error: text: skip or fail on files and lines that cannot be read.
    allow_changed_inputs: text: train on shards although the files they were made from have changed since.
    tfds_name, tfds_split: tfds: the data set and its split.
    cache_dir: where trained tokenizers and shards made on the fly go (default: $FOXTROT_CACHE or
    ~/.cache/foxtrot).
    """

    source: str = "stdlib"
    path: str = ""
    validation_path: str = ""
    tokenizer: str = "bytes"
    tokenizer_path: str = ""
    bos_token: str = ""
    eos_token: str = ""
    json_escape: bool = False
    bpe_vocab_size: int = 4096
    mode: str = "packed"
    validation_fraction: float = 0.1
    text_field: str = "text"
    cut: int = 0
    on_error: str = "skip"
    allow_changed_inputs: bool = False
    tfds_name: str = ""
    tfds_split: str = "train"
    cache_dir: str = ""

    def __post_init__(self) -> None:
        for field, value, choices in (
            ("source", self.source, SOURCES),
            ("tokenizer", self.tokenizer, TOKENIZERS),
            ("mode", self.mode, MODES),
            ("on_error", self.on_error, ("skip", "fail")),
        ):
            if value not in choices:
                raise ValueError(f"data.{field} must be one of {', '.join(choices)}, got {value!r}")
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ValueError(f"data.validation_fraction must be in [0, 1), got {self.validation_fraction}")
        if self.cut < 0:
            raise ValueError(f"data.cut must be a number of bytes, or 0 for never, got {self.cut}")
        if self.source in ("text", "longcrawl64") and not self.path:
            raise ValueError(f"data.source={self.source!r} needs data.path")
        if self.validation_path and self.source not in ("text", "longcrawl64"):
            raise ValueError(f"data.validation_path has no meaning for data.source={self.source!r}")
        if self.source == "longcrawl64" and self.mode != "windows":
            raise ValueError(
                "data.source='longcrawl64' is cut into windows as in the paper: set data.mode='windows'"
            )
        if self.source == "longcrawl64" and self.tokenizer not in ("gpt2", "hf"):
            raise ValueError(
                "data.source='longcrawl64' holds GPT-2 ids: set data.tokenizer='gpt2', not "
                f"{self.tokenizer!r}"
            )
        if self.source == "tfds" and not (self.tfds_name or self.path):
            raise ValueError(
                "data.source='tfds' needs data.tfds_name, or data.path=<folder of a prepared data set>"
            )
        if self.tokenizer in ("gpt2", "hf") and not self.tokenizer_path and self.source != "longcrawl64":
            what = "a .tiktoken file, or a folder with encoder.json and vocab.bpe"
            what = what if self.tokenizer == "gpt2" else "a tokenizer.json"
            raise ValueError(f"data.tokenizer={self.tokenizer!r} needs data.tokenizer_path ({what})")

    def cache(self) -> Path:
        """The folder for things made once."""
        return Path(self.cache_dir or os.environ.get("FOXTROT_CACHE") or "~/.cache/foxtrot").expanduser()
