"""From a config file and a command line to frozen dataclasses.

    --config=configs/fox.py:size=125m,ctx=16k --workdir=DIR --config.optim.peak_lr=1e-3

A config file defines `get_config(arg)` returning a ConfigDict of sections. Each section is one frozen
dataclass somewhere in the code: the dataclass is the only place where its fields, types and defaults are
written.
"""

import argparse
import dataclasses
import importlib.util
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.common import nearest, parse_value
from tasks.common.errors import ConfigError
from tasks.common.resolved import FREE_KEYS, flatten, load_resolved, save_resolved

__all__ = [
    "FREE_KEYS",
    "CommandLine",
    "freeze",
    "load_config",
    "load_resolved",
    "override",
    "override_all",
    "parse_command_line",
    "run_config_file",
    "save_resolved",
    "to_json",
    "with_defaults",
]

Schema = Mapping[str, type]


def load_config(file_and_args: str) -> ConfigDict:
    """Runs "path/file.py" or "path/file.py:key=value,..." and returns its locked ConfigDict.

    A path that does not exist from here is also looked for beside the `configs` package, so that
    "configs/fox.py" works from any folder.

    Raises:
      ConfigError: no such file, no `get_config` in it, or arguments it does not accept.
    """
    config = run_config_file(file_and_args, "get_config")
    if not isinstance(config, ConfigDict):
        name = file_and_args.partition(":")[0]
        raise ConfigError(f"--config={name}: get_config returned {type(config).__name__}, not a ConfigDict")
    return config.lock()


def run_config_file(file_and_args: str, function: str) -> Any:
    """What the function of that name in "path/file.py:key=value,..." returns; found as `load_config` says.

    Raises:
      ConfigError: no such file, no such function in it, or arguments it does not accept.
    """
    name, _, arg = file_and_args.partition(":")
    path = _find_config(name)
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={name}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ConfigError(f"--config={name}: the file defines no {function}(arg)")
    try:
        return getattr(module, function)(arg or None)
    except ValueError as error:
        raise ConfigError(f"--config={file_and_args}: {error}") from error


def _find_config(name: str) -> Path:
    path = Path(name)
    installed = Path(__file__).resolve().parents[2] / name
    for candidate in (path, installed):
        if candidate.is_file():
            return candidate
    folder = path.parent if path.parent.is_dir() else installed.parent
    files = [str(path.parent / f.name) for f in folder.glob("*.py") if f.stem not in ("__init__", "common")]
    hint = nearest(name, files) if files else f"{path.parent} holds no config file"
    raise ConfigError(f"--config={name}: no such file; {hint}")


