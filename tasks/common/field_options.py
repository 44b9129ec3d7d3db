"""Command-line options for the fields of a configuration dataclass, for commands without a config file."""

import argparse
from dataclasses import fields
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints


class LineParser(argparse.ArgumentParser):
    """argparse whose errors are one line (a ValueError) instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def add_field_options(parser: argparse.ArgumentParser, cls: type, prefix: str = "") -> None:
    """An option for every field of a dataclass that begins with `prefix`, which the option's name lacks.

    Fields have a default, and are text, numbers, truth values (--name, --no-name), or tuples of text, which
    are separated by commas.
    """
    hints = get_type_hints(cls)
    for field in fields(cls):
        if not field.name.startswith(prefix):
            continue
        name = f"--{field.name.removeprefix(prefix).replace('_', '-')}"
        default: Any = field.default
        if isinstance(default, bool):
            action = argparse.BooleanOptionalAction
            parser.add_argument(name, action=action, default=default, dest=field.name)
            continue
        kind = str if isinstance(default, tuple) else type(default)
        default = ",".join(default) if isinstance(default, tuple) else default
        hint = hints[field.name]
        choices = get_args(hint) if get_origin(hint) is Literal else None
        parser.add_argument(name, type=kind, default=default, choices=choices, dest=field.name)


def read_fields[T](args: argparse.Namespace, cls: type[T]) -> T:
    """The dataclass as its options have it; fields without an option keep their defaults.

    Raises:
      ValueError: the dataclass refuses a value.
    """
    given: dict[str, Any] = {}
    for name, field in cls.__dataclass_fields__.items():  # type: ignore[attr-defined]
        if hasattr(args, name):
            value = getattr(args, name)
            is_list = isinstance(field.default, tuple)
            given[name] = tuple(filter(None, value.split(","))) if is_list else value
    return cls(**given)
