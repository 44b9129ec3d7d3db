"""Options of a command for the fields of a dataclass."""

from dataclasses import dataclass
from typing import Literal

import pytest

from tasks.common.field_options import LineParser, add_field_options, read_fields


@dataclass(frozen=True)
class Options:
    made_size: int = 3
    made_share: float = 0.5
    made_names: tuple[str, ...] = ("a", "b")
    kind: Literal["x", "y"] = "x"
    turn: bool = True
    path: str = ""

    def __post_init__(self) -> None:
        if self.made_size < 1:
            raise ValueError("made_size must be at least 1")


def parsed(*argv: str, prefix: str = "") -> Options:
    parser = LineParser()
    add_field_options(parser, Options, prefix)
    return read_fields(parser.parse_args(argv), Options)


def test_every_field_has_an_option() -> None:
    assert parsed() == Options()
    assert parsed("--made-size=7", "--made-names=c,", "--kind=y", "--no-turn", "--path=a,b") == Options(
        7, 0.5, ("c",), "y", False, "a,b"
    )


def test_a_prefix_chooses_fields_and_is_left_out() -> None:
    assert parsed("--size=2", "--share=0.25", prefix="made_") == Options(2, 0.25)
    with pytest.raises(ValueError, match="unrecognized arguments: --kind=y; see --help"):
        parsed("--kind=y", prefix="made_")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--made-size=many", "invalid int value"),
        ("--kind=z", "invalid choice: 'z'"),
        ("--made-size=0", "at least 1"),
    ],
)
def test_what_is_wrong_is_one_line(argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parsed(argument)
    assert "\n" not in str(error.value)
