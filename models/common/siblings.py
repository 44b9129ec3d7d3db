"""Notices at once when another package of the same name stands in front of one of ours.

`models`, `kernels`, `tasks`, `configs` and `launch` are ordinary words, so the current folder or another
installed distribution may own one too. Without this check the mix fails later, far from the cause.
"""

import importlib.util
from pathlib import Path

PACKAGES = ("models", "kernels", "tasks", "configs", "launch")
_HOME = Path(__file__).resolve().parents[2]


def require_siblings(*names: str) -> None:
    """Checks that Python would import each of these packages from the folder this package lies in.

    Args:
      *names: top-level package names; they are located, not imported.

    Raises:
      ImportError: one of them is missing, or lies in another folder (named, with what to do).
    """
    for name in names:
        found = _location(name)
        if found != _HOME / name:
            where = f"{found}, which shadows it" if found else "nothing of that name"
            raise ImportError(
                f"Foxtrot needs its own package {name!r} from {_HOME}, but Python finds {where}. "
                f"Run from another folder, put {_HOME} first on PYTHONPATH, or rename the other package."
            )


def _location(name: str) -> Path | None:
    """Folder of a top-level package, found as `import` would find it; None if there is none."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.origin:
        origin = Path(spec.origin).resolve()
        return origin.parent if origin.name == "__init__.py" else origin
    return Path(next(iter(spec.submodule_search_locations or [""]))).resolve()
