"""What is optimised, on what data, judged how."""

from importlib.util import find_spec
from pathlib import Path

try:
    from models.common.siblings import PACKAGES, require_siblings
except ModuleNotFoundError as error:
    found = find_spec("models")
    raise ImportError(
        f"Foxtrot needs its own package 'models' from {Path(__file__).resolve().parents[1]}, but Python finds "
        f"{found.origin if found else 'nothing of that name'}. Run from another folder or rename the other package."
    ) from error

require_siblings(*PACKAGES)
