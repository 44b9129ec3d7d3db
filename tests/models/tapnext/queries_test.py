"""Query tokens: the closed form against the table it stands for, times, hints, checks of users' queries."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.tapnext import check_queries, make_queries
from models.tapnext.queries import NEVER, is_pending, point_tokens, query_embedding
from tests.models.tapnext.small_tapnext import QUERIES, QUICK_COMPILE, queries, random_params, small


def table_sample(config, y: float, x: float) -> np.ndarray:
    """Bilinear sample of the table [H s, W s, D] at (y s - 0.5, x s - 0.5), entry by entry, in float64."""
    count = config.width // 4
    w = np.array([10000 ** (-k / (count - 1)) for k in range(count)])
    rows, columns = (n * config.query_scale for n in config.image_size)

    def entry(r: int, c: int) -> np.ndarray:
        if config.numerics == "torch" and not (0 <= r < rows and 0 <= c < columns):
            return np.zeros(config.width)
        r, c = min(max(r, 0), rows - 1), min(max(c, 0), columns - 1)
        return np.concatenate([np.sin(c * w), np.cos(c * w), np.sin(r * w), np.cos(r * w)])

    y, x = y * config.query_scale - 0.5, x * config.query_scale - 0.5
    low_r, low_c = math.floor(y), math.floor(x)
    total = np.zeros(config.width)
    for dr, dc in itertools.product((0, 1), (0, 1)):
        weight = (1 - abs(y - low_r - dr)) * (1 - abs(x - low_c - dc))
        total += weight * entry(low_r + dr, low_c + dc)
    return total


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("numerics", ["jax", "torch"])
def test_embedding_is_the_bilinear_sample_of_the_table(numerics, scale):
    """Inside, on pixel centres, within half a pixel of every border, at the corners and far outside."""
    config = small(image_size=(40, 24), numerics=numerics, query_scale=scale)
    places = [0.0, 0.2, 0.5, 1.0, 7.3, 12.5, 23.6, 24.0, 39.5, 39.8, 40.0, 40.4, -0.3, -5.0, 300.0]
    yx = np.array(list(itertools.product(places, places)))
    found = embedding_of(config, jnp.asarray(yx, jnp.float32))
    expected = np.stack([table_sample(config, *at) for at in yx])
    # float32 places: an error of 1e-5 at 300 times s, times the slope of the waves, at most 1.
    np.testing.assert_allclose(found, expected, atol=5e-5)
    inside = ((yx >= 0.5) & (yx <= np.array(config.image_size) - 0.5)).all(axis=1)
    other = dataclasses.replace(config, numerics="jax" if numerics == "torch" else "torch")
    same = np.abs(embedding_of(other, jnp.asarray(yx, jnp.float32)) - found).max(axis=1) < 1e-6
    if scale == 1:
        assert same[inside].all()
    assert not same[~inside].all()


tokens_of = jax.jit(point_tokens, static_argnums=(0, 4), compiler_options=QUICK_COMPILE)
embedding_of = jax.jit(query_embedding, static_argnums=0, compiler_options=QUICK_COMPILE)


def kinds(config, params, points, frames: int, start: int = 0, valid=None) -> list[str]:
    """Per frame of a single track: u, m, or the number of the hint whose token it is."""
    found = make_queries(jnp.asarray(points, jnp.float32)[None, None], valid)
    positions = start + jnp.arange(6)[None]  # always as many: each number is compiled
    tokens = np.asarray(tokens_of(config, params["points"], found, positions))[0, :frames, 0]
    group = params["points"]
    named = {"u": group["unknown"], "m": group["mask"]}
    for k in range(found.frame.shape[2]):
        named[str(k)] = group["query"] + embedding_of(config, found.yx[0, 0, k])
    names = []
    for token in tokens:
        (name,) = [n for n, value in named.items() if np.abs(np.asarray(value) - token).max() < 1e-6]
        names.append(name)
    return names


def test_tokens_say_unknown_then_query_then_mask():
    config, params = small(), random_params(small())
    cases = {0: "0mmmm", 2: "uu0mm", 4: "uuuu0", 5: "uuuuu", 99: "uuuuu", -1: "mmmmm", -7: "mmmmm"}
    for frame, expected in cases.items():
        assert kinds(config, params, [frame, 3.0, 4.0], 5) == list(expected), frame
    # Truncation toward zero, as the official JAX code casts.
    for frame, expected in {-0.5: "0mmm", 0.9: "0mmm", 2.999: "uu0m", -1.2: "mmmm"}.items():
        assert kinds(config, params, [frame, 3.0, 4.0], 4) == list(expected), frame
    # A fractional time acts once in a stream too: at frame 3, and not again as 3.5 - 4 -> 0.
    assert kinds(config, params, [3.5, 3.0, 4.0], 3, start=3) == list("0mm")
    assert kinds(config, params, [3.5, 3.0, 4.0], 3, start=4) == list("mmm")


def test_several_hints_are_written_in_order():
    config, params = small(), random_params(small())
    hints = [[2, 1.0, 1.0], [4, 2.0, 2.0], [2, 3.0, 3.0], [1, 4.0, 4.0], [-3, 5.0, 5.0], [9, 6.0, 6.0]]
    assert kinds(config, params, hints, 6) == list("u32m1m")

    def with_valid(*flags):
        return kinds(config, params, hints[: len(flags)], 6, valid=jnp.array(flags, bool)[None, None])

    assert with_valid(True, False) == list("uu0mmm")
    assert with_valid(False, True) == list("mmmm1m")  # no unknown prefix without a first hint
    assert with_valid(False, False) == list("mmmmmm")


def test_pending_queries_are_those_to_come():
    found = is_pending(make_queries(queries(1)), jnp.arange(3, 6)[None])
    np.testing.assert_array_equal(found[0].T, [[False] * 3, [False] * 3, [True, False, False], [True] * 3])


def test_coordinates_stay_float32_in_bfloat16_runs():
    """Above 128 bfloat16 knows whole pixels only: a quarter of a pixel must still make a difference."""
    config = small(image_size=(256, 256))
    params = random_params(config)["points"]

    def token(y: float):
        found = make_queries(jnp.array([[[0.0, y, 90.0]]]))
        return tokens_of(config, params, found, jnp.zeros((1, 1), int), "bfloat16")[0, 0, 0]

    assert token(200.25).dtype == jnp.bfloat16
    assert float(jnp.abs(token(200.25) - token(200.5)).max()) > 0.05
    assert make_queries(queries(1).astype(jnp.float16)).yx.dtype == jnp.float32


def test_make_queries_refuses_wrong_shapes(unchecked_types):
    for shape in ((2, 3), (2, 4, 2), (2, 0, 3), (1, 2, 3, 4, 3)):
        with pytest.raises(ValueError, match=r"query_tyx has shape .* at least one track"):
            make_queries(jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"query_valid has shape \(2, 3\); it must be .* \(2, 4\)"):
        make_queries(jnp.zeros((2, 4, 3)), jnp.ones((2, 3), bool))
    assert make_queries(jnp.array([[[1e30, 0.0, 0.0]]])).frame.item() == NEVER


def test_good_queries_pass_as_float32():
    found = check_queries(QUERIES.tolist(), (8, 12))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, QUERIES)
    check_queries([[4.9, 0, 12], [0, 8, 0]], (8, 12), frames=5)


@pytest.mark.parametrize(
    ("rows", "frames", "message"),
    [
        (np.zeros((0, 3)), None, r"shape \(0, 3\); it must be \[Q, 3\]"),
        ([[1.0, 2.0]], None, r"shape \(1, 2\)"),
        ([[0, 1, 1], [0, np.nan, 1]], None, r"query_tyx\[1\] = \[0.0, nan, 1.0\]; t, y and x must be finite"),
        ([[np.inf, 1, 1]], None, "must be finite"),
        ([[0, 1, 1], [-1, 1, 1]], None, r"query_tyx\[1\] = .* 1 of 2 are outside$"),
        ([[0, 10, 3]], 2, r"y in 0 .. 8 and x in 0 .. 12 \(pixels\); 1 of 1 are outside; as \(t, x, y\)"),
        ([[0, 13, 13]], None, "1 of 1 are outside$"),
        ([[5, 1, 1]], 5, "t from 0 below 5"),
        ([[1, 10, 90]], 100, r"as \(y, x, t\) all would fit: is the order right"),
        ([[11.5, 7.5, 90]], 100, r"as \(x, y, t\) all would fit"),
    ],
)
def test_bad_queries_are_explained(rows, frames, message):
    with pytest.raises(ValueError, match=message):
        check_queries(rows, (8, 12), frames)
