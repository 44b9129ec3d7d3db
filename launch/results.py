"""README tables from the JSON files under benchmarks/results/.

    python -m launch.results            rewrites the tables of README.md
    python -m launch.results --check    fails if they are out of date

A result file `<what>-<device>.json` is a list of rows with the same keys. Keys in `CAPTION` say where the
numbers come from and go below the table; the others are its columns. In README.md a table stands between the
two comments `<!-- results: <what>-<device> -->` and `<!-- end -->`.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.common.errors import ConfigError, run_main

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CAPTION = ("measured", "command", "device", "jax", "commit", "date", "seed")
_BLOCK = re.compile(r"(<!-- results: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments not in ([], ["--check"]):
        raise ConfigError(f"unknown option {' '.join(arguments)!r}; the only one is --check")
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = fill_tables(old, RESULTS)
    if new == old:
        return
    if arguments:
        raise ConfigError("README.md is out of date: run `python -m launch.results`")
    readme.write_text(new, encoding="utf-8")


def fill_tables(text: str, folder: Path) -> str:
    """`text` with every marked table made anew from the files in `folder`.

    Raises:
      ConfigError: a table names a file that is missing or is not a list of rows.
    """
    return _BLOCK.sub(lambda m: f"{m[1]}{table(read_rows(folder / f'{m[2]}.json'))}\n{m[3]}", text)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file.

    Raises:
      ConfigError: no such file, or not a list of rows with one set of keys.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(rows, list) or not rows or any(not isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path}: expected a list of rows, each an object")
    if any(row.keys() != rows[0].keys() for row in rows):
        raise ConfigError(f"{path}: its rows have different keys")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the rows, and a line that says what they were measured with.

    A caption key whose value differs between rows becomes a column.
    """
    shared = [key for key in CAPTION if key in rows[0] and len({str(row[key]) for row in rows}) == 1]
    columns = [key for key in rows[0] if key not in shared]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[key]) for key in columns) + " |" for row in rows]
    caption = "; ".join(f"{key}: `{rows[0][key]}`" for key in shared)
    return "\n".join([*lines, "", f"{caption}."]) if caption else "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "not run"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)


if __name__ == "__main__":
    run_main(main)
