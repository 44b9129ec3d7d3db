"""Two implementations that agree train alike; two that do not are found out."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.common.errors import ConfigError
from tasks.lm import agreement


@pytest.mark.slow
def test_two_implementations_train_alike_and_are_drawn(tmp_path: Path) -> None:
    rows = agreement.rows(
        calls=12, size="tiny", length=32, batch=2, implementations=("reference", "xla_chunked"),
        settings="log.progress=false", figure=tmp_path / "new" / "x.png",
    )  # fmt: skip
    ours, seeds = rows
    assert ours["case"] == "reference against xla_chunked"
    assert ours["steps"] == 12
    assert ours["met"] == "yes"
    # bfloat16 rounding, against other initial parameters.
    assert ours["gap"] < 0.3 * seeds["gap"]
    assert seeds["times"] == 1
    assert agreement.verdict(rows).startswith("gap at most 2 times that between seeds: holds")
    with Image.open(tmp_path / "new" / "x.png") as image:
        assert image.size[0] > 1000


def test_a_gap_beyond_twice_that_of_seeds_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {("wrong", 0): 1.5, ("right", 0): 1.0, ("right", 1): 1.2}

    def fake(arguments: str, settings: str, implementation: str, seed: int) -> np.ndarray:
        return np.full(200, losses[implementation, seed])

    monkeypatch.setattr(agreement, "_losses", fake)
    rows = agreement.rows(implementations=("wrong", "right"))
    assert [row["times"] for row in rows] == [2.5, 1.0]
    assert rows[0]["met"] == "no"
    assert "does not hold" in agreement.verdict(rows)


def test_the_gap_is_that_of_the_last_hundred_steps() -> None:
    a = np.concatenate([np.full(50, 9.0), np.linspace(0, 2, 100)])
    assert agreement.gap(a, np.ones(150)) == pytest.approx(0.5, rel=0.02)


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'runtime\.tiles'"):
        agreement.rows(settings="runtime.tile=1", size="tiny", length=32, batch=2, calls=1)
