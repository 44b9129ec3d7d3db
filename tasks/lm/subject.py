"""What the eval and generate commands work on: which model, which text, run how; checked before weights are
read.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import NamedTuple

from models import fox
from models.common.shapes import Params
from models.fox.config import ComputeDtype
from tasks.common.config import CommandLine
from tasks.common.errors import ConfigError, bad_input
from tasks.lm.config import LMConfig, freeze_all
from tasks.lm.data import DataConfig, Tokenizer, make_tokenizer
from tasks.lm.trained import is_run, open_model


class Subject(NamedTuple):
    """A model before its weights are read.

    Attributes:
      name: short, for legends.
      workdir, checkpoint: where the weights are; exactly one is given.
      step: of the checkpoint in the workdir; None = the newest good one.
      data: text and tokenizer.
      run: the whole configuration, of the run or of --config; None = there is none.
      dtype: of matmuls, over the configuration's; None = the configuration's.
    """

    name: str
    workdir: Path | None
    checkpoint: Path | None
    step: int | None
    data: DataConfig
    run: LMConfig | None
    dtype: ComputeDtype | None

    @property
    def source(self) -> Path:
        """Where the weights are."""
        source = self.workdir or self.checkpoint
        assert source is not None
        return source

    @property
    def runtime(self) -> fox.FoxRuntime:
        """How the model is run here."""
        runtime = fox.FoxRuntime() if self.run is None else self.run.runtime
        return runtime if self.dtype is None else dataclasses.replace(runtime, compute_dtype=self.dtype)

    @property
    def train_length(self) -> int | None:
        """Tokens the model was trained on; None = not known."""
        return self.run.train.seq_len if self.run is not None and self.workdir is not None else None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
          ConfigError: it cannot be made, and why.
        """
        with bad_input():
            return make_tokenizer(self.data)

    def load(self) -> tuple[fox.FoxConfig, Params]:
        """Reads the weights.

        Raises:
          ConfigError, CheckpointError: they cannot be read, and why.
        """
        model = open_model(self.source, self.step)
        # A run's model may be changed by an option, such as --config.model.rope_base.
        config = model.config if self.workdir is None or self.run is None else self.run.model
        return config, model.params


def add_subject_options(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, --tokenizer, --step and --dtype, beside the --workdir and --config every command has."""
    parser.add_argument(
        "--checkpoint", metavar="HF_FOLDER", help="official checkpoint: folder, .safetensors or .bin"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="bytes|FILE|FOLDER",
        help="for --checkpoint: 'bytes', a tokenizer.json, a .tiktoken rank file, or a folder with one, or "
        "with encoder.json and vocab.bpe (default: the one in the checkpoint's folder)",
    )
    parser.add_argument(
        "--json_escape",
        action="store_true",
        help="the model was trained on JSON-escaped text, as all models of LongCrawl64 are",
    )
    parser.add_argument(
        "--step", type=int, help="for --workdir: the checkpoint of this step (default: the newest)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of matmuls (default: the run's; float32 for --checkpoint)",
    )


def read_subject(command: CommandLine) -> Subject:
    """The model and text a command line asks for.

    Raises:
      ConfigError: neither or both of --workdir and --checkpoint, or options that do not fit together.
    """
    options = command.options
    if (command.workdir is None) == (options.checkpoint is None):
        raise ConfigError(
            "give one of --workdir=DIR (a run of ours) and --checkpoint=FOLDER (official format)"
        )
    run = None if command.config is None else freeze_all(command.config)
    if command.workdir is not None:
        if options.tokenizer or options.json_escape:
            raise ConfigError(
                "--tokenizer and --json_escape belong to --checkpoint: a workdir knows its tokenizer"
            )
        if run is None:
            raise ConfigError(f"{command.workdir} is not the workdir of a run: it has no config.json")
        return Subject(
            command.workdir.resolve().name, command.workdir, None, options.step, run.data, run, options.dtype
        )
    if options.step is not None:
        raise ConfigError("--step belongs to --workdir")
    checkpoint = Path(options.checkpoint).expanduser()
    if not checkpoint.exists():
        raise ConfigError(f"--checkpoint={checkpoint}: no such file or folder")
    if is_run(checkpoint):
        raise ConfigError(f"--checkpoint={checkpoint}: this is the workdir of a run; give it as --workdir")
    data = _tokenizer_settings(options, checkpoint, DataConfig() if run is None else run.data)
    return Subject(checkpoint.resolve().name, None, checkpoint, None, data, run, options.dtype)


def _tokenizer_settings(options: argparse.Namespace, checkpoint: Path, data: DataConfig) -> DataConfig:
    """`data` with the tokenizer of --tokenizer, or else of the config, or else of the checkpoint's folder."""
    given = options.tokenizer
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if given is None:
        if options.config is not None:
            return dataclasses.replace(data, json_escape=data.json_escape or options.json_escape)
        if not (folder / "tokenizer.json").is_file():
            raise ConfigError(
                f"{folder} holds no tokenizer.json: give --tokenizer=FILE (for the released models: "
                f"GPT-2's ranks, a "
                ".tiktoken file or the folder of encoder.json and vocab.bpe, with --json_escape)"
            )
        given = str(folder / "tokenizer.json")
    kind, path = _tokenizer_kind(given)
    return dataclasses.replace(
        data,
        tokenizer=kind,
        tokenizer_path=path,
        json_escape=options.json_escape or data.json_escape,
    )


def _tokenizer_kind(given: str) -> tuple[str, str]:
    """(kind, path) of --tokenizer."""
    if given == "bytes":
        return "bytes", ""
    path = Path(given).expanduser()
    if not path.exists():
        raise ConfigError(f"--tokenizer={given}: no such file or folder, and not 'bytes'")
    if path.is_dir():
        ranks = sorted(path.glob("*.tiktoken"))
        if (path / "tokenizer.json").is_file():
            return "hf", str(path / "tokenizer.json")
        return "gpt2", str(ranks[0] if ranks else path)
    return (
        ("hf", str(path)) if path.suffix == ".json" and path.name != "encoder.json" else ("gpt2", str(path))
    )
