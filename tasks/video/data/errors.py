"""What can be wrong with video data, and how an optional package is asked for."""

import importlib
from types import ModuleType


class VideoDataError(ValueError):
    """A list, layout, shard or package that cannot be used: names the file, what is wrong, what would be
    right."""


class VideoError(VideoDataError):
    """One video file that cannot be read.

    Attributes:
        name: the file (or record).
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, " ".join(reason.split())

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class VideoTimeout(VideoDataError):
    """Reading a file took longer than its budget of time.

    Not a `VideoError`: leaving such a file out would make what a batch holds depend on the speed of the
    machine.
    """


def need(module: str, what: str) -> ModuleType:
    """Import an optional package or say what to install.

    Raises:
        ImportError: it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = "tfds" if module in ("tensorflow_datasets", "importlib_resources") else "video"
        raise ImportError(
            f"{what} needs the package {module!r}, which is not installed: pip install 'foxtrot[{extra}]'"
        ) from error
