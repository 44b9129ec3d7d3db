"""The escape key, on the terminal that a command was started from."""

import os
import select
import sys
from types import TracebackType
from typing import Any, Self

_ESCAPE = b"\x1b"


class EscapeKey:
    """Whether the key was hit. A context manager: inside, the terminal hands keys over one by one, unseen.

    Where the input is no terminal, or of a system without terminal settings, it never is.
    """

    def __init__(self) -> None:
        self._settings: Any = None

    def __enter__(self) -> Self:
        try:
            import termios
            import tty
        except ImportError:
            return self
        try:
            self._input = sys.stdin.fileno()
            settings = termios.tcgetattr(self._input)
            tty.setcbreak(self._input)
            self._settings = settings
        except (OSError, ValueError, termios.error):
            pass
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._settings is not None:
            import termios

            termios.tcsetattr(self._input, termios.TCSADRAIN, self._settings)

    def hit(self) -> bool:
        """Whether it was since the last call; other keys are forgotten."""
        if self._settings is None:
            return False
        keys = b""
        while select.select([self._input], [], [], 0)[0]:
            more = os.read(self._input, 64)
            if not more:
                break
            keys += more
        # Arrows and function keys begin with the same byte, but do not end with it.
        return keys.endswith(_ESCAPE)
