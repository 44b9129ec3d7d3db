"""Export a trained tracker as one file to pass on, which says what it is; with a model card.

    python -m tasks.points.export --workdir=RUN --output=tapnext-small.safetensors
    python -m tasks.points.track --video=in.mp4 --checkpoint=tapnext-small.safetensors --grid=16

Beside NAME.safetensors come NAME.md, the model card, and NAME.json, its size and checksum. Folders of this
machine are left out of all of them. As tasks/points/weights/default.safetensors the file ships with the
package, and `track` and `eval` use it where no weights are given.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from models import tapnext
from tasks.common.checkpoint import load_checkpoint
from tasks.common.config import make_parser, parse_command_line, to_json
from tasks.common.errors import ConfigError, bad_input, run_main, writing
from tasks.common.resolved import load_resolved, provenance
from tasks.common.storage import atomic_write, write_json
from tasks.points.config import PointsConfig
from tasks.points.model_card import Exported, model_card
from tasks.points.reports import final_figures
from tasks.points.trained import run_config
from tasks.points.weight_files import WEIGHTS_ENDING, WeightsDtype, pack_weights

MOST_MB = 14.0  # of a file that goes into a repository and a wheel
LICENCE = "Apache-2.0"
_SECTIONS = ("seed", "model", "runtime", "data", "loss", "selftraining", "optim", "train")
# Folders before the last part of an absolute path, wherever it stands in a text.
_FOLDERS = re.compile(r"(?<![\w./])(?:~/|/)(?:[^\s/,=:'\"]+/)*(?=[^\s/,=:'\"])")


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
      RunError: any wrong option, no finished checkpoint, or a file that would be too large, in one line.
    """
    parser = make_parser("Export a trained tracker as one file, with a model card.")
    add = parser.add_argument
    add(
        "--output",
        required=True,
        metavar="FILE",
        help=f"NAME{WEIGHTS_ENDING}; NAME.md and NAME.json go beside it",
    )
    add("--step", type=int, help="the checkpoint of this step (default: the newest)")
    add(
        "--dtype",
        choices=get_args(WeightsDtype),
        default="bfloat16",
        help="of the weights (default: bfloat16)",
    )
    add("--most_mb", type=float, default=MOST_MB, metavar="MB", help=f"largest file (default: {MOST_MB:g})")
    add("--licence", default=LICENCE, help=f"of the weights, for the model card (default: {LICENCE})")
    add("--notes", metavar="FILE", help="text for the model card's section on where it fails: what was seen")
    command = parse_command_line(parser, argv)
    options, workdir = command.options, command.workdir
    if workdir is None:
        raise ConfigError("--workdir=RUN is missing: the run whose tracker is exported")
    if not options.most_mb > 0:
        raise ConfigError(f"--most_mb={options.most_mb:g}: must be positive")
    output = Path(options.output).expanduser()
    if output.suffix != WEIGHTS_ENDING:
        raise ConfigError(f"--output={output}: must end in {WEIGHTS_ENDING}")
    exported = export(workdir, output, options.step, options.dtype, options.most_mb, options.licence,
                      _read_notes(options.notes))  # fmt: skip
    print(f"{output}: {exported.parameters:,} parameters, {exported.size:,} bytes, step {exported.step:,}")
    print(f"sha256 {exported.sha256}")
    print(f"model card: {output.with_suffix('.md')}")


def export(
    workdir: Path, output: Path, step: int | None = None, dtype: WeightsDtype = "bfloat16",
    most_mb: float = MOST_MB, licence: str = LICENCE, notes: str = "",
) -> Exported:  # fmt: skip
    """Writes the weights of a run, its model card and its checksum.

    Args:
      workdir: of the run.
      output: NAME.safetensors.
      step: of the checkpoint; None: the newest good one.
      dtype: of all tensors in the file.
      most_mb: megabytes (10^6 bytes) beyond which nothing is written.
      licence, notes: for the model card.

    Returns:
      What the files say of the weights.

    Raises:
      ConfigError: not a run of points, parameters that are not finite, or a file that would be too large.
      CheckpointError: no good checkpoint, or the files cannot be written.
    """
    run = run_config(workdir)
    restored = load_checkpoint(workdir, step)
    # The last figures are those of the finished run, not of a checkpoint before.
    figures = final_figures(workdir) if restored.step >= run.train.steps else {}
    training = training_record(run, load_resolved(workdir), restored.step, figures)
    with bad_input(str(workdir)):
        content = pack_weights(restored.state, run.model, training, dtype)
    if len(content) > most_mb * 1e6:
        raise ConfigError(
            f"{output}: would be {len(content) / 1e6:.1f} MB, above the limit of {most_mb:g} MB; nothing was "
            "written. Use --dtype=bfloat16, a smaller model, or a larger --most_mb"
        )
    exported = Exported(
        output.name,
        tapnext.count_params(run.model),
        dtype,
        len(content),
        hashlib.sha256(content).hexdigest(),
        restored.step,
        licence,
    )
    card = model_card(exported, training, notes)
    with writing(output.parent, "the weights"):
        atomic_write(output, content)
        write_json(output.with_suffix(".json"), exported._asdict())
        atomic_write(output.with_suffix(".md"), card)
    return exported


def training_record(
    run: PointsConfig, record: Mapping[str, Any], step: int, figures: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """How weights came about, as plain JSON values without folders of this machine.

    Args:
      run: its configuration.
      record: its circumstances, what `load_resolved` gives.
      step: of the checkpoint.
      figures: tracker -> metric -> value of the run's last evaluation; what is not a number becomes None.

    Returns:
      command, device, jax, commit, date, step, figures, and the config's sections that decide the result.
    """
    numbers = {
        name: {key: value if math.isfinite(value) else None for key, value in row.items()}
        for name, row in figures.items()
    }
    config = {name: to_json(getattr(run, name)) for name in _SECTIONS}
    return without_folders({**provenance(record), "step": step, "figures": numbers, "config": config})


def without_folders(value: Any) -> Any:
    """JSON values whose texts have lost the folders of absolute paths: "/a/b/c.npz" becomes "c.npz"."""
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def _read_notes(path: str | None) -> str:
    if path is None:
        return ""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--notes={path}: cannot be read as text: {error}") from error


if __name__ == "__main__":
    run_main(main)
