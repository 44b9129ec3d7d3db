"""Finished evaluations side by side, from their folders: nothing is evaluated anew.

    python -m tasks.points.compare evaluation/* --results=FILE.json

Prints AJ, delta_avg, OA and AJ_RD of each. --results writes a row for each, for `launch.results`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tasks.common.config import make_parser
from tasks.common.errors import run_main, writing
from tasks.common.resolved import load_resolved, provenance
from tasks.common.storage import write_json
from tasks.points.evaluation_store import POOLED, read_summary
from tasks.points.export import without_folders
from tasks.points.metrics import AVERAGE_JACCARD, AVERAGE_WITHIN, OCCLUSION_ACCURACY
from tasks.points.reports import NAMES

COLUMNS = {AVERAGE_JACCARD: "AJ", AVERAGE_WITHIN: "delta_avg", OCCLUSION_ACCURACY: "OA", POOLED: "AJ_RD"}


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
      ConfigError: a folder that is no evaluation, or one that has not finished.
    """
    parser = make_parser("Compare finished evaluations by what they recorded.")
    parser.add_argument(
        "evaluations", nargs="+", type=Path, metavar="DIR", help="outputs of tasks.points.eval"
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="write a row for each, as JSON")
    parser.add_argument("--command", default="", help="to state in all rows, instead of the recorded ones")
    parser.add_argument("--commit", default="", help="of the sources, where the evaluation could not tell")
    options = parser.parse_args(argv)
    rows = [row(folder, options.command, options.commit) for folder in options.evaluations]
    table = Table(title="means over videos, per cent")
    shown = [name for name in rows[0] if name not in ("command", "device", "jax", "commit", "date")]
    for name in shown:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for found in rows:
        table.add_row(*(str(found[name]) for name in shown))
    Console(highlight=False).print(table)
    if options.results is not None:
        with writing(options.results.parent, options.results.name):
            write_json(options.results, rows)


def row(folder: Path, command: str = "", commit: str = "") -> dict[str, Any]:
    """What a result file says of a finished evaluation; metrics in per cent, "-" where nothing defines one.

    Args:
      folder: the evaluation's output.
      command, commit: instead of the recorded ones.

    Raises:
      ConfigError: no finished evaluation.
    """
    summary = read_summary(folder)
    mode, predictor = summary["query_mode"], summary["predictor"]
    means = {title: summary["means"][name] for name, title in COLUMNS.items()}
    return {
        # The folder is named SET-MODE-TRACKER unless --output says otherwise.
        "set": folder.resolve().name.partition(f"-{mode}-")[0],
        "queries": mode,
        "tracker": NAMES.get(predictor, predictor),
        "videos": summary["videos"],
        "points": summary["queries"],
        **{title: "-" if value is None else round(100 * value, 1) for title, value in means.items()},
        **without_folders(provenance(load_resolved(folder), command=command, commit=commit)),
    }


if __name__ == "__main__":
    run_main(main)
