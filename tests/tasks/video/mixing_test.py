"""Mixup and cutmix: shares of pixels and of targets, partners, statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tasks.video import mixing

ROWS, SIZE = 201, (10, 14)  # odd: the middle clip is its own partner


def batch():
    """Clips of one value each, so that a pixel says which clip it is from; targets with smoothing."""
    frames = jnp.broadcast_to(jnp.arange(1.0, ROWS + 1).reshape(-1, 1, 1, 1, 1), (ROWS, 2, *SIZE, 3))
    return frames / 8, mixing.soft_targets(jnp.arange(ROWS) % 4, 4, 0.1)


@pytest.fixture(scope="module")
def mixed():
    """Both on, Beta(0.8, 0.8); the share of cutmix is an argument, so that one program serves all tests."""
    run = jax.jit(
        lambda key, cutmix: mixing.mix(
            *batch(), key, mixup_alpha=0.8, cutmix_alpha=0.8, cutmix_probability=cutmix
        )
    )

    def call(cutmix, key=0):
        return [np.asarray(x) for x in run(jax.random.key(key), cutmix)]

    return call


def test_soft_targets():
    got = np.asarray(mixing.soft_targets(jnp.asarray([1, 0]), 4, 0.2))
    np.testing.assert_allclose(got, [[0.05, 0.85, 0.05, 0.05], [0.85, 0.05, 0.05, 0.05]], rtol=1e-6)
    np.testing.assert_array_equal(mixing.soft_targets(jnp.asarray([2]), 3), [[0, 0, 1]])


@pytest.mark.parametrize("bad", [-1, 4])
def test_a_label_that_is_no_class_gives_nan_in_its_row_only(bad):
    got = np.asarray(mixing.soft_targets(jnp.asarray([bad, 2]), 4, 0.1))
    assert np.isnan(got[0]).all()
    assert np.isfinite(got[1]).all()


def test_nothing_is_mixed_when_both_are_off():
    frames, targets = batch()
    got = mixing.mix(frames, targets, jax.random.key(0))
    assert got[0] is frames
    assert got[1] is targets


def test_mixup_takes_the_same_share_of_pixels_and_targets(mixed):
    frames, targets = (np.asarray(x) for x in batch())
    got, soft = mixed(0.0)
    np.testing.assert_allclose(got[100], frames[100], rtol=1e-6)
    mixable = np.arange(ROWS) != 100
    first = got[mixable, 0, 0, 0, 0]
    one, other = frames[mixable, 0, 0, 0, 0], frames[::-1][mixable, 0, 0, 0, 0]
    share = np.ones(ROWS)
    share[mixable] = (first - one) / (other - one)
    mix = share.reshape(-1, 1, 1, 1, 1)
    np.testing.assert_allclose(got, (1 - mix) * frames + mix * frames[::-1], rtol=1e-4)
    want = (1 - share[:, None]) * targets + share[:, None] * targets[::-1]
    np.testing.assert_allclose(soft, want, atol=1e-4)  # the share of neighbours is known less exactly
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-6)
    # every clip its own, of Beta(0.8, 0.8)
    assert len(np.unique(share)) > 190
    assert abs(share[mixable].mean() - 0.5) < 0.07
    assert abs(share[mixable].var() - 1 / (4 * (2 * 0.8 + 1))) < 0.025


def test_cutmix_pastes_a_rectangle_and_counts_its_pixels(mixed):
    frames, targets = (np.asarray(x) for x in batch())
    got, soft = mixed(1.0)
    pasted = got != frames
    np.testing.assert_array_equal(got, np.where(pasted, frames[::-1], frames))  # exactly one or the other
    np.testing.assert_array_equal(pasted, pasted[:, :1, :, :, :1] & np.ones_like(pasted))  # in all frames
    for row in pasted[:, 0, :, :, 0]:
        lines, columns = row.any(axis=1), row.any(axis=0)
        np.testing.assert_array_equal(row, lines[:, None] & columns)
        for line in (lines, columns):  # one run
            assert np.abs(np.diff(np.concatenate([[0], line.astype(int), [0]]))).sum() <= 2
    share = pasted[:, 0, :, :, 0].mean(axis=(1, 2))[:, None]
    share[100] = 0  # its own partner, of the same class
    np.testing.assert_allclose(soft, (1 - share) * targets + share * targets[::-1], atol=1e-6)
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-6)
    assert 0.25 < share.mean() < 0.5  # half the area, less what lies outside the frame


def test_cut_box_by_hand():
    places = jnp.asarray([[0.5, 0.0], [0.5, 0.5], [0.5, 0.5]])
    got = mixing.cut_box(jnp.asarray([0.25, 0.0, 1.0]), places, (4, 8))
    want = np.zeros((3, 4, 8))
    want[0, 1:3, :2] = 1  # 2 x 4 pixels about (2, 0): two columns lie outside
    want[2] = 1
    np.testing.assert_array_equal(got, want)


def test_both_are_chosen_by_probability_and_the_key_decides(mixed):
    frames = np.asarray(batch()[0])
    got, soft = mixed(0.25)
    blended = ~((got == frames) | (got == frames[::-1])).all(axis=(1, 2, 3, 4))
    assert 0.65 < blended.mean() < 0.85
    again, other = (mixed(0.25, key) for key in (0, 1))
    np.testing.assert_array_equal(got, again[0])
    np.testing.assert_array_equal(soft, again[1])
    assert not np.array_equal(got, other[0])


def test_one_of_them_alone_is_what_every_clip_gets(monkeypatch):
    """With equal gamma variables, so that half of every clip comes from its partner."""
    monkeypatch.setattr(jax.random, "loggamma", lambda key, a, shape, dtype: jnp.zeros(shape, dtype))
    frames, targets = batch()
    alone = [{"mixup_alpha": 0.2}, {"cutmix_alpha": 0.2}]
    run = jax.jit(lambda key: [mixing.mix(frames, targets, key, **options) for options in alone])
    mixup, (cutmix, _) = run(jax.random.key(0))
    np.testing.assert_allclose(mixup[0], (frames + frames[::-1]) / 2, rtol=1e-6)
    np.testing.assert_allclose(mixup[1], (targets + targets[::-1]) / 2, rtol=1e-6)
    pasted = np.asarray(cutmix != frames)[:, 0, :, :, 0].sum(axis=(1, 2))
    assert np.all((cutmix == frames) | (cutmix == frames[::-1]))
    assert pasted.max() == 7 * 9  # sqrt(1/2) of 10 x 14 pixels, where nothing lies outside
