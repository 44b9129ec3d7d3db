"""Flat names, layer stacking, differences, the size report, initial values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.params import (
    count,
    flatten_names,
    lecun_normal,
    list_differences,
    size_report,
    stack_layers,
    unflatten_names,
    unstack_layers,
    xavier_uniform,
)


def tree(layers: int = 3):
    return {
        "embed": {"embedding": jnp.ones((5, 2))},
        "layers": {
            str(i): {"mlp": {"kernel": jnp.full((2, 4), i)}, "norm": {"scale": jnp.full(2, i)}}
            for i in range(layers)
        },
    }


def test_names_round_trip_in_order():
    flat = flatten_names(tree())
    assert list(flat)[:3] == ["embed/embedding", "layers/0/mlp/kernel", "layers/0/norm/scale"]
    assert jax.tree.structure(unflatten_names(flat)) == jax.tree.structure(tree())


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({1: jnp.ones(1)}, TypeError, "keys are strings"),
        ({"a/b": jnp.ones(1)}, ValueError, "contains '/'"),
        ({"": jnp.ones(1)}, ValueError, "empty"),
        ({"a": {}}, ValueError, "group 'a' is empty"),
    ],
)
def test_unnameable_trees_are_refused(bad, error, message, unchecked_types):
    with pytest.raises(error, match=message):
        flatten_names(bad)


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a")])
def test_a_name_cannot_be_parameter_and_group(names):
    with pytest.raises(ValueError, match=r"already a parameter|both a parameter"):
        unflatten_names({name: jnp.ones(1) for name in names})


def test_layers_stack_in_numeric_order_and_back():
    layers = tree(11)["layers"]
    stacked = stack_layers(dict(sorted(layers.items())))  # "10" sorts before "2"
    np.testing.assert_array_equal(stacked["norm"]["scale"][:, 0], np.arange(11))
    back = unstack_layers(stacked, 11)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), back, layers)))


def test_stacking_needs_consecutive_layers():
    layers = tree()["layers"]
    del layers["1"]
    with pytest.raises(ValueError, match=r"named 0\.\.1"):
        stack_layers(layers)
    with pytest.raises(ValueError, match="leading axis is 3, expected 4"):
        unstack_layers(stack_layers(tree()["layers"]), 4)


def test_differences_are_listed_by_kind():
    expected = {"a": (1, 2), "b": (3,), "c": (4,)}
    assert list_differences(expected, dict(expected)) == ""
    text = list_differences(expected, {"a": (2, 1), "b": (3,), "d": (5,)})
    assert text.splitlines() == [
        "missing (1):",
        "    c (4,)",
        "unexpected (1):",
        "    d (5,)",
        "wrong shape (1):",
        "    a: expected (1, 2), found (2, 1)",
    ]
    many = list_differences({str(i): (1,) for i in range(30)}, {}, limit=2)
    assert many.splitlines()[-1].strip() == "... and 28 more"


def test_size_report_adds_up():
    report = size_report(tree())
    assert count(tree()) == 5 * 2 + 3 * (8 + 2)
    total = report.splitlines()[-1].split()
    assert total[:2] == ["total", "40"]
    assert [line.split()[:2] for line in report.splitlines() if line.startswith("layers")] == [
        ["layers/*/mlp/kernel", "24"],
        ["layers/*/norm/scale", "6"],
    ]


def test_initialisers():
    xavier = xavier_uniform(30, 60)(jax.random.key(0), (100, 100))
    assert abs(float(xavier.std()) / math.sqrt(2 / 90) - 1) < 0.02
    assert float(jnp.abs(xavier).max()) <= math.sqrt(6 / 90)
    lecun = lecun_normal(25)(jax.random.key(0), (100, 100))
    assert abs(float(lecun.std()) / 0.2 - 1) < 0.03
    assert float(jnp.abs(lecun).max()) <= 2 * 0.2 / 0.879
