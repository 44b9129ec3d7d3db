"""What the repository says: nothing that only makes sense on one machine, and commands that exist."""

import re
import subprocess
from pathlib import Path

import pytest

from tasks.common.config import load_config

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {".git", ".venv", "__pycache__", "runs", "data", "build", "dist"}
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.])/(?:work|root|home/\w+|opt|mnt)/",
    "a package index": r"pypi\.org|pythonhosted\.org|registry\.npmjs|(?:extra-)?index-url\b",
    "a note from elsewhere": r"\b(?:design|style|ecosystem|feasibility|fox|trecvit|tapnext)\.md\b",
    "unfinished work": r"\b(?:TODO|FIXME|XXX)\b",
}


def files() -> list[Path]:
    """Text files that are, or would be, committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        found = [ROOT / line for line in listed.stdout.splitlines()]
    else:  # not a git checkout: an unpacked archive, say
        found = [p for p in ROOT.rglob("*") if not SKIPPED & set(p.relative_to(ROOT).parts)]
    return [p for p in found if p.is_file() and b"\0" not in p.read_bytes()[:4096]]


def test_repository_words():
    offenders = []
    for path in files():
        if path == Path(__file__).resolve():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for what, pattern in FORBIDDEN.items():
            for match in re.finditer(pattern, text):
                line = text.count("\n", 0, match.start()) + 1
                offenders.append(f"{path.relative_to(ROOT)}:{line}: {match[0]!r} is {what}")
    assert offenders == []


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("see /root/x", "a path of one machine"),
        ("https://pypi.org/simple", "a package index"),
        ("TODO later", "unfinished work"),
    ],
)
def test_the_patterns_find_what_they_should(text, what):
    assert re.search(FORBIDDEN[what], text)


def commands() -> list[tuple[str, str]]:
    """(document, command) for every command in fenced code, and every `make x` or `python -m x` in prose."""
    found = []
    for path in files():
        if path.suffix != ".md" or "golden" in path.parts:
            continue
        text = path.read_text()
        blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines() + re.findall(r"`([^`\n]+)`", text)
        name = str(path.relative_to(ROOT))
        found += [
            (name, line.strip())
            for line in lines
            if re.match(r"\s*(\S+=\S+ )*(make|\S*python|pytest)\b", line)
        ]
    return found


def test_documented_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    problems = []
    for document, command in commands():
        for target in re.findall(r"\bmake ([a-z][a-z-]*)", command):
            if target not in targets:
                problems.append(f"{document}: {command!r}: no such make target")
        for module in re.findall(r"-m ((?:models|kernels|tasks|launch)[\w.]*)", command):
            base = ROOT / module.replace(".", "/")
            if not (base.with_suffix(".py").exists() or (base / "__main__.py").exists()):
                problems.append(f"{document}: {command!r}: no such module")
        for path in re.findall(r"\b(tests/[\w/.-]*)", command):
            if not (ROOT / path).exists():
                problems.append(f"{document}: {command!r}: no such path")
    assert problems == []
    assert any("make train" in command for _, command in commands())


def test_documented_configs_load():
    for _, command in commands():
        for address in re.findall(r"--config=(configs/[\w./]+(?::[^\s\[\]]*)?)", command):
            load_config(address.rstrip("`'\""))
