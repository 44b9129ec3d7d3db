"""Files inside packages (.deb, .tgz, .whl), read without unpacking: nothing is written, nothing is run."""

import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from tasks.common.optional import need

# Larger than anything a package of text or films holds: a damaged or hostile archive must not fill the
# memory.
MOST_BYTES = 1 << 30
# Of an archive inside a package, which is read as a stream and never whole in memory: a limit on time.
MOST_STREAMED = 4 << 30
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60
_UNREADABLE = (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error)

Wanted = Callable[[str], bool]


class PackageError(ValueError):
    """A package that cannot be had or read: names it and says why."""


def members(package: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files of a package whose name is `wanted`, in the archive's order.

    Names are relative, without "./"; what is gzipped (.gz) comes unzipped under its name without ".gz".

    Raises:
        PackageError: not a package, damaged, a name that leads out of it, or a file too large.
        ImportError: a .deb packed with zstandard, and no package to read that.
    """
    try:
        for name, content in _raw_members(package, lambda raw: wanted(raw.removesuffix(".gz"))):
            if name.endswith(".gz"):
                yield name.removesuffix(".gz"), _gunzip(content, f"{package}: {name}")
            else:
                yield name, content
    except PackageError:
        raise
    except _UNREADABLE as error:
        raise PackageError(f"{package}: damaged, or not a package: {error}") from error


def inner_members(package: Path, archive: Wanted, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    """As `members`, of the tar archives inside a package whose own name is wanted by `archive`.

    Raises:
        PackageError: as `members`; or more than `MOST_STREAMED` bytes in an archive.
    """
    for outer, content in members(package, archive):
        where, unpacked = Path(f"{package}: {outer}"), 0
        try:
            with tarfile.open(fileobj=io.BytesIO(content), mode="r|*") as tar:
                for info in tar:
                    unpacked += info.size
                    if info.size > MOST_BYTES or unpacked > MOST_STREAMED:
                        raise PackageError(
                            f"{where}: {unpacked} bytes unpacked with {info.name} ({info.size} bytes): "
                            "refused"
                        )
                    yield from _tar_member(tar, info, where, wanted)
        except _UNREADABLE as error:
            raise PackageError(f"{where}: damaged, or not a tar archive: {error}") from error


def _raw_members(package: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    if package.suffix == ".whl":
        yield from _zip_members(package, wanted)
    elif package.suffix == ".deb":
        yield from _tar_members(io.BytesIO(_deb_data(package)), package, wanted)
    else:
        with gzip.open(package, "rb") as file:
            yield from _tar_members(io.BytesIO(_limited(file.read(MOST_BYTES + 1), package)), package, wanted)


def _deb_data(package: Path) -> bytes:
    """The tar archive of the files in a .deb, which is an ar archive of three members."""
    content = package.read_bytes()
    if not content.startswith(_AR_MAGIC):
        raise PackageError(f"{package}: not a Debian package: it does not begin with {_AR_MAGIC!r}")
    at = len(_AR_MAGIC)
    while at + _AR_HEADER <= len(content):
        header = content[at : at + _AR_HEADER]
        name = header[:16].decode("ascii", "replace").strip().rstrip("/")
        digits = header[48:58].strip()
        if header[58:] != b"`\n" or not digits.isdigit():
            raise PackageError(f"{package}: damaged at byte {at}: no header of an archive member")
        start, size = at + _AR_HEADER, int(digits)
        if start + size > len(content):
            raise PackageError(f"{package}: truncated in {name}")
        if name.startswith("data.tar"):
            return _decompressed(content[start : start + size], name, package)
        at = start + size + size % 2
    raise PackageError(f"{package}: no data.tar in it")


def _decompressed(content: bytes, name: str, package: Path) -> bytes:
    where = f"{package}: {name}"
    match PurePosixPath(name).suffix:
        case ".xz":
            reader = lzma.LZMADecompressor()
            data = reader.decompress(content, MOST_BYTES + 1)
            if not reader.eof and len(data) <= MOST_BYTES:
                raise PackageError(f"{where}: truncated: the xz data ends before its end mark")
            return _limited(data, where)
        case ".gz":
            return _gunzip(content, where)
        case ".zst":
            zstandard = need("zstandard", f"reading {package.name}")
            with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)) as file:
                return _limited(file.read(MOST_BYTES + 1), where)
        case ".tar":
            return content
    raise PackageError(f"{where}: unknown compression")


def _gunzip(content: bytes, where: str) -> bytes:
    with gzip.open(io.BytesIO(content)) as file:
        return _limited(file.read(MOST_BYTES + 1), where)


def _limited(content: bytes, where: object) -> bytes:
    if len(content) > MOST_BYTES:
        raise PackageError(f"{where}: more than {MOST_BYTES} bytes unpacked: refused")
    return content


def _tar_members(archive: io.BytesIO, package: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=archive, mode="r:") as tar:
        for info in tar:
            yield from _tar_member(tar, info, package, wanted)


def _tar_member(
    tar: tarfile.TarFile, info: tarfile.TarInfo, where: Path, wanted: Wanted
) -> Iterator[tuple[str, bytes]]:
    name = _safe(info.name, where)
    if not info.isreg() or not wanted(name):  # no links, no devices
        return
    file = tar.extractfile(info)
    assert file is not None
    yield name, file.read()


def _zip_members(package: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(package) as archive:
        for info in archive.infolist():
            name = _safe(info.filename, package)
            if info.is_dir() or not wanted(name):
                continue
            with archive.open(info) as file:
                yield name, _limited(file.read(MOST_BYTES + 1), f"{package}: {name}")


def _safe(name: str, package: Path) -> str:
    """The name without "./"; nothing is unpacked, but an archive with such a name is not what it claims."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise PackageError(f"{package}: holds {name!r}, a name that leads out of the package: refused")
    return path.as_posix()
