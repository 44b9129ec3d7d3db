"""`python -m tasks.lm.data`: what users see, and one clear line with exit code 2 when something is wrong."""

import json
import re
from pathlib import Path

import pytest

from tasks.lm.data.__main__ import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02d}.txt").write_text(f"This is document {i}. " * 20)
    return folder


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    return captured.err


def test_prepare_and_inspect(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.txt").write_bytes(b"\xff\xfe")
    shards = tmp_path / "shards"
    assert main(["prepare", f"--input={folder}", f"--output={shards}", "--workers=1"]) == 0
    out = capsys.readouterr().out
    size = sum((folder / f"{i:02d}.txt").stat().st_size for i in range(12))
    assert f"12 documents, {size} bytes, {size} tokens of bytes (1.000 bytes a token)" in out
    assert "left out: 1" in out
    assert re.search(r"bad\.txt: not UTF-8 text: byte 0 is 0xff", out)
    command = [
        "inspect",
        "--source=text",
        f"--path={shards}",
        "--seq-len=64",
        "--verify",
        "--validation-fraction=0.3",
    ]
    assert main([*command, "--ngrams"]) == 0
    out = capsys.readouterr().out
    training, held_out = (int(re.search(rf"{w}: (\d+) documents", out)[1]) for w in ("training", "held out"))
    assert training + held_out == 12
    assert "checksums: all right" in out
    assert "first text: 'This is document " in out
    assert float(re.search(r"trigram: ([\d.]+) nats/byte", out)[1]) < 1.5


def test_inspect_without_options_shows_the_embedded_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("source: stdlib\ntokenizer: bytes, 259 ids")


def test_train_tokenizer_and_use_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.json"
    (folder / "bad.txt").write_bytes(b"\xff\xfe")
    assert main(["train-tokenizer", f"--input={folder}", f"--output={path}", "--vocab-size=300"]) == 0
    assert "left out: " in capsys.readouterr().out
    vocabulary = json.loads(path.read_text())["model"]["vocab"]
    assert "\u0120document" in vocabulary
    command = ["prepare", f"--input={folder}", f"--output={tmp_path / 'out'}", "--tokenizer=hf"]
    assert main([*command, f"--tokenizer-path={path}", "--workers=1"]) == 0
    tokens = int(re.search(r"(\d+) tokens of hf", capsys.readouterr().out)[1])
    assert tokens < 12 * 20 * 8


def test_errors_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"--output={tmp_path / 'out'}"
    assert "no such file or folder" in error_of(capsys, "prepare", f"--input={tmp_path / 'nowhere'}", out)
    assert "prepare needs --input=DIR" in error_of(capsys, "prepare", out)
    assert "data.source='text' needs data.path" in error_of(capsys, "inspect", "--source=text")
    assert "needs data.tokenizer_path" in error_of(
        capsys, "prepare", f"--input={folder}", out, "--tokenizer=hf"
    )
    (folder / "bad.txt").write_bytes(b"\xff\xfe")
    refused = error_of(capsys, "prepare", f"--input={folder}", out, "--on-error=fail", "--workers=1")
    assert "bad.txt: not UTF-8 text" in refused
    unfinished = error_of(capsys, "prepare", f"--input={folder}", out, "--workers=0")
    assert "workers >= 1" in unfinished


def test_a_file_in_the_way_of_the_output_is_one_line(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").write_text("")
    assert "File exists" in error_of(capsys, "prepare", f"--input={folder}", f"--output={tmp_path / 'out'}")
