"""The house rules that a parser can check: who imports whom, how big things are, what is documented.

Read from the source with `ast`, so lazy imports inside functions count too.
"""

import ast
import dataclasses
import functools
import importlib
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("kernels", "models", "tasks", "launch")  # each may import those to its left
PACKAGES = (*LAYERS, "configs")
MODULE_LINES, RAW_KERNEL_LINES, FUNCTION_LINES = 400, 600, 60

# path (or path::function) -> why it may be longer. A reason that no longer applies fails the test.
ALLOWED_SIZES: dict[str, str] = {}

FRAMEWORKS = {"torch", "tensorflow", "keras", "torchvision", "jax_dataloader"}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc"}


@dataclasses.dataclass(frozen=True)
class Module:
    """One of our source files."""

    path: Path

    @property
    def name(self) -> str:
        """Dotted name; a package is named by its folder."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def package(self) -> str:
        return self.path.relative_to(ROOT).parts[0]

    @property
    def room(self) -> str | None:
        """The folder below the package: "common", a paper's or a task's; None for files right in it."""
        parts = self.path.relative_to(ROOT).parts
        return parts[1] if len(parts) > 2 else None

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(), str(self.path))

    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of everything imported anywhere in the file; `from a import b` gives a.b."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((node.lineno, f"{self._base(node)}.{alias.name}") for alias in node.names)

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        here = self.name.split(".") if self.path.name == "__init__.py" else self.name.split(".")[:-1]
        return ".".join([*here[: len(here) - node.level + 1], *([node.module] if node.module else [])])

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))


@functools.cache
def modules(*packages: str) -> tuple[Module, ...]:
    found = tuple(Module(p) for name in packages for p in sorted((ROOT / name).rglob("*.py")))
    assert found, f"no source files under {packages}"
    return found


def report(offenders: list[str], rule: str) -> None:
    assert not offenders, "\n  ".join([rule, *offenders])


def forbidden_import(module: Module, name: str) -> str | None:
    """Why `module` may not import `name`, or None."""
    package, _, rest = name.partition(".")
    room = rest.partition(".")[0] or None
    if module.package == "configs":
        allowed = package in ("configs", "ml_collections") or package in sys.stdlib_module_names
        return None if allowed else "configs is a leaf: ml_collections and configs only"
    if package == "configs":
        if room == "common" and module.package in ("tasks", "launch"):
            return None
        return "config files are read by path; only configs.common may be imported, by tasks and launch"
    if package not in LAYERS:
        return None
    if LAYERS.index(package) > LAYERS.index(module.package):
        return f"imports point down only: {' -> '.join(reversed(LAYERS))}"
    is_room = room is not None and (ROOT / package / room).is_dir() and room != "common"
    if is_room and module.room == "common" and package != "kernels":
        return "common never imports a room"
    if is_room and package == module.package and module.room not in (None, room):
        return "rooms never import each other"
    return None


def test_imports_point_down():
    offenders = []
    for module in modules(*PACKAGES):
        for line, name in module.imports():
            why = forbidden_import(module, name)
            if why:
                offenders.append(f"{module}:{line} imports {name}: {why}")
    report(offenders, "forbidden imports:")


@pytest.mark.parametrize(
    ("importer", "name", "forbidden"),
    [
        ("kernels/forgetting_attention/api.py", "models.common", True),
        ("models/fox/model.py", "tasks.common.loop", True),
        ("models/fox/model.py", "models.lm", False),  # a name, not a room: there is no such folder
        ("models/fox/model.py", "models.common.layers", False),
        ("models/common/layers.py", "models.fox.config", True),
        ("models/common/layers.py", "kernels.forgetting_attention", False),
        ("models/other/model.py", "models.fox.config", True),
        ("tasks/common/loop.py", "models.fox", True),
        ("tasks/lm/train.py", "models.fox", False),
        ("tasks/video/train.py", "tasks.lm.data", True),
        ("configs/fox.py", "models.fox", True),
        ("configs/fox.py", "ml_collections.ConfigDict", False),
        ("tasks/lm/train.py", "configs.fox", True),
        ("tasks/common/config.py", "configs.common.parse_value", False),
        ("models/fox/config.py", "configs.common.parse_value", True),
        ("launch/local.py", "tasks.lm.train", False),
    ],
)
def test_the_import_rules_themselves(importer, name, forbidden):
    assert bool(forbidden_import(Module(ROOT / importer), name)) is forbidden


def test_relative_imports_are_resolved(tmp_path, monkeypatch):
    source = tmp_path / "models" / "fox" / "model.py"
    source.parent.mkdir(parents=True)
    source.write_text("from ..common import layers\nfrom . import config\nfrom .convert import names\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    found = [name for _, name in Module(source).imports()]
    assert found == ["models.common.layers", "models.fox.config", "models.fox.convert.names"]


def test_pallas_stays_inside_kernels():
    offenders = [
        f"{module}:{line} imports {name}"
        for module in modules("models", "tasks", "launch", "configs")
        for line, name in module.imports()
        if "pallas" in name.split(".") or name.split(".")[0] in ("jax_triton", "triton")
    ]
    report(offenders, "kernel languages belong in kernels/:")


def test_no_other_framework_is_imported():
    offenders = [
        f"{module}:{line} imports {name}"
        for module in modules(*PACKAGES)
        for line, name in module.imports()
        if name.split(".")[0] in FRAMEWORKS
    ]
    report(offenders, "no PyTorch and no TensorFlow at run time:")


@pytest.mark.parametrize("name", [module.name for module in modules(*PACKAGES)])
def test_every_module_imports(name):
    assert importlib.import_module(name).__name__ == name


def code_lines(module: Module) -> int:
    with tokenize.open(module.path) as file:
        return sum(1 for _ in file)


def functions(module: Module) -> Iterator[tuple[str, int]]:
    """(name, lines) of every function, nested ones and methods too; docstrings do not count as length."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            is_doc = ast.get_docstring(node, clean=False) is not None
            doc = first.end_lineno - first.lineno + 1 if is_doc and first.end_lineno else 0
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1 - doc


