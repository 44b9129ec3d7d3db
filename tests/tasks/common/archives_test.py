"""Packages are read as archives: their real formats, and every way they can be damaged or hostile."""

import gzip
import lzma
from pathlib import Path

import pytest
import zstandard

from tasks.common import archives
from tasks.common.archives import PackageError, inner_members, members
from tests.tasks.common.package_files import ar, tar, write_deb, write_tgz, write_wheel

FILES = {"doc/b.txt": b"two", "doc/a.txt.gz": gzip.compress(b"one"), "doc/c.bin": b"\0", "odd.txt": b"3"}
TEXT = [("doc/b.txt", b"two"), ("doc/a.txt", b"one"), ("odd.txt", b"3")]


def texts(package: Path) -> list[tuple[str, bytes]]:
    return list(members(package, lambda name: name.endswith(".txt")))


@pytest.mark.parametrize(
    ("compress", "ending"),
    [(lzma.compress, ".xz"), (gzip.compress, ".gz"), (zstandard.compress, ".zst"), (bytes, "")],
    ids=["xz", "gz", "zst", "plain"],
)
def test_debian_packages(tmp_path: Path, compress, ending) -> None:
    assert texts(write_deb(tmp_path / "x_1_all.deb", FILES, compress, ending)) == TEXT


def test_other_packages(tmp_path: Path) -> None:
    assert texts(write_tgz(tmp_path / "x-1.tgz", FILES)) == TEXT
    assert texts(write_wheel(tmp_path / "x-1-py3-none-any.whl", FILES)) == TEXT


@pytest.mark.parametrize("name", ["../outside.txt", "doc/../../outside.txt", "/etc/outside.txt"])
@pytest.mark.parametrize("ending", ["deb", "tgz", "whl"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str, ending: str) -> None:
    write = {"deb": write_deb, "tgz": write_tgz, "whl": write_wheel}[ending]
    with pytest.raises(PackageError, match=r"a name that leads out of the package: refused"):
        texts(write(tmp_path / f"x.{ending}", {"a.txt": b"fine", name: b"not fine"}))


def test_links_are_not_followed(tmp_path: Path) -> None:
    assert "link.txt" not in dict(texts(write_tgz(tmp_path / "x.tgz", {"a.txt": b"fine"})))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.deb", b"PK\3\4", "not a Debian package"),
        ("x.deb", ar({"debian-binary": b"2.0\n"}), "no data.tar in it"),
        ("x.deb", ar({"data.tar.xz": lzma.compress(tar(FILES))})[:-40], "truncated in data.tar.xz"),
        ("x.deb", ar({"data.tar.xz": lzma.compress(tar(FILES))[:-40]}), "truncated: the xz data"),
        ("x.deb", ar({"data.tar.xz": b"no xz"}), "damaged, or not a package"),
        ("x.deb", ar({"data.tar.br": b"?"}), "unknown compression"),
        ("x.deb", b"!<arch>\n" + b"?" * 60, "damaged at byte 8"),
        ("x.tgz", b"no gzip", "damaged, or not a package"),
        # Without the time in them, which would be in the tests' names and differ between workers.
        ("x.tgz", gzip.compress(b"no tar" * 200, mtime=0), "damaged, or not a package"),
        ("x.tgz", gzip.compress(tar(FILES), mtime=0)[:-20], "damaged, or not a package"),
        ("x.whl", b"no zip", "damaged, or not a package"),
    ],
)
def test_damaged_packages_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PackageError, match=rf"{name}.*{message}"):
        texts(tmp_path / name)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = {"a.txt.gz": gzip.compress(bytes(100_000)), "b.txt": bytes(100_000)}
    paths = [
        write_deb(tmp_path / "x.deb", bomb),
        write_tgz(tmp_path / "x.tgz", bomb),
        write_wheel(tmp_path / "x.whl", bomb),
    ]
    monkeypatch.setattr(archives, "MOST_BYTES", 50_000)
    for path in paths:
        with pytest.raises(PackageError, match="more than 50000 bytes unpacked"):
            texts(path)


def inner(package: Path) -> list[tuple[str, bytes]]:
    """Texts in the .tar.xz of a package."""
    return list(
        inner_members(package, lambda name: name.endswith(".tar.xz"), lambda name: name.endswith(".txt"))
    )


def test_an_archive_in_a_package_is_read_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = tar({"x-1/a.txt": b"one", "x-1/b.bin": bytes(9), "x-1/c.txt": b"three"})
    package = write_deb(tmp_path / "x_1_all.deb", {"src/x.tar.xz": lzma.compress(content), "odd.txt": b"3"})
    assert inner(package) == [("x-1/a.txt", b"one"), ("x-1/c.txt", b"three")]
    monkeypatch.setattr(archives, "MOST_STREAMED", 12)
    with pytest.raises(PackageError, match=r"x\.tar\.xz: 17 bytes unpacked with x-1/c\.txt \(5 bytes\)"):
        inner(package)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lzma.compress(tar({"../a.txt": b"?"})), "leads out of the package: refused"),
        (lzma.compress(tar({"a.txt": bytes(range(256)) * 99}))[:200], "damaged, or not a tar archive"),
        (b"neither", "damaged, or not a tar archive"),
    ],
)
def test_damaged_archives_in_a_package_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    package = write_deb(tmp_path / "x_1_all.deb", {"src/x.tar.xz": content})
    with pytest.raises(PackageError, match=rf"x_1_all\.deb: src/x\.tar\.xz.*{message}"):
        inner(package)
