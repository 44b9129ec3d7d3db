"""Windows, resizing and affine sampling against PIL and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tasks.video import geometry
from tasks.video.geometry import Window

# PIL rounds to 8 bits after each of the two passes.
PIL_ROUNDING = 1.01


def image(height=24, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


resample = jax.jit(geometry.resample, static_argnames="size")


@pytest.mark.parametrize(
    ("window", "size"),
    [
        (Window(0.0, 0.0, 24.0, 32.0), (24, 32)),
        (Window(3.0, 5.0, 12.0, 16.0), (12, 16)),
        (Window(2.25, 4.5, 20.0, 21.5), (8, 7)),  # smaller: antialiased
        (Window(5.5, 1.25, 6.0, 9.5), (17, 23)),  # larger
        (Window(0.0, 10.0, 24.0, 11.0), (9, 22)),  # one of each
    ],
)
def test_resample_is_pils_bilinear_resize_of_a_box(window, size):
    pixels = image()
    box = (window.left, window.top, window.left + window.width, window.top + window.height)
    want = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR, box=box)
    got = resample(jnp.asarray(pixels)[None], window, size=size)[0]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.asarray(want, np.float32), atol=PIL_ROUNDING)


def test_the_whole_window_at_its_own_size_is_exact():
    clip = jnp.asarray(image())[None]
    np.testing.assert_array_equal(resample(clip, Window(0.0, 0.0, 24.0, 32.0), size=(24, 32)), clip)
    np.testing.assert_array_equal(
        resample(clip, Window(4.0, 6.0, 10.0, 20.0), size=(10, 20)), clip[:, 4:14, 6:26]
    )


def test_flip_mirrors_columns():
    clip = jnp.asarray(image())[None]
    window = Window(1.0, 2.5, 20.0, 22.0)
    plain, mirrored = (resample(clip, window, size=(10, 12), flip=jnp.bool_(f)) for f in (False, True))
    np.testing.assert_array_equal(mirrored, plain[:, :, ::-1])
    np.testing.assert_array_equal(plain, resample(clip, window, size=(10, 12)))


def test_weights_of_each_result_pixel_sum_to_one_and_stay_near_its_window():
    weights = np.asarray(geometry.resize_weights(3.5, 8.0, 20, 4))
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    assert np.all(weights >= 0)
    assert not weights[:, :2].any()  # centre 4.5 of the first, triangle 2 wide
    assert not weights[:, 13:].any()


def draws(function, count=400):
    return np.stack(jax.jit(jax.vmap(function))(jax.random.split(jax.random.key(1), count)), axis=1)


def assert_inside(windows, source):
    top, left, height, width = windows.T
    assert (windows[:, :2] >= 0).all()
    assert (windows[:, 2:] > 0).all()
    assert (top + height <= source[0] + 1e-4).all()
    assert (left + width <= source[1] + 1e-4).all()


def test_scale_windows_have_the_crops_aspect_and_the_scales_asked_for():
    windows = draws(lambda key: geometry.scale_window(key, (64, 96), (48, 32), (0.875, 1.33)))
    assert_inside(windows, (64, 96))
    scale = 48 / windows[:, 2]
    np.testing.assert_allclose(32 / windows[:, 3], scale, rtol=1e-5)
    assert scale.min() >= 0.875 - 1e-5
    assert scale.min() < 0.9
    assert 1.3 < scale.max() <= 1.33 + 1e-5
    assert abs(scale.mean() - (0.875 + 1.33) / 2) < 0.03
    spare = 96 - windows[:, 3]
    assert 0.4 < np.mean(windows[:, 1] / spare) < 0.6  # left edges are uniform over what is spare


def test_a_scale_too_small_for_the_crop_is_raised():
    windows = draws(lambda key: geometry.scale_window(key, (40, 60), (40, 40), (0.5, 1.0)))
    assert_inside(windows, (40, 60))
    np.testing.assert_allclose(windows[:, 2:], 40, rtol=1e-6)


def test_area_windows_are_whole_pixels_of_the_area_and_aspect_asked_for():
    windows = draws(lambda key: geometry.area_window(key, (60, 80), (0.2, 0.8), (0.75, 4 / 3)))
    assert_inside(windows, (60, 80))
    np.testing.assert_array_equal(windows, np.round(windows))
    area, aspect = windows[:, 2] * windows[:, 3] / 4800, windows[:, 3] / windows[:, 2]
    assert 0.18 < area.min() < 0.25
    assert 0.7 < area.max() < 0.82
    assert 0.72 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.38
    assert abs(np.log(aspect).mean()) < 0.05


def test_no_fitting_area_window_falls_back_on_the_middle():
    wide, high = (
        draws(lambda key, s=source: geometry.area_window(key, s, (0.9, 1.0), (0.75, 4 / 3)), 4)
        for source in ((10, 100), (100, 10))
    )
    np.testing.assert_array_equal(wide, [(0, 43, 10, 13)] * 4)  # too wide for 4/3 at all: 10 x 13
    np.testing.assert_array_equal(high, [(43, 0, 13, 10)] * 4)


def test_crop_is_every_window_of_whole_pixels():
    clip = jnp.arange(5 * 6 * 3, dtype=jnp.uint8).reshape(1, 5, 6, 3)
    cut = jax.jit(jax.vmap(functools.partial(geometry.crop, size=(4, 4)), (None, 0)))
    found = np.asarray(cut(clip, jax.random.split(jax.random.key(0), 200)))
    whole = np.asarray(clip)
    windows = {whole[:, y : y + 4, x : x + 4].tobytes() for y in (0, 1) for x in (0, 1, 2)}
    assert {part.tobytes() for part in found} == windows


warp = jax.jit(geometry.warp, static_argnames="fill")


@pytest.mark.parametrize(
    "matrix",
    [
        geometry.rotation(0.3),
        geometry.rotation(-1.2),
        geometry.shear(0.25, 0.0),
        geometry.shear(0.0, -0.4),
        geometry.translation(3.25, -5.5),
    ],
    ids=["turn", "turn back", "shear x", "shear y", "shift"],
)
def test_warp_is_pils_affine_transform(matrix):
    pixels = image(21, 30)
    a = np.asarray(matrix, np.float64)
    middle = np.array([15.0, 10.5])
    # PIL counts from the corner; ours from the middle.
    offset = a[:, 2] + middle - a[:, :2] @ middle
    want = Image.fromarray(pixels).transform(
        (30, 21),
        Image.Transform.AFFINE,
        (*a[0, :2], offset[0], *a[1, :2], offset[1]),
        Image.Resampling.BILINEAR,
        fillcolor=(128, 128, 128),
    )
    got = warp(jnp.asarray(pixels, jnp.float32)[None], matrix, fill=128.0)[0]
    off = np.abs(np.asarray(got) - np.asarray(want, np.float32)).max(axis=-1)
    # A pixel that lies on the border of the frame may fall on either side of it.
    assert (off > PIL_ROUNDING).mean() < 0.01


def test_warp_by_the_identity_is_exact_and_a_turn_by_180_degrees_reverses():
    clip = jnp.asarray(image(7, 10), jnp.float32)[None]
    np.testing.assert_array_equal(warp(clip, geometry.translation(0.0, 0.0), fill=0.0), clip)
    turned = warp(clip, geometry.rotation(np.pi), fill=0.0)
    np.testing.assert_allclose(turned, clip[:, ::-1, ::-1], atol=1e-3)


def test_shift_shows_what_lies_to_the_right_and_below_and_fills_the_rest():
    clip = jnp.arange(12.0).reshape(1, 3, 4, 1) + jnp.zeros(3)
    got = np.asarray(warp(clip, geometry.translation(1.0, 2.0), fill=-1.0))[0, :, :, 0]
    np.testing.assert_array_equal(got, [[9, 10, 11, -1], [-1, -1, -1, -1], [-1, -1, -1, -1]])
