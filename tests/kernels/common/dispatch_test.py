"""Choice of implementation: automatic, named, listed; a named one never falls back."""

import dataclasses

import pytest

from kernels.common.dispatch import ImplementationError, choose, explain_choice


@dataclasses.dataclass
class Fake:
    reason: str | None

    def supports(self, request: int) -> str | None:
        return self.reason if request > 10 else None


ALL = {"quick": Fake("takes at most 10"), "general": Fake(None)}
ORDER = ("quick", "general")


def test_automatic_choice_takes_the_first_that_can() -> None:
    assert choose("op", ALL, 5, None, ORDER)[0] == "quick"
    assert choose("op", ALL, 50, None, ORDER)[0] == "general"
    assert choose("op", ALL, 50, ["quick", "general"], ())[0] == "general"


def test_a_named_one_never_falls_back() -> None:
    assert choose("op", ALL, 5, "quick", ORDER)[0] == "quick"
    with pytest.raises(ImplementationError, match="quick: takes at most 10"):
        choose("op", ALL, 50, "quick", ORDER)


def test_unknown_and_empty_requests_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'fast' does not exist; known ones are general, quick"):
        choose("op", ALL, 5, "fast", ORDER)
    with pytest.raises(ValueError, match="empty list"):
        choose("op", ALL, 5, [], ORDER)


def test_explanation_says_what_runs_and_why_not() -> None:
    text = explain_choice("op", ALL, 50, None, ORDER)
    assert "quick              cannot run: takes at most 10" in text
    assert "general            runs" in text
    assert "none of the requested" in explain_choice("op", ALL, 50, "quick", ORDER)
