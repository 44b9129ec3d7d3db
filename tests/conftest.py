"""What every test may rely on: the platform, runtime type checks, golden files, child processes, skip rules.

Options (all optional):
  --slow             also run tests marked `slow` (long sweeps, faults, training claims) or `timing`
  --device=gpu|tpu   run there and select its marked tests; the default is the CPU, whatever is plugged in
  --golden-dir=DIR   read golden files from DIR (any folder of the same schema) instead of tests/golden

Set before anything imports jax: see `pytest_configure`.
"""

import fnmatch
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import beartype.typing  # noqa: F401  named in TYPECHECKER below
import hypothesis
import jaxtyping
import pytest

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
ALLOWED_SKIPS = Path(__file__).resolve().parent / "allowed_skips.txt"
CHECKED_PACKAGES = ["kernels", "models", "tasks"]
DEVICE_MARKERS = ("gpu", "tpu")
# What compiles much and computes little: what LLVM spends on its programs is not made up for.
COMPILING = ("contracts/", "golden/", "kernels/", "models/", "tasks/common/", "tasks/lm/")
SHORT_RUNS = ("faults_test", "finetune_test", "mesh_test", "modes_test", "options_test", "sources_test")
UNOPTIMISED = "JAX_DISABLE_MOST_OPTIMIZATIONS"
JAX_PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}

# Every function of these packages is checked against its annotations while the suite runs: shapes, dtypes and
# plain types. An int passes where a float is declared, as PEP 484 says; `Self` is not checked, for the hook
# decorates methods one by one and beartype cannot tell which class is meant. Must precede their first import.
TYPECHECKER = (
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, "
    "hint_overrides=beartype.FrozenDict({beartype.typing.Self: object})))"
)
jaxtyping.install_import_hook(CHECKED_PACKAGES, TYPECHECKER)

