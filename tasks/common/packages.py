"""Packages of Debian, npm and pip: downloaded by those clients, never installed or run.

`tasks.common.archives` reads them.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from tasks.common.archives import PackageError

Manager = Literal["apt", "npm", "pip"]
Say = Callable[[str], None]

_TIMEOUT = 1800  # seconds


def choose[T](table: Mapping[str, T], names: Sequence[str], what: str, error: type[ValueError]) -> list[T]:
    """The named entries of a table of what packages hold, in its order; none named: all.

    Args:
      table: by name.
      names: of entries.
      what: an entry is, for the message.
      error: is raised of an unknown name.
    """
    for name in names:
        if name not in table:
            raise error(f"unknown {what} {name!r}: there are {', '.join(table)}")
    return [entry for name, entry in table.items() if name in names or not names]


def find_package(manager: Manager, package: str, folder: Path) -> Path | None:
    """The package that lies in `folder`, downloaded earlier or put there by hand; or None.

    Args:
      manager: apt (a .deb), npm (a .tgz) or pip (a wheel).
      package: its name; with "@version" for npm, "==version" for pip.
      folder: where it may be.
    """
    name, _, version = re.sub(r"==|@", " ", package).partition(" ")
    wheel = re.sub(r"[-_.]+", "[-_.]", name)
    patterns = {"apt": f"{name}_*.deb", "npm": f"{name}-{version}.tgz", "pip": f"{wheel}-{version}-*.whl"}
    return max(folder.glob(patterns[manager]), default=None)


def obtain(manager: Manager, package: str, folder: Path, otherwise: str, say: Say) -> tuple[Path, str]:
    """A package that lies in `folder` or, if none does, is downloaded into it, and its SHA-256.

    Args:
      manager, package, folder: as in `find_package`.
      otherwise: as in `download`.
      say: told of a download before it begins.

    Raises:
      PackageError: as `download`.
    """
    path = find_package(manager, package, folder)
    if path is None:
        say("    downloading")
        path = download(manager, package, folder, otherwise)
    with path.open("rb") as file:
        return path, hashlib.file_digest(file, "sha256").hexdigest()


def download(manager: Manager, package: str, folder: Path, otherwise: str) -> Path:
    """Has the registry's client download a package into `folder`.

    Args:
      manager, package: as in `find_package`. Of pip wheels only: it would run a source package's own code.
      folder: where to.
      otherwise: what one can do without the package, for messages: "or leave ... out".

    Raises:
      PackageError: the client is missing, or says that it cannot.
    """
    commands = {
        "apt": ["apt-get", "download", package],
        "npm": ["npm", "pack", "--ignore-scripts", package],
        "pip": [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", package],
    }
    command = commands[manager]
    if shutil.which(command[0]) is None:
        raise PackageError(
            f"{command[0]} is not here: put the package {package} into {folder} by hand, {otherwise}"
        )
    # In a folder of its own: what an interrupted client leaves must not pass for a package.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        _call(command, Path(temporary), otherwise)
        found = find_package(manager, package, Path(temporary))
        if found is None:
            raise PackageError(f"{' '.join(command)}: succeeded, but left no package of that name")
        return found.rename(folder / found.name)


def _call(command: list[str], folder: Path, otherwise: str) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise PackageError(f"{' '.join(command)}: not finished after {_TIMEOUT} seconds") from None
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        advice = ""
        if command[0] == "apt-get":
            advice = f" (the list is that of Debian 12; run `apt-get update` first, {otherwise})"
        raise PackageError(f"{' '.join(command)}: {lines[-1] if lines else 'failed'}{advice}")
