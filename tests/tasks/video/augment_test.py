"""The whole augmentation: exact where off, one transform per clip, determinism, statistics, bad configs."""

import colorsys
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.vit import as_float
from tasks.common.config import freeze
from tasks.common.errors import ConfigError
from tasks.video import augment as aug
from tasks.video.augment import AugmentConfig, augment, augment_frames, prepare_eval
from tasks.video.randaugment import luma

ROWS, CLASSES = 4, 5


def frames(rows=ROWS, length=3, height=12, width=16, seed=0, still=False):
    """Random clips; `still`: all frames of a clip alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, length, height, width, 3), np.uint8)
    return jnp.asarray(pixels[:, :1].repeat(length, axis=1) if still else pixels)


LABELS = jnp.arange(ROWS) % CLASSES
# Compilers multiply by a rounded 1/255: equal to the model's own conversion, not to NumPy's.
divided = jax.jit(as_float)
evaluate = jax.jit(prepare_eval, static_argnames=("config", "crop"))
jitted = jax.jit(augment, static_argnames=("config", "num_classes"))
run_frames = jax.jit(augment_frames, static_argnames="config")

# All that is drawn clip by clip, at sizes that are not square.
FULL = AugmentConfig(
    size=(8, 10), scale=(0.875, 1.33), flip=0.5, randaugment_layers=2,
    randaugment_operations=("equalize", "rotate", "color"), color_probability=0.8, gray_probability=0.2,
    label_smoothing=0.1, repeats=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def full():
    return lambda key, **options: jitted(
        FULL, frames(**options), LABELS, jax.random.key(key), num_classes=CLASSES
    )


def test_everything_off_divides_by_255_exactly():
    got, targets = jitted(
        AugmentConfig(size=(12, 16)), frames(), LABELS, jax.random.key(0), num_classes=CLASSES
    )
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, divided(frames()))
    np.testing.assert_allclose(got, np.asarray(frames()) / 255, rtol=1e-6)
    np.testing.assert_array_equal(targets, np.eye(CLASSES, dtype=np.float32)[:ROWS])


def test_a_crop_without_scaling_keeps_whole_pixels():
    clips = np.asarray(frames())
    got = np.asarray(run_frames(AugmentConfig(size=(8, 16)), frames(), jax.random.key(0)))
    got = np.round(got * 255).astype(np.uint8)
    tops = []
    for clip, part in zip(clips, got, strict=True):
        tops += [top for top in range(5) if np.array_equal(clip[:, top : top + 8], part)]
    assert len(tops) == ROWS
    assert len(set(tops)) > 1


@pytest.mark.slow
def test_all_of_it_at_once(full):
    clips, targets = full(0)
    assert clips.shape == (2 * ROWS, 3, 8, 10, 3)
    assert clips.dtype == jnp.float32
    assert float(clips.min()) >= 0
    assert float(clips.max()) <= 1 + 1e-6
    assert targets.shape == (2 * ROWS, CLASSES)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    assert float(targets.min()) >= 0.1 / CLASSES - 1e-6
    assert clips.astype(jnp.bfloat16).dtype == jnp.bfloat16


def test_the_key_decides(full):
    first, again, other = full(0), full(0), full(1)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.frames, other.frames)


def test_frames_of_a_clip_get_one_transform_and_copies_of_a_clip_different_ones(full):
    got = np.asarray(full(0, still=True).frames)
    assert got.shape[0] == 2 * ROWS
    np.testing.assert_array_equal(got[:, 1:], got[:, :1].repeat(2, axis=1))
    assert len({clip.tobytes() for clip in got}) == len(got)


def test_mixing_comes_last():
    """Of clips of one value each, only mixed pixels and targets are anything else."""
    clips = jnp.broadcast_to(
        jnp.asarray([[0], [51], [102], [255]], jnp.uint8)[..., None, None, None], (4, 1, 8, 8, 3)
    )
    config = AugmentConfig(size=(8, 8), cutmix_alpha=1.0, label_smoothing=0.1)
    got, targets = jitted(config, clips, LABELS, jax.random.key(0), num_classes=CLASSES)
    values = np.asarray([0, 0.2, 0.4, 1.0])
    for row, partner in enumerate(values[::-1]):
        share = np.isclose(got[row], partner).mean()
        assert np.isclose(got[row], values[row]).mean() == pytest.approx(1 - share)
        want = np.full(CLASSES, 0.02)
        want[row] += 0.9 * (1 - share)
        want[3 - row] += 0.9 * share
        np.testing.assert_allclose(targets[row], want, atol=1e-6)


def test_copies_stand_side_by_side_with_their_targets():
    config = AugmentConfig(size=(12, 16), repeats=2)
    got, targets = jitted(config, frames(), LABELS, jax.random.key(0), num_classes=CLASSES)
    np.testing.assert_array_equal(got[::2], got[1::2])
    np.testing.assert_array_equal(np.argmax(targets, axis=1), np.repeat(LABELS, 2))


DARK, LIGHT = (150, 60, 40), (90, 120, 220)


@pytest.fixture(scope="module")
def colourful():
    """600 clips of the same dark red left half and light blue right half, and a runner for a config."""
    one = np.zeros((1, 1, 4, 4, 3), np.uint8) + np.uint8(DARK)
    one[..., 2:, :] = np.uint8(LIGHT)
    clips = jnp.asarray(one.repeat(600, axis=0))
    return lambda **options: np.asarray(
        run_frames(AugmentConfig(size=(4, 4), **options), clips, jax.random.key(0))
    )


def test_flips_and_colour_drop_happen_as_often_as_asked(colourful):
    got = colourful(flip=0.3, gray_probability=0.2)
    gray = np.ptp(got, axis=-1).max(axis=(1, 2, 3)) == 0
    assert 0.14 < gray.mean() < 0.26
    mirrored = got[:, 0, 0, 0] @ [0.299, 0.587, 0.114] > 0.4
    assert 0.24 < mirrored.mean() < 0.36
    dark, light = ((0.299 * r + 0.587 * g + 0.114 * b) / 255 for r, g, b in (DARK, LIGHT))
    straight = got[gray & ~mirrored]
    np.testing.assert_allclose(straight, np.broadcast_to(straight[:1], straight.shape))
    np.testing.assert_allclose(straight[0, 0, 0, :, 0], [dark, dark, light, light], rtol=1e-5)
    coloured = np.broadcast_to(np.asarray([DARK, DARK, LIGHT, LIGHT]) / 255, got.shape[1:])
    np.testing.assert_allclose(
        got[~gray & ~mirrored], coloured[None].repeat((~gray & ~mirrored).sum(), 0), rtol=1e-6
    )
    np.testing.assert_array_equal(got[mirrored & gray][0], straight[0][:, :, ::-1])


def test_colour_jitter_happens_as_often_as_asked_within_its_bounds(colourful):
    plain = np.broadcast_to(np.asarray([DARK, DARK, LIGHT, LIGHT]) / 255, (600, 1, 4, 4, 3))
    got = colourful(color_probability=0.7, brightness=0.4, contrast=0.0, saturation=0.0, hue=0.0)
    factor = got[:, 0, 0, 0, 0] / plain[:, 0, 0, 0, 0]
    np.testing.assert_allclose(got, np.clip(plain * factor.reshape(-1, 1, 1, 1, 1), 0, 1), atol=1e-5)
    changed = np.abs(factor - 1) > 1e-6
    assert 0.63 < changed.mean() < 0.77
    assert 0.6 <= factor.min() < 0.65
    assert 1.35 < factor.max() <= 1.4 + 1e-6


def test_colour_jitter_of_no_strength_changes_nothing():
    still = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    clip = jnp.zeros((1, 2, 2, 3))
    config = AugmentConfig(color_probability=1.0, **still)
    assert aug.jitter_color(config, clip, jax.random.key(0)) is clip


@pytest.mark.slow
def test_colour_jitter_takes_its_steps_in_random_order():
    """Brightness cuts off at 1 and contrast pulls to the mean, so that their order shows."""
    config = AugmentConfig(color_probability=1.0, brightness=0.9, contrast=0.9, saturation=0.0, hue=0.0)
    start = np.asarray([0.1, 0.9, 0.6, 0.3])
    clip = jnp.asarray(start)[None, None, :, None] * jnp.ones(3)

    def run(key):
        configs = [config, *(dataclasses.replace(config, **{off: 0.0}) for off in ("contrast", "brightness"))]
        return [aug.jitter_color(c, clip, key)[0, 0, :, 0] for c in configs]

    both, bright, contrasted = map(
        np.asarray, jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 64))
    )
    brightness = bright[:, :1] / start[0]  # the factor: the darkest pixel never reaches 1
    middle = np.argsort(np.abs(contrasted - 0.5), axis=1)[:, :1]  # nor is the one nearest the mean cut off
    pixel = np.take_along_axis(contrasted, middle, axis=1)
    contrast = (pixel - start.mean()) / (start[middle] - start.mean())

    def change_contrast(x):
        mean = x.mean(axis=1, keepdims=True)
        return np.clip(mean + contrast * (x - mean), 0, 1)

    first = change_contrast(np.clip(start * brightness, 0, 1))
    second = np.clip(change_contrast(start[None].repeat(64, 0)) * brightness, 0, 1)
    is_first, is_second = (np.abs(both - way).max(axis=1) < 1e-4 for way in (first, second))
    assert (is_first | is_second).all()
    clear = is_first != is_second
    assert clear.sum() > 20
    assert 0.25 < is_first[clear].mean() < 0.75


@pytest.mark.parametrize("turn", [0.0, 0.1, -0.3, 0.5])
def test_turning_the_hue_is_that_of_colorsys(turn):
    pixels = np.random.default_rng(0).random((30, 3))
    pixels[:4] = [[0.5, 0.5, 0.5], [0, 0, 0], [1, 1, 0], [0.2, 0.7, 0.7]]
    want = []
    for red, green, blue in pixels:
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        want.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
    got = aug.turn_hue(jnp.asarray(pixels, jnp.float32).reshape(1, 5, 6, 3), turn)
    np.testing.assert_allclose(np.asarray(got).reshape(-1, 3), want, atol=1e-5)


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param({"scale": (0.875, 1.33)}, marks=pytest.mark.slow),  # its windows: geometry_test.py
        {"crop": "area", "area": (0.3, 1.0)},
    ],
    ids=("scale", "area"),
)
def test_resized_crops_differ_between_clips_and_blur_nothing_away(mode):
    """A horizontal ramp stays one, with about even steps: antialiasing bends it a little, as in PIL."""
    ramp = jnp.broadcast_to(jnp.arange(0, 240, 10, dtype=jnp.uint8)[:, None], (8, 2, 20, 24, 3))
    config = AugmentConfig(size=(10, 12), **mode)
    got = np.asarray(run_frames(config, ramp, jax.random.key(0))) * 255
    row = got[:, 0, 5, :, 0]
    np.testing.assert_allclose(
        got[:, :, :, :, 0], np.broadcast_to(row[:, None, None], got.shape[:-1]), atol=1e-2
    )
    steps = np.diff(row, axis=1)[:, 1:-1]
    np.testing.assert_allclose(steps, steps.mean(axis=1, keepdims=True).repeat(9, 1), rtol=0.12)
    assert np.ptp(row[:, 6]) > 5
    assert np.ptp(steps.mean(axis=1)) > 1


def test_frames_smaller_than_the_crop_are_enlarged():
    config = AugmentConfig(size=(24, 24))
    got = jax.eval_shape(lambda x: augment_frames(config, x, jax.random.key(0)), frames())
    assert got.shape == (ROWS, 3, 24, 24, 3)


@pytest.mark.slow
def test_a_large_batch_is_cut_in_parts_with_the_same_result(monkeypatch):
    config = AugmentConfig(size=(6, 8))
    clips = frames(rows=5)
    run = lambda: jax.jit(lambda key: augment_frames(config, clips, key))(jax.random.key(0))  # noqa: E731
    whole = run()
    monkeypatch.setattr(aug, "_CHUNK_PIXELS", 2 * clips[0].size)
    np.testing.assert_array_equal(run(), whole)


def test_evaluation_of_the_right_size_divides_by_255_exactly():
    np.testing.assert_array_equal(evaluate(AugmentConfig(size=(12, 16)), frames()), divided(frames()))


@pytest.mark.parametrize(
    ("height", "width", "crop", "top", "left"),
    [
        (12, 16, "middle", 2, 4),
        (12, 16, 0, 2, 0),
        (12, 16, 1, 2, 4),
        (12, 16, 2, 2, 8),
        (20, 9, 0, 0, 0),
        (20, 9, 2, 12, 0),
        (8, 8, 2, 0, 0),
    ],
)
def test_evaluation_crops_along_the_longer_side(height, width, crop, top, left):
    clips = frames(rows=2, height=height, width=width)
    got = prepare_eval(AugmentConfig(size=(8, 8)), clips, crop)
    np.testing.assert_allclose(got, clips[:, :, top : top + 8, left : left + 8] / 255, rtol=1e-6)


def test_evaluation_enlarges_small_frames_until_they_cover():
    ramp = jnp.broadcast_to(jnp.arange(0, 160, 10, dtype=jnp.uint8)[:, None], (1, 1, 8, 16, 3))
    middle, right = (prepare_eval(AugmentConfig(size=(16, 16)), ramp, crop) * 255 for crop in ("middle", 2))
    np.testing.assert_allclose(middle[0, 0, 3, :, 0], np.arange(16) * 5 + 37.5, atol=1e-3)
    np.testing.assert_allclose(right[0, 0, 3, :15, 0], np.arange(15) * 5 + 77.5, atol=1e-3)


def test_luma_is_pils():
    np.testing.assert_allclose(luma(jnp.ones((1, 1, 1, 3))), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (0, 8)}, r"augment.size = \(0, 8\): must be \(height, width\), at least 1 pixel each"),
        ({"scale": (1.3, 0.8)}, r"augment.scale = \(1.3, 0.8\): must be two factors above 0, least first"),
        ({"area": (0.5, 1.5)}, r"augment.area = .* two shares in \(0, 1\]"),
        ({"aspect": (0.0, 1.0)}, r"augment.aspect = .* two ratios"),
        ({"flip": 1.5}, "augment.flip = 1.5: must be a probability, between 0 and 1"),
        ({"color_probability": -0.1}, "augment.color_probability = -0.1: must be a probability"),
        ({"cutmix_probability": 2.0}, "augment.cutmix_probability = 2.0: must be a probability"),
        ({"randaugment_layers": -1}, r"augment.randaugment_layers = -1: must be 0 \(off\) or more"),
        ({"randaugment_magnitude": 31.0}, "augment.randaugment_magnitude = 31.0: must be between 0 and 30"),
        ({"randaugment_operations": ()}, "augment.randaugment_operations = .*at least one name"),
        ({"randaugment_operations": ("rotat",)}, "unknown operation 'rotat': did you mean 'rotate'"),
        ({"hue": 0.6}, "augment.hue = 0.6: must be between 0 and 0.5"),
        ({"brightness": -1.0}, r"augment.brightness = -1.0: must be 0 \(off\) or more"),
        ({"mixup_alpha": float("nan")}, r"augment.mixup_alpha = nan: must be 0 \(off\) or more"),
        ({"label_smoothing": 1.0}, r"augment.label_smoothing = 1.0: must be in \[0, 1\)"),
        ({"repeats": 0}, "augment.repeats = 0: must be at least 1"),
        ({"crop": "random"}, "augment.crop"),
    ],
)
def test_bad_configs_are_refused(change, message, unchecked_types):
    with pytest.raises(ConfigError, match=message):
        freeze(change, AugmentConfig, "augment")


@pytest.mark.parametrize("bad", [jnp.zeros((2, 3, 8, 8, 3)), jnp.zeros((2, 8, 8, 3), jnp.uint8)])
def test_wrong_frames_are_named(bad, unchecked_types):
    message = r"frames must be uint8 \[B, T, height, width, 3\], as the loader gives them; got"
    config = AugmentConfig(size=(8, 8))
    with pytest.raises(ValueError, match=message):
        augment(config, bad, jnp.zeros(2, jnp.int32), jax.random.key(0), num_classes=3)
    with pytest.raises(ValueError, match=message):
        prepare_eval(config, bad)


def test_other_bad_arguments(unchecked_types):
    config = AugmentConfig(size=(8, 8))
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\), one per clip; got \(3,\)"):
        augment(config, frames(), jnp.zeros(3, jnp.int32), jax.random.key(0), num_classes=3)
    with pytest.raises(ValueError, match="crop = 3: must be 'middle', or 0, 1 or 2"):
        prepare_eval(config, frames(), 3)
