"""Every operation against PIL on one-frame clips; how they are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from tasks.video import randaugment as ra


def photo(seed=0, height=18, width=25):
    """Smooth and dull, with pixels of many levels, so that every operation changes something."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(3, 9) + y / rng.uniform(3, 9)) for _ in range(3)]
    pixels = 120 + 60 * np.stack(waves, axis=-1) + rng.normal(size=(height, width, 3)) * 8
    return np.clip(pixels, 20, 220).astype(np.uint8)


def as_clip(pixels):
    return jnp.asarray(pixels, jnp.float32)[None] / 255


def assert_like_pil(got, want, levels):
    np.testing.assert_allclose(np.asarray(got[0]) * 255, np.asarray(want, np.float32), atol=levels)


@pytest.mark.parametrize("factor", [0.1, 0.7, 1.0, 1.9])
@pytest.mark.parametrize(
    ("function", "enhancer"),
    [
        (ra.brightness, ImageEnhance.Brightness),
        (ra.contrast, ImageEnhance.Contrast),
        (ra.saturation, ImageEnhance.Color),
        (ra.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_enhancements(function, enhancer, factor):
    pixels = photo()
    want = enhancer(Image.fromarray(pixels)).enhance(factor)
    # PIL rounds what it blends with to 8 bits, cuts the result, and blending multiplies the error.
    assert_like_pil(jax.jit(function)(as_clip(pixels), factor), want, 2.0)


def test_a_factor_of_one_and_of_zero():
    clip = as_clip(photo())
    functions = (ra.brightness, ra.contrast, ra.saturation, ra.sharpness)
    run = jax.jit(lambda factor: [function(clip, factor) for function in functions])
    for got in run(1.0):
        np.testing.assert_allclose(got, clip, atol=1e-6)
    black, flat, gray, _ = run(0.0)
    assert not np.any(black)
    assert np.ptp(flat) == 0
    np.testing.assert_allclose(gray, jnp.broadcast_to(ra.luma(clip), clip.shape), rtol=1e-6)


def test_frames_too_small_to_smooth_stay_sharp():
    clip = as_clip(photo(height=2))
    np.testing.assert_array_equal(ra.sharpness(clip, 0.0), clip)


def test_autocontrast():
    assert_like_pil(
        jax.jit(ra.autocontrast)(as_clip(photo())), ImageOps.autocontrast(Image.fromarray(photo())), 1.01
    )
    flat = jnp.full((2, 4, 4, 3), 0.3)
    np.testing.assert_array_equal(ra.autocontrast(flat), flat)


@pytest.mark.parametrize("height", [4, 18, 64])  # 4: too few pixels for a step of one level
def test_equalize(height):
    pixels = photo(height=height)
    want = ImageOps.equalize(Image.fromarray(pixels))
    assert_like_pil(jax.jit(ra.equalize)(as_clip(pixels)), want, 1e-3)


def test_equalize_leaves_a_single_level_alone():
    flat = jnp.full((2, 20, 20, 3), 100 / 255)
    np.testing.assert_allclose(jax.jit(ra.equalize)(flat), flat, atol=1e-7)


@pytest.mark.parametrize("bits", [1, 4, 7, 8])
def test_posterize(bits):
    assert_like_pil(
        ra.posterize(as_clip(photo()), bits), ImageOps.posterize(Image.fromarray(photo()), bits), 1e-3
    )


@pytest.mark.parametrize("threshold", [0, 100, 256])
def test_solarize_and_invert(threshold):
    want = ImageOps.solarize(Image.fromarray(photo()), threshold)
    assert_like_pil(ra.solarize(as_clip(photo()), threshold), want, 1e-3)
    if threshold == 0:
        np.testing.assert_allclose(ra.OPERATIONS["invert"](as_clip(photo()), None)[0] * 255, want, atol=1e-3)


def test_cutout_is_a_grey_rectangle_cut_at_the_border():
    clip = jnp.ones((2, 10, 20, 3))
    got = np.asarray(ra.cutout(clip, 0.4, jnp.asarray([0.5, 0.1])))
    want = np.ones((2, 10, 20, 3))
    want[:, 3:7, :6] = 0.5  # columns -2 to 5
    np.testing.assert_array_equal(got, want)


def draw(strength, sign=1.0):
    return ra.Draw(strength, jnp.float32(sign), jnp.asarray([0.5, 0.5]))


def test_names_of_the_paper_and_two_more():
    paper = "identity autocontrast equalize rotate solarize color posterize contrast brightness sharpness"
    geometric = "shear_x shear_y translate_x translate_y"
    assert set(ra.OPERATIONS) == {*paper.split(), *geometric.split(), "invert", "cutout"}


@pytest.fixture(scope="module")
def every_operation():
    clip = jnp.concatenate([as_clip(photo())] * 3)
    run = jax.jit(
        lambda clip, sign: {
            name: operation(clip, ra.Draw(2 / 3, sign, jnp.asarray([0.5, 0.5])))
            for name, operation in ra.OPERATIONS.items()
        }
    )
    return clip, run(clip, jnp.float32(1.0)), run(clip, jnp.float32(-1.0))


@pytest.mark.parametrize("name", ra.OPERATIONS)
def test_every_operation_keeps_shape_range_and_the_sameness_of_frames(every_operation, name):
    clip, up, down = every_operation
    for got in (up[name], down[name]):
        assert got.shape == clip.shape
        assert got.dtype == jnp.float32
        assert float(got.min()) >= -1e-6
        assert float(got.max()) <= 1 + 1e-6
        np.testing.assert_array_equal(got[1:], got[:1].repeat(2, axis=0))
        assert np.array_equal(got, clip) == (name == "identity")
    signed = set(ra.OPERATIONS) - {
        "identity", "autocontrast", "equalize", "invert", "posterize", "solarize", "cutout",
    }  # fmt: skip
    assert np.array_equal(up[name], down[name]) == (name not in signed)


def test_what_looks_at_pixels_looks_at_the_whole_clip():
    """A dark and a light frame: one mapping for both, so that the second stays the lighter one."""
    clip = jnp.concatenate([as_clip(photo()) * 0.4, 0.4 + as_clip(photo()) * 0.4])
    names = ("autocontrast", "equalize", "contrast")
    for name, got in jax.jit(lambda: {n: ra.OPERATIONS[n](clip, draw(0.5)) for n in names})().items():
        assert float(got[1].mean()) - float(got[0].mean()) > 0.25, name


def test_strength_goes_from_nothing_to_everything():
    clip = as_clip(photo())
    names = ("rotate", "solarize", "color", "sharpness", "shear_x", "translate_y", "posterize", "cutout")

    @jax.jit
    def run(clip):
        full = ra.OPERATIONS["solarize"](clip, draw(1.0)), ra.OPERATIONS["posterize"](clip, draw(1.0))
        darkest = ra.OPERATIONS["brightness"](clip, draw(2.0, -1.0))
        return [ra.OPERATIONS[name](clip, draw(0.0)) for name in names], *full, darkest

    nothing, solarized, posterized, darkest = run(clip)
    for name, got in zip(names, nothing, strict=True):
        np.testing.assert_allclose(got, clip, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(solarized, 1 - clip, atol=1e-6)
    assert set(np.unique(np.round(posterized * 255))) <= {0, 128}
    assert float(darkest.max()) > 0  # never all black


def test_rotation_by_full_strength_is_thirty_degrees():
    pixels = photo(height=31, width=31)
    want = Image.fromarray(pixels).rotate(30, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
    got = jax.jit(lambda clip: ra.OPERATIONS["rotate"](clip, draw(1.0, -1.0)))(as_clip(pixels))[0] * 255
    off = np.abs(np.asarray(got) - np.asarray(want, np.float32)).max(axis=-1)
    assert (off > 1.5).mean() < 0.01


CODES = ("identity", "invert", "brightness")


@pytest.fixture(scope="module")
def many():
    """(first pixel of 600 clips of value 0.2 under one layer of three operations, of two layers)."""
    clip = jnp.full((1, 2, 2, 3), 0.2)
    run = lambda layers: jax.jit(  # noqa: E731
        lambda keys: jax.lax.map(
            lambda key: ra.randaugment(clip, key, layers=layers, strength=0.5, operations=CODES)[0, 0, 0, 0],
            keys,
        )
    )
    keys = jax.random.split(jax.random.key(0), 600)
    return np.asarray(run(1)(keys)), np.asarray(run(2)(keys))


def test_operations_and_signs_are_drawn_evenly(many):
    one, _ = many
    values, counts = np.unique(np.round(one, 4), return_counts=True)
    np.testing.assert_allclose(values, [0.2 * 0.55, 0.2, 0.2 * 1.45, 0.8], atol=1e-4)
    np.testing.assert_allclose(counts / 600, [1 / 6, 1 / 3, 1 / 6, 1 / 3], atol=0.06)


def test_layers_follow_each_other(many):
    _, two = many
    # of 0.2, its double inversion, 0.2 -+ 45 %, and of what follows after these
    expected = [0.0605, 0.11, 0.1595, 0.2, 0.29, 0.4205, 0.44, 0.71, 0.8, 0.89, 1.0]
    np.testing.assert_allclose(np.unique(np.round(two, 4)), expected, atol=1e-4)


def test_unknown_operation():
    with pytest.raises(KeyError, match="blur"):
        ra.randaugment(as_clip(photo()), jax.random.key(0), layers=1, strength=0.5, operations=("blur",))
