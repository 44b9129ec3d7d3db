"""The table of sizes, and the copies of it in config files, which import nothing of the models."""

import importlib

import pytest

from models.common.config import VIT_SIZES
from models.tapnext import TAPNextConfig


@pytest.mark.parametrize("file", ["tapnext", "trecvit"])
def test_config_files_repeat_the_table(file: str) -> None:
    """Sizes of their own come on top; "mini", for two CPU cores, is the smallest of several layers."""
    widths = dict(importlib.import_module(f"configs.{file}").WIDTHS)
    own = {name: widths.pop(name) for name in set(widths) - set(VIT_SIZES)}
    assert widths == VIT_SIZES
    assert all(width % heads == 0 for width, _, _, heads in own.values())
    width, depth, mlp_size, _ = own.pop("mini")
    others = (VIT_SIZES | own).values()
    assert width * depth * mlp_size < min(w * d * m for w, d, m, _ in others if d > 1)


@pytest.mark.parametrize("size", ["S", "B"])
def test_config_files_make_the_presets_of_tapnext(size: str) -> None:
    """As wide in the recurrence, too, where that is not the model's width."""
    model = importlib.import_module("configs.tapnext").get_config(f"size={size}").model
    preset = TAPNextConfig.preset(size)
    for name in ("width", "depth", "mlp_size", "num_heads", "lru_width", "head_width"):
        assert model[name] == getattr(preset, name), name
