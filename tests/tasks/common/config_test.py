"""Config files, command lines, freezing: a mistake is one line with the key and the nearest valid one."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest
from ml_collections import ConfigDict

from configs.common import nearest, parse_args, parse_bool, parse_int, parse_value
from tasks.common.config import (
    freeze,
    load_config,
    load_resolved,
    make_parser,
    override,
    parse_command_line,
    save_resolved,
    to_json,
    with_defaults,
)
from tasks.common.errors import CheckpointError, ConfigError, Stopped, run_main
from tasks.common.resolved import diff_configs, require_same

CONFIG = '''
"""A config for tests."""
from ml_collections import ConfigDict
from configs.common import parse_args

def get_config(arg=None):
    args = parse_args(arg, size="tiny", ctx=1024, rate=0.5, packed=False)
    return ConfigDict({
        "seed": 0,
        "optim": {"rate": args.rate, "steps": args.ctx},
        "data": {"name": args.size, "packed": args.packed},
    })
'''


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 4


@dataclasses.dataclass(frozen=True)
class OptimSection:
    rate: float
    steps: int
    kind: Literal["adam", "sgd"] = "adam"
    clip: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate = {self.rate}: must be at least 0")


@dataclasses.dataclass(frozen=True)
class DataSection:
    name: str
    packed: bool
    folder: Path | None = None


SCHEMA = {"seed": int, "optim": OptimSection, "data": DataSection}


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "tests_config.py"
    path.write_text(CONFIG)
    return str(path)


def command(*words: str, **options: Any) -> Any:
    parser = make_parser("test")
    parser.add_argument("--prompt", default="")
    return parse_command_line(parser, list(words), schema=SCHEMA, **options)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("512", 512),
        ("16_384", 16384),
        ("16k", 16384),
        ("16K", 16384),
        ("2b", 2**31),
        ("2.5b", 2684354560),
        ("-3", -3),
        ("1.5m", 3 * 2**19),
    ],
)
def test_integers(text: str, value: int) -> None:
    assert parse_int(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.5", "16q", "1e3", "0.3k"])
def test_not_integers(text: str) -> None:
    with pytest.raises(ValueError, match="is not an integer"):
        parse_int(text)


def test_values_take_the_type_of_their_default() -> None:
    assert parse_value("1", 0.5) == 1.0
    assert parse_value("off", True) is False
    assert parse_value("16k", "") == "16k"
    assert parse_value("16x32", (1, 1)) == (16, 32)
    assert parse_value("(1, 2)", (0,)) == (1, 2)
    assert parse_value("a+b", ("x",)) == ("a", "b")
    assert parse_value("a,b", ["x"]) == ["a", "b"]
    assert [parse_value(t, None) for t in ("none", "3", "16k", "-10.0", "true", "name")] == [
        None, 3, 16384, -10.0, True, "name",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'x' is not a number"):
        parse_value("x", 0.5)
    with pytest.raises(ValueError, match="neither true nor false"):
        parse_bool("2")


def test_arguments_of_a_config_file() -> None:
    defaults = {"arch": "fox_pro", "ctx": 1024, "packed": False}
    assert parse_args(None, **defaults).to_dict() == defaults
    assert parse_args("ctx=16k, packed ,arch=x=y", **defaults).to_dict() == {
        "arch": "x=y",
        "ctx": 16384,
        "packed": True,
    }
    for text, message in {
        "ctxx=1": "unknown config argument 'ctxx': did you mean 'ctx'?",
        "zzz=1": "unknown config argument 'zzz': valid: arch, ctx, packed",
        "ctx=big": "config argument 'ctx': 'big' is not an integer",
        "ctx": "config argument 'ctx' needs a value",
        "ctx=1,ctx=2": "config argument 'ctx' is given twice",
    }.items():
        with pytest.raises(ValueError, match="config argument") as error:
            parse_args(text, **defaults)
        assert message in str(error.value)


def test_nearest_name() -> None:
    assert nearest("optim.peek_lr", ["optim.peak_lr", "train.steps"]) == "did you mean 'optim.peak_lr'?"
    assert nearest("peak_lr", ["optim.peak_lr", "x"]) == "did you mean 'optim.peak_lr'?"


def test_load_config(config_file: str, tmp_path: Path) -> None:
    config = load_config(f"{config_file}:ctx=2k,packed=true")
    assert config.optim.steps == 2048
    assert config.data.packed is True
    assert config.is_locked
    with pytest.raises(ConfigError, match="unknown config argument 'sise': did you mean 'size'"):
        load_config(f"{config_file}:sise=1")
    with pytest.raises(ConfigError, match=r"no such file; did you mean '.*tests_config.py'\?"):
        load_config(config_file.replace("tests_config", "test_config"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"defines no get_config\(arg\)"):
        load_config(str(tmp_path / "empty.py"))
    (tmp_path / "other.py").write_text("def get_config(arg=None):\n    return {}\n")
    with pytest.raises(ConfigError, match="returned dict, not a ConfigDict"):
        load_config(str(tmp_path / "other.py"))


def test_command_line(config_file: str) -> None:
    given = command(
        f"--config={config_file}:ctx=2k",
        "--workdir=runs/a",
        "--config.optim.rate=2",
        "--config.optim.clip",
        "1.5",
        "--config.data.name=none",
        "--config.optim.inner.width=16k",
        "--prompt=hello",
    )
    assert given.config.optim.rate == 2.0
    assert given.config.optim.clip == 1.5  # a default of the dataclass, not in the file
    assert given.config.optim.inner.width == 16384
    assert given.config.optim.steps == 2048
    assert given.config.data.name is None
    assert (given.workdir, given.options.prompt) == (Path("runs/a"), "hello")
    assert freeze(given.config.optim, OptimSection, "optim") == OptimSection(
        2.0, 2048, clip=1.5, inner=Inner(16384)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.optim.raet=1"], "unknown config key 'optim.raet': did you mean 'optim.rate'?"),
        (["--config.rate=1"], "unknown config key 'rate': did you mean 'optim.rate'?"),
        (["--config.optim=1"], "--config.optim is a section; set one of its keys: optim.betas, optim.clip"),
        (["--config.optim.rate=fast"], "--config.optim.rate: 'fast' is not a number"),
        (["--config.optim.rate"], "--config.optim.rate needs a value"),
        (["--config.optim.rate", "--workdir=x"], "--config.optim.rate needs a value"),
        (["--workdri=x"], "unknown option '--workdri': did you mean '--workdir'?"),
        (["stray"], "unknown option 'stray'"),
    ],
)
def test_mistakes_on_the_command_line(config_file: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        command(f"--config={config_file}", *words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_override_needs_a_config() -> None:
    with pytest.raises(ConfigError, match=r"--config.seed needs a --config, or a --workdir that carries one"):
        command("--config.seed=1")
    assert command("--prompt=x").config is None


def test_a_workdir_carries_its_config(config_file: str, tmp_path: Path) -> None:
    config = command(f"--config={config_file}", "--config.seed=5").config
    save_resolved(tmp_path / "run", to_json(config), command=["train", "--config.seed=5"])
    again = command(f"--workdir={tmp_path / 'run'}")
    assert to_json(again.config) == to_json(config)
    assert freeze(again.config.optim, OptimSection, "optim").betas == (0.9, 0.95)
    assert command(f"--workdir={tmp_path / 'new'}", default_config=config_file).config.seed == 0
    record = load_resolved(tmp_path / "run")
    assert record["command"] == ["train", "--config.seed=5"]
    assert record["device"]["platform"] == "cpu"
    assert {"jax", "orbax-checkpoint", "numpy"} <= record["versions"].keys()
    assert record["python"].count(".") == 2


def test_records_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not the workdir of a run: it has no config.json"):
        load_resolved(tmp_path)
    (tmp_path / "config.json").write_text('{"config": ')
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        load_resolved(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="has no 'config'"):
        load_resolved(tmp_path)


def test_a_workdir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"could not write config.json in workdir {tmp_path}/file"):
        save_resolved(tmp_path / "file", {"seed": 0})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rate": 1.0, "stpes": 3}, "unknown config key 'optim.stpes': did you mean 'steps'?"),
        ({"rate": 1.0}, "config key optim.steps is missing (int)"),
        ({"rate": "1", "steps": 3}, "config key optim.rate = '1' (str): must be float"),
        ({"rate": 1.0, "steps": 3.0}, "config key optim.steps = 3.0 (float): must be int"),
        ({"rate": 1.0, "steps": True}, "config key optim.steps = True (bool): must be int"),
        ({"rate": 1.0, "steps": 3, "kind": "adm"}, "config key optim.kind = 'adm': did you mean 'adam'?"),
        ({"rate": 1.0, "steps": 3, "clip": "x"}, "config key optim.clip = 'x' (str): must be float | None"),
        (
            {"rate": 1.0, "steps": 3, "betas": (0.9,)},
            "config key optim.betas = (0.9,) (tuple): must be tuple",
        ),
        ({"rate": 1.0, "steps": 3, "betas": (0.9, "b")}, "config key optim.betas[1] = 'b'"),
        ({"rate": 1.0, "steps": 3, "inner": {"with": 3}}, "unknown config key 'optim.inner.with'"),
        ({"rate": -1.0, "steps": 3}, "config section 'optim': rate = -1.0: must be at least 0"),
        (3, "config section 'optim' is 3, not a section"),
    ],
)
def test_freeze_names_what_is_wrong(section: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        freeze(section, OptimSection, "optim")
    assert message in str(error.value)


def test_freeze_converts_only_what_is_safe() -> None:
    frozen = freeze(
        {"rate": 1, "steps": 3, "betas": [0.5, 1], "inner": {"width": 2}, "clip": None}, OptimSection
    )
    assert frozen == OptimSection(1.0, 3, betas=(0.5, 1.0), inner=Inner(2))
    assert isinstance(frozen.rate, float)
    assert freeze({"name": "a", "packed": True, "folder": "x"}, DataSection).folder == Path("x")


def test_sections_are_checked_against_the_schema() -> None:
    with pytest.raises(ConfigError, match="unknown config key 'optimm': did you mean 'optim'"):
        with_defaults(ConfigDict({"optimm": {}}), SCHEMA)
    with pytest.raises(ConfigError, match=r"unknown config key 'optim.rat': did you mean 'rate'"):
        with_defaults(ConfigDict({"optim": {"rat": 1.0}}), SCHEMA)
    full = with_defaults(ConfigDict({"seed": 1, "optim": {"rate": 1.0}}), SCHEMA)
    assert full.optim.kind == "adam"
    assert "steps" not in full.optim  # no default: freeze will say that it is missing
    override(full, "optim.inner.width", "8")
    assert full.optim.inner.width == 8


def test_differences_are_listed_key_by_key() -> None:
    old = {"seed": 0, "optim": {"rate": 0.1, "gone": 1}, "log": {"every": 1}}
    new = {"seed": 0, "optim": {"rate": 0.2, "added": None}, "log": {"every": 2}}
    assert [str(d) for d in diff_configs(old, new)] == [
        "log.every: 1 -> 2",
        "optim.added: '(absent)' -> None",
        "optim.gone: 1 -> '(absent)'",
        "optim.rate: 0.1 -> 0.2",
    ]
    require_same(old, {**old, "log": {"every": 9}}, "dir")
    with pytest.raises(ConfigError, match=r"belongs to another config(.|\n)*optim.rate: 0.1 -> 0.2"):
        require_same(old, new, "dir")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("bad key"), 2, "error: bad key\n"),
        (Stopped("stopped after step 3"), 75, "stopped after step 3\n"),
    ],
)
def test_expected_errors_are_one_line_and_an_exit_code(
    error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert exit_.value.code == code
    assert capsys.readouterr().err == line


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)
    assert json.dumps(run_main(lambda: None)) == "null"
