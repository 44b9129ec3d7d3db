"""Masked auto-encoder: masks, targets, what the encoder may see, and its encoder as a model of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.params import flatten_names
from models.common.vit import unpatchify
from models.trecvit import (
    MAEConfig,
    TRecViTConfig,
    TRecViTRuntime,
    apply_mae,
    change_targets,
    draw_kept_tubes,
    mae_param_specs,
    masked_patches,
    param_specs,
    pixel_targets,
)
from tests.models.trecvit.small_trecvit import kept_tubes, random_params, run_mae, small, small_mae, video

RUNTIME = TRecViTRuntime()
MAE = small_mae()


def test_a_tenth_of_the_tubes_is_kept():
    config = MAEConfig()
    kept = draw_kept_tubes(config, jax.random.key(0), 3)
    assert kept.shape == (3, config.num_kept) == (3, 196 - 176)
    for row in np.asarray(kept):
        assert (np.diff(row) > 0).all()
        assert 0 <= row.min() <= row.max() < 196
    assert (np.asarray(kept[0]) != np.asarray(kept[1])).any()
    mask = masked_patches(kept, 196)
    np.testing.assert_array_equal(mask.sum(axis=1), 176)
    assert not np.take_along_axis(np.asarray(mask), np.asarray(kept), axis=1).any()


def test_decoder_has_the_sizes_of_videomae():
    decoder = MAEConfig().decoder
    assert (decoder.width, decoder.depth, decoder.num_heads, decoder.mlp_size) == (384, 4, 6, 1536)
    assert (decoder.positions, decoder.num_tokens) == ("sincos2d", 196)


def test_predictions_depend_on_kept_tubes_only():
    kept = kept_tubes(MAE, 2)
    params, x = random_params(MAE), video(2, 3)
    pixels, state = run_mae(MAE, RUNTIME, params, x, kept)
    assert state is None
    assert pixels.shape == (2, 3, 6, 48)
    hidden = masked_patches(kept, 6)
    noise = jnp.where(hidden[:, None, :, None], 1.0, 0.0) * jnp.ones((2, 3, 6, 48))
    other, _ = run_mae(MAE, RUNTIME, params, x + unpatchify(noise, (2, 3), (4, 4)), kept)
    np.testing.assert_array_equal(other, pixels)
    seen, _ = run_mae(MAE, RUNTIME, params, x.at[:, 0].add(unpatchify(1 - noise, (2, 3), (4, 4))[:, 0]), kept)
    change = np.abs(np.asarray(seen - pixels)).max(axis=(2, 3))
    assert (change > 1e-3).all(), "a kept patch of the first frame matters to every frame after it"
    later, _ = run_mae(MAE, RUNTIME, params, x.at[:, 2].add(0.5), kept)
    np.testing.assert_allclose(later[:, :2], pixels[:, :2], atol=1e-6)


def test_predictions_are_in_the_places_of_their_patches():
    """The order of the kept tubes means nothing."""
    kept = kept_tubes(MAE, 1)
    params, x = random_params(MAE), video(1, 2)
    straight, _ = run_mae(MAE, RUNTIME, params, x, kept)
    turned, _ = run_mae(MAE, RUNTIME, params, x, kept[:, ::-1])
    np.testing.assert_allclose(turned, straight, atol=2e-5)


def test_targets_are_normalised_per_patch_and_colour():
    x = video(1, 2)
    plain, targets = pixel_targets(x, (4, 4), normalize=False), pixel_targets(x, (4, 4))
    patch = np.asarray(x[0, 1, 4:8, 8:12], np.float64)
    np.testing.assert_allclose(plain[0, 1, 5], patch.reshape(-1), atol=1e-6)
    expected = (patch - patch.mean((0, 1))) / (patch.std((0, 1), ddof=1) + 1e-6)
    np.testing.assert_allclose(targets[0, 1, 5], expected.reshape(-1), atol=2e-5)


def test_changes_are_from_the_frame_before_and_vanish_where_nothing_moves():
    x = jnp.asarray(np.random.default_rng(1).integers(0, 256, (2, 3, 8, 12, 3)), jnp.uint8)
    x = x.at[:, 2].set(x[:, 1])
    changes = change_targets(x, (4, 4))
    assert (changes.shape, changes.dtype) == ((2, 2, 6, 48), jnp.float32)
    frames = np.asarray(x, np.float64) / 255
    expected = 4 * (frames[1, 1, 4:8, 8:12] - frames[1, 0, 4:8, 8:12])
    np.testing.assert_allclose(changes[1, 0, 5], expected.reshape(-1), atol=1e-6)
    assert not changes[:, 1].any()
    with pytest.raises(ValueError, match="video has 1 frame: what changes needs at least two"):
        change_targets(x[:, :1], (4, 4))


def test_the_encoder_is_a_model_of_its_own():
    own = {name.removeprefix("encoder/") for name in mae_param_specs(MAE) if name.startswith("encoder/")}
    assert own == set(param_specs(MAE.encoder)) == set(flatten_names(random_params(MAE)["encoder"]))


def test_clear_errors(unchecked_types):
    with pytest.raises(ValueError, match=r"encoder\.head = 'classes'; it must be 'none'"):
        MAEConfig(encoder=TRecViTConfig())
    with pytest.raises(ValueError, match=r"mask_ratio = 1\.0; it must be between 0 and 1"):
        MAEConfig(mask_ratio=1.0)
    with pytest.raises(
        ValueError, match=r"decoder of MAEConfig: num_heads = 5; it must be a divisor of width"
    ):
        MAEConfig(decoder_heads=5)
    with pytest.raises(ValueError, match=r"kept has shape \(1, 3\); it must be \(1, 2\)"):
        apply_mae(MAE, RUNTIME, random_params(MAE), video(1, 2), jnp.zeros((1, 3), jnp.int32))
    with pytest.raises(ValueError, match="not those of this MAEConfig"):
        apply_mae(MAE, RUNTIME, random_params(small()), video(1, 2), kept_tubes(MAE, 1))
