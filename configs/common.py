"""Strict parsing of the text behind a config file: `configs/fox.py:size=125m,ctx=16k`.

A config file states its arguments and their defaults once:

    def get_config(arg: str | None = None) -> ConfigDict:
        args = parse_args(arg, size="125m", ctx="16k", steps=1000)

and every value is read by the type of its default. A mistyped key is an error that names the nearest valid
one.
"""

import ast
import difflib
import re
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

# width, layers, MLP size, heads of the video models, as in models/common/config.py: a test compares them.
VIT_WIDTHS: dict[str, tuple[int, int, int, int]] = {
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "g-opt": (1536, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}

# Binary multiples, because contexts and token budgets of the papers are: 16k = 16384, 2.5b = 2684354560.
_MULTIPLES = {"k": 2**10, "m": 2**20, "b": 2**30, "g": 2**30, "t": 2**40}
_INTEGER = re.compile(r"([+-]?)(\d[\d_]*(?:\.\d+)?)([kmbgt]?)", re.IGNORECASE)
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


def nearest(name: str, valid: Iterable[str]) -> str:
    """How to end an error about an unknown `name`: the closest valid one, or all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if not close:  # a key given with the wrong section, or without one
        last = name.rsplit(".", 1)[-1]
        close = [n for n in names if n.rsplit(".", 1)[-1] == last]
    if close:
        return f"did you mean {close[0]!r}?"
    return f"valid: {', '.join(names)}" if names else "nothing is valid here"


def parse_int(text: str) -> int:
    """An integer, with binary multiples: "512", "16_384", "16k" = 16384, "2.5b" = 2684354560.

    Raises:
      ValueError: not an integer.
    """
    match = _INTEGER.fullmatch(text.strip())
    if match:
        sign, digits, suffix = match.groups()
        digits = digits.replace("_", "")
        scale = _MULTIPLES.get(suffix.lower(), 1)
        value = float(digits) * scale if "." in digits else int(digits) * scale
        if value == int(value) and (suffix or "." not in digits):
            return -int(value) if sign == "-" else int(value)
    raise ValueError(f"{text!r} is not an integer (512, 16_384, 16k = 16384, 2.5b = 2684354560)")


def parse_bool(text: str) -> bool:
    """True for true/yes/on/1, False for false/no/off/0.

    Raises:
      ValueError: anything else.
    """
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def parse_value(text: str, default: Any) -> Any:
    """`text` read as the type of `default`.

    bool, int (with k/m/b/g/t), float and str by their own rules; tuples and lists as Python literals or as
    items joined by "x" or "+" (16x16); with a default of None, a Python literal if it is one, else the text
    itself. "none" gives None where the default is None or a string.

    Raises:
      ValueError: the text is not of that type.
    """
    text = text.strip()
    if isinstance(default, bool):
        return parse_bool(text)
    if isinstance(default, int):
        return parse_int(text)
    if isinstance(default, float):
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a number") from None
    if isinstance(default, str):
        return text
    if isinstance(default, tuple | list):
        return type(default)(_parse_items(text, default))
    return _parse_literal(text)


def _parse_literal(text: str) -> Any:
    if text.lower() == "none":
        return None
    for parse in (parse_int, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return text


def _parse_items(text: str, default: Any) -> list[Any]:
    if text[:1] in "([":
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise ValueError(f"{text!r} is not a list") from None
        return list(value) if isinstance(value, tuple | list) else [value]
    parts = [p for p in re.split(r"[,+x]" if _numeric(default) else r"[,+]", text) if p]
    return [parse_value(part, default[0]) if default else _parse_literal(part) for part in parts]


def _numeric(items: Any) -> bool:
    return bool(items) and all(isinstance(item, int | float) for item in items)


def parse_args(arg: str | None, **defaults: Any) -> ConfigDict:
    """The arguments of a config file, `key=value,key=value`, over their defaults.

    Args:
      arg: the text after the colon; None or "" leaves every default.
      **defaults: all the valid keys; each value is read by the type of its default. A bool key may stand
      alone.

    Returns:
      ConfigDict with exactly the keys of `defaults`.

    Raises:
      ValueError: an unknown key (the nearest valid one is named), a key given twice, a key without a value,
        or a value of another type.
    """
    result = dict(defaults)
    given: set[str] = set()
    for part in filter(None, (p.strip() for p in (arg or "").split(","))):
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if key not in defaults:
            raise ValueError(f"unknown config argument {key!r}: {nearest(key, defaults)}")
        if key in given:
            raise ValueError(f"config argument {key!r} is given twice")
        given.add(key)
        if not equals and not isinstance(defaults[key], bool):
            raise ValueError(f"config argument {key!r} needs a value: {key}=...")
        try:
            result[key] = parse_value(text, defaults[key]) if equals else True
        except ValueError as error:
            raise ValueError(f"config argument {key!r}: {error}") from None
    return ConfigDict(result)