# Property tests draw the same examples on every run, and a slow machine is not a failure.
hypothesis.settings.register_profile("foxtrot", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("foxtrot")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("foxtrot")
    group.addoption("--slow", action="store_true", help="also run tests marked slow or timing")
    group.addoption(
        "--device", choices=sorted(JAX_PLATFORMS), default="cpu", help="where tests run (default: cpu)"
    )
    group.addoption(
        "--golden-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder of golden .npz files, or a folder with one such folder per room (default: tests/golden)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if "jax" in sys.modules:
        raise pytest.UsageError("jax was imported before tests/conftest.py could choose the platform")
    os.environ["JAX_PLATFORMS"] = JAX_PLATFORMS[config.getoption("--device")]
    os.environ["MPLBACKEND"] = "Agg"
    if config.getoption("--device") == "cpu" and not config.getoption("--slow"):
        # Of this process and its children. JAX_DISABLE_MOST_OPTIMIZATIONS=0 in the environment keeps them.
        os.environ.setdefault(UNOPTIMISED, "1")
    golden = config.getoption("--golden-dir")
    if golden is not None and not golden.is_dir():
        raise pytest.UsageError(f"--golden-dir={golden}: no such folder")
    config.pluginmanager.register(SkipPolicy(config), "foxtrot-skip-policy")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """With --slow, too, but not where something is trained or timed: there code must be fast."""
    place = item.path.relative_to(ROOT / "tests")
    short = place.parts[0] == "integration" and place.stem.endswith(SHORT_RUNS)
    compiles = (short or str(place).startswith(COMPILING)) and not item.get_closest_marker("timing")
    chosen = UNOPTIMISED in os.environ  # what jax read as it was imported
    if chosen or not compiles or item.config.getoption("--device") != "cpu":
        return (yield)
    import jax

    jax.config.update(UNOPTIMISED.lower(), True)
    os.environ[UNOPTIMISED] = "1"  # of the processes that the test starts
    try:
        return (yield)
    finally:
        jax.config.update(UNOPTIMISED.lower(), False)
        del os.environ[UNOPTIMISED]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what this run was not asked for: a test that cannot run here is not a skip to be excused."""
    device = config.getoption("--device")
    refused = [marker for marker in DEVICE_MARKERS if marker != device]
    if not config.getoption("--slow"):
        refused += ["slow", "timing"]
    kept, unwanted = [], []
    for item in items:
        (unwanted if any(item.get_closest_marker(name) for name in refused) else kept).append(item)
    config.hook.pytest_deselected(items=unwanted)
    # What may take longest first: begun last, it would run alone while the other workers have nothing left.
    items[:] = sorted(kept, key=_time_limit, reverse=True)


def _time_limit(item: pytest.Item) -> float:
    """Seconds of its own mark `timeout`; 0: that of all tests."""
    marker = item.get_closest_marker("timeout")
    return marker.args[0] if marker else 0


def load_allowed_skips(path: Path) -> list[tuple[str, str]]:
    """(node pattern, reason pattern) pairs; `#` starts a comment. Raises ValueError on a malformed line."""
    rules = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        node, separator, reason = (part.strip() for part in line.partition(" | "))
        if not separator or not node or not reason:
            raise ValueError(f"{path.name}:{number}: expected 'node pattern | reason pattern', got {line!r}")
        rules.append((node, reason))
    return rules


class SkipPolicy:
    """With CI=true, a skip missing in tests/allowed_skips.txt fails the run (`-ra` prints every reason)."""

    def __init__(self, config: pytest.Config):
        self.enforced = os.environ.get("CI", "").lower() in ("1", "true")
        self.is_controller = not hasattr(config, "workerinput")
        self.rules = load_allowed_skips(ALLOWED_SKIPS)
        self.skips: list[tuple[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped:
            return
        reason = getattr(report, "wasxfail", None)  # an expected failure needs the same excuse
        if reason is None:
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        self.skips.append((report.nodeid, reason.removeprefix("Skipped: ").strip()))

    def refused(self) -> list[tuple[str, str]]:
        return [skip for skip in self.skips if not self._is_allowed(*skip)]

    def _is_allowed(self, node: str, reason: str) -> bool:
        return any(fnmatch.fnmatchcase(node, n) and fnmatch.fnmatchcase(reason, r) for n, r in self.rules)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.enforced and self.is_controller and self.refused():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.enforced and self.refused():
            terminalreporter.section("skips that tests/allowed_skips.txt does not list", red=True)
            for node, reason in self.refused():
                terminalreporter.write_line(f"{node} | {reason}")


def golden_folder(config: pytest.Config, room: str) -> Path:
    """The room's golden files: DIR/<room> if --golden-dir has such a folder, else DIR itself."""
    base = config.getoption("--golden-dir")
    base = GOLDEN if base is None else base.resolve()
    return base / room if (base / room).is_dir() else base


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.golden("op_*.npz", room="fox")` runs a test once per file (`golden_file`)."""
    if "golden_file" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None:
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: golden_file needs @pytest.mark.golden(pattern)"
        )
    room = marker.kwargs.get("room", "fox")
    folder = golden_folder(metafunc.config, room)
    files = sorted(path for pattern in marker.args for path in folder.glob(pattern))
    where = (
        "tests/golden" if metafunc.config.getoption("--golden-dir") is None else "the folder of --golden-dir"
    )
    missing = pytest.mark.skip(reason=f"no {' or '.join(marker.args)} in {where}")
    metafunc.parametrize(
        "golden_file",
        files or [pytest.param(None, marks=missing)],
        ids=lambda path: path.stem if path else "none",
    )


@pytest.fixture
def golden_dir(request: pytest.FixtureRequest) -> Path:
    """Folder of golden .npz files of the room named by the test's `golden` marker (default: fox)."""
    marker = request.node.get_closest_marker("golden")
    return golden_folder(request.config, marker.kwargs.get("room", "fox") if marker else "fox")


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Switches the runtime type checks off, as in production: for tests of our own error messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_python() -> RunPython:
    """run_python("-m", "tasks.lm.train", ..., devices=8): a child Python at the repository root.

    Output is captured. Keyword arguments: `devices` (simulated CPU devices, to be set before jax starts),
    `timeout` in seconds, `cwd`, `env` (added; None removes a variable), `check` (False: return failures).
    """
    return _run_python


def _run_python(
    *args: str,
    devices: int = 1,
    timeout: float = 600,
    cwd: Path | None = None,
    env: dict[str, str | None] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        # Simulated devices share threads, on few cores so few that one that waits for the others' sums may
        # hold up those.
        **({"NPROC": str(2 * devices)} if devices > 1 else {}),
        **(env or {}),
    }
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd or ROOT,
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and done.returncode != 0:
        command = " ".join(("python", *args))
        pytest.fail(f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done
