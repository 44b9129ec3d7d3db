"""Makes .venv: the exact versions of requirements.lock, then this project, editable. Standard library only.

Called by the Makefile with any Python >= 3.12 when .venv/.installed is missing or out of date. That stamp
is written last, so an interrupted run is repeated. A run killed while pip was at work leaves a mark behind:
pip may then take half a package for a whole one, so the environment is made anew (pip's cache has the files).
"""

import re
import subprocess
import sys
import time
import venv
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--no-compile", "--no-deps")
# "Collecting x==1" from an index, "Processing .../x-1.whl" from a folder, or there already.
PACKAGE_LINE = re.compile(r"(?:Collecting|Processing|Requirement already satisfied:) (\S+)")
INSTALLING, INSTALLED = ".installing", ".installed"


def pinned(lock: Path) -> list[str]:
    """The `name==version` lines of a lock file."""
    lines = (line.strip() for line in lock.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def ensure_venv(folder: Path) -> Path:
    """Path of the environment's Python; a missing or half-made environment is made anew.

    Raises:
      SystemExit: the folder holds an environment of a Python older than 3.12.
    """
    python = folder / "bin" / "python"
    killed = (folder / INSTALLING).exists()
    probe = "import sys, pip; print(sys.version_info >= (3, 12))"
    found = subprocess.run([python, "-c", probe], capture_output=True, text=True) if python.exists() else None
    if found is not None and found.stdout.strip() == "False":
        raise SystemExit(f"{folder} was made with a Python older than 3.12: remove it and run make again")
    if killed or found is None or found.returncode != 0:
        print(f"Making {folder.name} with Python {sys.version.split()[0]}", flush=True)
        venv.EnvBuilder(clear=True, with_pip=True, symlinks=True).create(folder)
    return python


def progress(lines: Iterable[str], total: int, live: bool) -> list[str]:
    """Counts the packages pip reports and shows the count; returns the other lines, for use in an error."""
    seen, rest = 0, []
    for line in lines:
        package = PACKAGE_LINE.match(line)
        if package is None:
            rest.append(line.strip())
            if line.startswith("Installing collected packages"):
                print("\n  unpacking ..." if live else "  unpacking ...", flush=True)
            continue
        seen += 1
        if live:
            print(f"\r  {seen:3d}/{total} {Path(package[1]).name:40.40s}", end="", flush=True)
        elif seen % 25 == 0:
            print(f"  {seen:3d}/{total}", flush=True)
    return rest


def install(python: Path, arguments: Sequence[str], total: int) -> None:
    """Runs pip quietly: its own words are shown only if it fails (they would name mirrors and caches).

    Raises:
      SystemExit: pip failed, and left the environment in order.
    """
    marker = python.parents[1] / INSTALLING
    marker.touch()
    command = [python, *PIP, *arguments]
    pip = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert pip.stdout is not None
    said = progress(pip.stdout, total, live=sys.stdout.isatty())
    status = pip.wait()
    marker.unlink()
    if status != 0:
        errors = [line for line in said if "error" in line.lower()] or said[-20:]
        raise SystemExit("\n".join(["pip failed:", *errors, "Run make again to resume the installation."]))


def main() -> None:
    started = time.monotonic()
    folder = ROOT / ".venv"
    python = ensure_venv(folder)
    packages = pinned(LOCK)
    print(f"Installing {len(packages)} pinned packages into {folder.name} (about 1.5 GB)", flush=True)
    install(python, ["-r", str(LOCK)], len(packages))
    install(python, ["--no-build-isolation", "--editable", str(ROOT)], 1)
    (folder / INSTALLED).touch()
    print(f"Ready in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
