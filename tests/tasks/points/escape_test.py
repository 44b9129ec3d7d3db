"""The escape key: it ends a live session, arrows do not, and the terminal is left as it was."""

import os
import pty
import sys
import termios
import time

import pytest

from tasks.points.escape import EscapeKey


def test_the_key_is_noticed_and_the_terminal_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as keyboard:
        monkeypatch.setattr(sys, "stdin", keyboard)
        before = termios.tcgetattr(terminal)
        with EscapeKey() as key:
            assert termios.tcgetattr(terminal) != before
            assert not key.hit()
            for keys, wanted in ((b"x", False), (b"\x1b[A", False), (b"\x1b", True), (b"q", False)):
                os.write(controller, keys)
                time.sleep(0.05)
                assert key.hit() == wanted, keys
            assert not key.hit()
        assert termios.tcgetattr(terminal) == before
    os.close(controller)


def test_without_a_terminal_it_is_never_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"\x1b")
    with os.fdopen(reading, "rb") as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        with EscapeKey() as key:
            assert not key.hit()
    os.close(writing)
