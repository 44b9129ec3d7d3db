"""What is optimised, on what data, judged how."""

from importlib.util import find_spec
from pathlib import Path

try:
    from models.common.siblings import PACKAGES, require_siblings
except ModuleNotFoundError as error:
    home, found = Path(__file__).resolve().parents[1], find_spec("models")
    where = f"{found.origin}, which shadows it" if found else "nothing of that name"
    raise ImportError(
        f"Foxtrot needs its own package 'models' from {home}, but Python finds {where}. "
        f"Run from another folder, put {home} first on PYTHONPATH, or rename the other package."
    ) from error

require_siblings(*PACKAGES)
