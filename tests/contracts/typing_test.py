"""The runtime shape checks really are on for the packages they are promised for."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from models.common import sharding

PROBE = """
from jaxtyping import Array, Float


def scale(x: Float[Array, "B T"], by: Float[Array, " B"]) -> Float[Array, "B T"]:
    return x * by[:, None]


def ratio(x: float) -> float:
    return x
"""


@pytest.fixture(params=["kernels", "models", "tasks"])
def probe(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module with annotated functions, imported as a member of one of our packages."""
    package = __import__(request.param)
    name = f"{request.param}.shape_check_probe"
    (tmp_path / "shape_check_probe.py").write_text(PROBE)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def test_matching_shapes_pass(probe):
    out = probe.scale(jnp.ones((2, 3)), jnp.full(2, 3.0))
    assert out.shape == (2, 3)
    assert probe.ratio(1) == 1  # an int is a float by PEP 484


@pytest.mark.parametrize("by", [jnp.ones(3), jnp.ones((2, 1)), jnp.ones(2, jnp.int32)])
def test_wrong_shape_or_dtype_raises(probe, by):
    with pytest.raises(jaxtyping.TypeCheckError, match="by"):
        probe.scale(jnp.ones((2, 3)), by)


def test_wrong_shape_raises_under_jit(probe):
    with pytest.raises(jaxtyping.TypeCheckError, match="by"):
        jax.eval_shape(probe.scale, jnp.ones((2, 3)), jnp.ones(3))


def test_plain_types_are_checked_too():
    with pytest.raises(jaxtyping.TypeCheckError, match="axes"):
        sharding.constrain(jnp.ones(2), axes=3)


def test_checks_can_be_switched_off_for_messages(probe, unchecked_types):
    assert probe.scale(jnp.ones((2, 3)), jnp.ones(2, jnp.int32)).shape == (2, 3)
