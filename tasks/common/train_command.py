"""The command that trains: the same for every task but for what it trains."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tasks.common.config import Schema, default_workdir, make_parser, parse_command_line
from tasks.common.job import Job
from tasks.common.loop import fit
from tasks.common.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """One task's `python -m tasks.<task>.train`.

    task: its name, of the folder in runs/.
    description: of the command.
    schema: sections of its configurations.
    default_config: file that is used without one.
    make_job: (configuration, workdir) -> what the loop runs.
    print_summary: shows the results in a workdir.
    draw_sheet: (configuration, PNG file): draws what the model sees, for --sheet; None: no such option.
    sheet_help: what that draws.
    """

    task: str
    description: str
    schema: Schema
    default_config: str
    make_job: Callable[[Any, Path], Job]
    print_summary: Callable[[Path], None]
    draw_sheet: Callable[[Any, Path], None] | None = None
    sheet_help: str = ""

    def main(self, argv: Sequence[str] | None = None) -> None:
        """The command."""
        parser = make_parser(f"{self.description}; the same command resumes.")
        if self.draw_sheet is not None:
            text = f"draw {self.sheet_help}; train nothing"
            parser.add_argument("--sheet", type=Path, metavar="PNG", help=text)
        command = parse_command_line(parser, argv, schema=self.schema, default_config=self.default_config)
        config, options = command.config, command.options
        assert isinstance(config, ConfigDict)
        if self.draw_sheet is not None and options.sheet:
            self.draw_sheet(config, options.sheet)
            print(f"  {options.sheet}")
            return
        self.train(
            config, command.workdir or default_workdir(self.task, options.config or self.default_config)
        )

    def train(self, config: Any, workdir: Path) -> TrainState:
        """Runs a configuration to its end in `workdir`, resuming if the workdir holds checkpoints.

        Args:
          config: ConfigDict or nested dict with the sections of the schema.
          workdir: folder of the run.

        Raises:
          ConfigError, Diverged, CheckpointError, Stopped: see `tasks.common.loop.fit`.
        """
        state = fit(self.make_job(config, workdir))
        self.print_summary(workdir)
        return state
