"""README tables are those of the committed result files."""

import json
from pathlib import Path

import pytest

from launch.results import RESULTS, ROOT, fill_tables, main, read_rows
from tasks.common.errors import ConfigError

ROWS = [
    {"case": "a", "ms": 1.23456, "ratio": None, "device": "cpu", "date": "2026-01-01"},
    {"case": "b", "ms": 2.0, "ratio": 0.5, "device": "gpu", "date": "2026-01-01"},
]


def test_readme_is_up_to_date() -> None:
    main(["--check"])


def test_every_result_file_is_readable_and_says_where_it_comes_from() -> None:
    files = sorted(RESULTS.glob("*.json"))
    assert files
    for path in files:
        for row in read_rows(path):
            assert {"device", "jax", "commit", "date", "command"} <= row.keys(), path


def test_table(tmp_path: Path) -> None:
    (tmp_path / "x-cpu.json").write_text(json.dumps(ROWS))
    filled = fill_tables("before\n<!-- results: x-cpu -->\nold\n<!-- end -->\nafter", tmp_path)
    assert filled.splitlines() == [
        "before", "<!-- results: x-cpu -->", "| case | ms | ratio | device |", "|---|---|---|---|",
        "| a | 1.235 | not run | cpu |", "| b | 2 | 0.5 | gpu |", "",
        "date: `2026-01-01`.", "<!-- end -->", "after",
    ]  # fmt: skip
    assert fill_tables(filled, tmp_path) == filled


@pytest.mark.parametrize("content", ["{", "{}", "[]", "[1]", '[{"a": 1}, {"b": 2}]'])
def test_unusable_files_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError, match=r"x\.json"):
        fill_tables("<!-- results: x -->\n<!-- end -->", tmp_path)


def test_readme_marks_at_least_one_table() -> None:
    assert "<!-- results: " in (ROOT / "README.md").read_text(encoding="utf-8")
