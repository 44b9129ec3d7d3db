"""Packages that not everybody needs: imported when they are, with what to install if they are missing."""

import importlib
from types import ModuleType

# Module -> the extra of foxtrot that installs it; "dev" has them all.
_EXTRAS = {
    "PIL": "video",
    "av": "video",
    "importlib_resources": "tfds",
    "mujoco": "sim",
    "numcodecs": "lm",
    "tensorflow_datasets": "tfds",
    "tiktoken": "lm",
    "tokenizers": "lm",
    "zstandard": "lm",
}


def need(module: str, what: str) -> ModuleType:
    """Imports an optional package or says what to install.

    Raises:
      ImportError: it is missing; `what` needs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = _EXTRAS.get(module.partition(".")[0])
        advice = f"pip install 'foxtrot[{extra}]'" if extra else "it comes with foxtrot: install that again"
        raise ImportError(f"{what} needs the package {module!r}, which is not installed: {advice}") from error
