"""How each model is built and run: what tests/models/<room>/contract_cases.py says of it."""

import functools
import importlib.util
import sys
from collections.abc import Iterable
from typing import Any

from tests.conftest import ROOT


def rooms_with_cases() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "tests" / "models").glob("*/contract_cases.py"))


@functools.cache
def load_cases(room: str) -> dict[str, Any]:
    """Cases by name, called as tests are found: a case makes its parameters when a test asks for them."""
    path = ROOT / "tests" / "models" / room / "contract_cases.py"
    assert path.is_file(), f"{path.relative_to(ROOT)} must say how to run models/{room}"
    spec = importlib.util.spec_from_file_location(f"foxtrot_tests_{room}_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.cases()


def named_cases(rooms: Iterable[str]) -> dict[str, Any]:
    return {f"{room}: {name}": case for room in rooms for name, case in load_cases(room).items()}