def with_defaults(config: ConfigDict, schema: Schema) -> ConfigDict:
    """The config with every section of `schema` completed by its dataclass's defaults.

    After this, overrides and saved configs know every field, stated in the file or not.

    Raises:
      ConfigError: a section the schema does not know, or an unknown key in one.
    """
    full = {key: config[key] for key in config}
    for section in full:
        if section not in schema:
            raise ConfigError(f"unknown config key {section!r}: {nearest(section, schema)}")
    for section, cls in schema.items():
        if not dataclasses.is_dataclass(cls):
            continue
        given = dict(full.get(section, {}))
        _refuse_unknown(given, cls, section)
        for field in dataclasses.fields(cls):
            if field.name in given:
                continue
            if field.default is not dataclasses.MISSING:
                given[field.name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                given[field.name] = field.default_factory()
        full[section] = given
    return ConfigDict(to_json(full, keep_tuples=True)).lock()


def to_json(config: Any, *, keep_tuples: bool = False) -> Any:
    """A config, or a dataclass in one, as plain dicts, lists and scalars."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if isinstance(config, ConfigDict | Mapping):
        return {key: to_json(config[key], keep_tuples=keep_tuples) for key in config}
    if isinstance(config, tuple | list):
        items = [to_json(item, keep_tuples=keep_tuples) for item in config]
        return tuple(items) if keep_tuples and isinstance(config, tuple) else items
    return str(config) if isinstance(config, Path) else config


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets `key` ("optim.peak_lr") to `text`, read by the type of the present value. "none" is always None.

    Raises:
      ConfigError: no such key (the nearest valid one is named), a whole section, or a value of another type.
    """
    flat = flatten(to_json(config, keep_tuples=True))
    if key not in flat:
        below = [name for name in flat if name.startswith(key + ".")]
        if below:
            raise ConfigError(f"--config.{key} is a section; set one of its keys: {', '.join(below)}")
        raise ConfigError(f"unknown config key {key!r}: {nearest(key, flat)}")
    try:
        value = None if text.lower() == "none" else parse_value(text, flat[key])
    except ValueError as error:
        raise ConfigError(f"--config.{key}: {error}") from None
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    with node.unlocked(), node.ignore_type():
        node[last] = value


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What the user asked for: locked config (None if none was given or found), workdir, own options."""

    config: ConfigDict | None
    workdir: Path | None
    options: argparse.Namespace
    argv: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigErrors (one line, exit code 2) instead of a usage dump."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)


def override_all(config: ConfigDict, settings: str) -> None:
    """Applies "key=value,key=value", as an option --set gives it.

    Raises:
      ConfigError: a setting without "=", an unknown key, or a value of another type.
    """
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set={setting}: expected KEY=VALUE")
        override(config, key, value)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser for a task's own options; `parse_command_line` adds --config and --workdir."""
    return _Parser(description=description, allow_abbrev=False)


def parse_command_line(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    *,
    schema: Schema | None = None,
    default_config: str | None = None,
) -> CommandLine:
    """Reads --config=FILE[:args], --workdir=DIR, --config.a.b=value and the parser's own options.

    Without --config, the config a workdir carries is used, then `default_config`.

    Args:
      parser: from `make_parser`, with the task's own options added.
      argv: arguments after the program's name; None: of this process.
      schema: section name -> frozen dataclass (or a plain type for a scalar such as `seed`).
      default_config: file to use when neither --config nor the workdir gives one; None: no config.

    Raises:
      ConfigError: any mistyped option or key, with the nearest valid name.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser.add_argument("--config", metavar="FILE[:args]", help="config file, with arguments after a colon")
    parser.add_argument("--workdir", metavar="DIR", help="folder of the run: config, logs, checkpoints")
    parser.epilog = "Any config value: --config.SECTION.KEY=VALUE"
    rest, overrides = _split_overrides(argv)
    options, unknown = parser.parse_known_args(rest)
    if unknown:
        name = unknown[0].partition("=")[0]
        valid = [s for action in parser._actions for s in action.option_strings]
        raise ConfigError(f"unknown option {name!r}: {nearest(name, valid)}")
    workdir = Path(options.workdir) if options.workdir else None
    config = _pick_config(options.config, workdir, default_config)
    if config is None and overrides:
        raise ConfigError(f"--config.{overrides[0][0]} needs a --config, or a --workdir that carries one")
    if config is not None:
        if schema is not None:
            config = with_defaults(config, schema)
        for key, text in overrides:
            override(config, key, text)
        config.lock()
    return CommandLine(config, workdir, options, tuple(argv))


def _split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        key, equals, text = word[len("--config.") :].partition("=")
        if not equals:
            text = next(words, "")
            if not text or text.startswith("--"):
                raise ConfigError(f"--config.{key} needs a value: --config.{key}=VALUE")
        overrides.append((key, text))
    return rest, overrides


def _pick_config(given: str | None, workdir: Path | None, default: str | None) -> ConfigDict | None:
    if given:
        return load_config(given)
    if workdir is not None and (workdir / "config.json").is_file():
        return ConfigDict(load_resolved(workdir)["config"]).lock()
    return load_config(default) if default else None


def freeze[T](section: Any, cls: type[T], name: str = "") -> T:
    """The frozen dataclass `cls` filled from a config section.

    Args:
      section: ConfigDict or dict of the section; fields with a default may be left out.
      cls: a dataclass whose field types are scalars, Literal, tuples, dicts, dataclasses, or unions of those.
      name: name of the section in messages (default: made from the class's name).

    Raises:
      ConfigError: unknown or missing keys (with the nearest valid name), wrong types, or values the dataclass
        itself refuses.
    """
    name = name or cls.__name__.removesuffix("Config").lower()
    if not isinstance(section, ConfigDict | Mapping):
        raise ConfigError(f"config section {name!r} is {section!r}, not a section with keys")
    values = {key: section[key] for key in section}
    _refuse_unknown(values, cls, name)
    hints = typing.get_type_hints(cls)
    filled: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in values:
            filled[field.name] = _coerce(values[field.name], hints[field.name], f"{name}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"config key {name}.{field.name} is missing ({_describe(hints[field.name])})")
    try:
        return cls(**filled)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config section {name!r}: {error}") from error


def freeze_sections[T](config: Any, schema: Schema, whole: Callable[..., T]) -> T:
    """Every section of a config as its dataclass.

    Args:
      config: ConfigDict or nested dict.
      schema: section name -> frozen dataclass, or a plain type (`seed`).
      whole: named tuple with the fields of the schema.

    Raises:
      ConfigError: unknown or missing keys, wrong types, or values out of range.
    """
    values = to_json(config, keep_tuples=True)
    sections: dict[str, Any] = {
        name: freeze(values[name], cls, name) if dataclasses.is_dataclass(cls) else values[name]
        for name, cls in schema.items()
        if name in values
    }
    missing = [name for name in schema if name not in sections]
    if missing:
        raise ConfigError(f"the config lacks the section(s) {', '.join(missing)}")
    for name, cls in schema.items():
        value = sections[name]
        if not isinstance(value, cls) or (cls is int and isinstance(value, bool)):
            raise ConfigError(f"config key {name} = {value!r}: must be {_describe(cls)}")
    return whole(**sections)


def default_workdir(task: str, config_file_and_args: str) -> Path:
    """runs/<task>/<config file's name>[-arguments]: the same command finds its run again."""
    name, _, arg = config_file_and_args.partition(":")
    slug = re.sub(r"[^A-Za-z0-9._=-]+", "-", f"{Path(name).stem}-{arg}").strip("-")
    return Path("runs") / task / slug


def _refuse_unknown(values: Mapping[str, Any], cls: Any, name: str) -> None:
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in values:
        if key not in fields:
            raise ConfigError(f"unknown config key '{name}.{key}': {nearest(key, fields)}")


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """`value` as type `hint`: an int serves as float, a list as tuple, a section as dataclass; nothing
    else."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _coerce(value, option, name)
            except ConfigError:
                continue
    elif origin is typing.Literal:
        if value in args:
            return value
        if value is None and "none" in args:  # `override` cannot tell the word from the absence of a value
            return "none"
        raise ConfigError(f"config key {name} = {value!r}: {nearest(str(value), map(str, args))}")
    elif dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else freeze(value, hint, name)  # type: ignore[arg-type]
    elif origin in (tuple, list):
        if isinstance(value, tuple | list) and (
            not args or Ellipsis in args or origin is list or len(args) == len(value)
        ):
            hints = [args[0] if args else Any] * len(value) if origin is list or Ellipsis in args else args
            return origin(
                _coerce(v, h, f"{name}[{i}]") for i, (v, h) in enumerate(zip(value, hints, strict=True))
            )
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif (origin or hint) in (dict, Mapping) or origin is not None:
        if isinstance(value, ConfigDict | Mapping):
            return to_json(value)
    elif hint is type(None):
        if value is None:
            return None
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"config key {name} = {value!r} ({type(value).__name__}): must be {_describe(hint)}")


def canonical_json(config: Any) -> str:
    """The config as one sorted JSON text, equal for equal configs."""
    return json.dumps(to_json(config), sort_keys=True)
