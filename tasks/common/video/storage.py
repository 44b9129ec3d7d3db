"""JSON that is read with suspicion."""

import json
from pathlib import Path
from typing import Any

from tasks.common.video.errors import VideoDataError


def read_json(path: Path, what: str) -> Any:
    """The value in a JSON file.

    Args:
        path: the file.
        what: it is, for messages.

    Raises:
        VideoDataError: no such file, not UTF-8, not JSON, or nested too deep.
    """
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise VideoDataError(f"{path}: no such file; expected {what}") from None
    except OSError as error:
        raise VideoDataError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise VideoDataError(f"{path}: not UTF-8 at byte {error.start}; expected {what}") from error
    except json.JSONDecodeError as error:
        raise VideoDataError(
            f"{path}: not JSON ({error.msg} at line {error.lineno}; cut off?); expected {what}"
        ) from error
    except RecursionError as error:
        raise VideoDataError(f"{path}: nested too deep; expected {what}") from error