def too_long() -> dict[str, int]:
    sizes = {}
    for module in modules(*PACKAGES):
        raw = (
            module.package == "kernels"
            and module.path.name.startswith("_")
            and module.path.stem != "__init__"
        )
        lines = code_lines(module)
        if lines > (RAW_KERNEL_LINES if raw else MODULE_LINES):
            sizes[str(module)] = lines
        if not raw:
            sizes |= {f"{module}::{name}": n for name, n in functions(module) if n > FUNCTION_LINES}
    return sizes


def test_modules_and_functions_stay_small():
    offenders = too_long()
    for name, lines in sorted(offenders.items()):
        print(f"{name}: {lines} lines")  # shown on failure, and with -s
    rule = (
        f"over {MODULE_LINES} lines a module, {RAW_KERNEL_LINES} a raw kernel, {FUNCTION_LINES} a function:"
    )
    report([f"{name}: {n} lines" for name, n in offenders.items() if name not in ALLOWED_SIZES], rule)
    report(
        [name for name in ALLOWED_SIZES if name not in offenders],
        "no longer too long; drop from ALLOWED_SIZES:",
    )


def test_names_say_what_is_inside():
    offenders = [str(m) for m in modules(*PACKAGES) if set(m.path.with_suffix("").parts[-2:]) & VAGUE_NAMES]
    report(offenders, "name the thing:")


def public_definitions(module: Module) -> Iterator[tuple[int, str, ast.AST]]:
    yield 1, "module", module.tree
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.lineno, node.name, node


def test_public_functions_are_documented():
    offenders = [
        f"{module}:{line} {name}"
        for module in modules("kernels", "models")
        for line, name, node in public_definitions(module)
        if not ast.get_docstring(node)
    ]
    report(offenders, "public functions and classes of kernels/ and models/ carry a docstring:")


def test_test_files_are_collected():
    """A file with test functions that pytest would not collect never fails."""
    offenders = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text(), str(path))
        tests = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
        if tests and not path.name.endswith("_test.py"):
            offenders.append(f"{path.relative_to(ROOT)} holds {tests[0].name}")
    report(offenders, "test files end in _test.py:")


def test_tests_mirror_the_tree():
    """tests/<package>/<room>/ exists only for a package and room that exist."""
    own = {"contracts", "golden", "integration"}
    offenders = []
    for folder in sorted(p for p in (ROOT / "tests").rglob("*") if p.is_dir() and any(p.glob("*_test.py"))):
        parts = folder.relative_to(ROOT / "tests").parts
        if parts[0] not in own and not (ROOT / Path(*parts)).exists():
            offenders.append(str(folder.relative_to(ROOT)))
    report(offenders, "tests without the code they mirror:")
