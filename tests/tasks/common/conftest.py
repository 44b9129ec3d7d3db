"""The tiny run of this folder, as a module and as a program."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/tasks/common/tiny_run.py, under the name by which worker processes can import it too."""
    return importlib.import_module("tests.tasks.common.tiny_run")


@pytest.fixture
def tiny_program() -> str:
    """Path of the same file, to be run by a child process."""
    return str(Path(__file__).with_name("tiny_run.py"))
