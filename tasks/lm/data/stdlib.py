"""The embedded source: the running Python's own standard-library sources, one file a document.

Left out: installed packages, files that are not UTF-8, and, with the reason (Python 3.12.1, figures of the
trigram of `ngram.py`, mean over four splits that hold out a different tenth of the documents each):

- `test` folders: 20 of 32 MB, but many distributions strip them, so the data would depend on where it
  came from.
- the generated tables in `encodings` and `pydoc_data`, 2.2 MB: code pages differ in a few lines, so that a
  split by document leaks; held-out nats per byte are 1.82 with them and 1.87 without.
"""

import sysconfig
from functools import cache
from pathlib import Path

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_TABLES = {"encodings", "pydoc_data"}


def _wanted(relative: Path) -> bool:
    return not (_LEFT_OUT & set(relative.parts)) and relative.parts[0] not in _TABLES


@cache
def stdlib_texts() -> tuple[tuple[str, str], ...]:
    """(name, text) of every standard-library source, sorted by name; line ends as in the file.

    Raises:
        ValueError: this Python comes without sources (a zipped or stripped distribution).
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if not _wanted(relative):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            texts.append((relative.as_posix(), text))
    if len(texts) < 2:
        raise ValueError(
            f"this Python has no standard-library sources under {root}: use another Python, or "
            "data.source='text' "
            "with data.path=<a folder of text>"
        )
    return tuple(texts)
