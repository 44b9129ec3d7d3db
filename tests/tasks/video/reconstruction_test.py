"""What an auto-encoder is judged on and what its pictures show, against its predictions by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.trecvit import get_config
from models import trecvit
from tasks.common.config import with_defaults
from tasks.common.mesh import MeshConfig, make_mesh
from tasks.video.augment import AugmentConfig
from tasks.video.config import SCHEMA, MAETrainConfig, freeze_all
from tasks.video.reconstruction import Painter
from tests.models.trecvit.small_trecvit import random_params, run_mae, small

ENCODER = small(head="none")
RUNTIME = trecvit.TRecViTRuntime()
CHANGE = MAETrainConfig(mask_ratio=0.67, decoder_width=8, decoder_depth=1, target="change", normalize=False)
CLIPS, FRAMES = 2, 3


def cells(frames: Any) -> np.ndarray:
    """[..., 8, 12, 3] pixels as [..., 6 patches, 48]."""
    x = np.asarray(frames, np.float64)
    return x.reshape(*x.shape[:-3], 2, 4, 3, 4, 3).swapaxes(-4, -3).reshape(*x.shape[:-3], 6, 48)


@pytest.fixture(scope="module")
def painted() -> tuple[Painter, Any, dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """A painter of changes, parameters, clips, which patches are hidden, and what the model says."""
    mae = CHANGE.model(ENCODER)
    params = random_params(mae)
    draw = np.random.default_rng(0)
    batch = {
        "frames": draw.integers(0, 256, (CLIPS, FRAMES, 8, 12, 3)).astype(np.uint8),
        "clip": np.arange(CLIPS, dtype=np.int32),
        "valid": np.array([True, False]),
    }
    keys = [jax.random.fold_in(jax.random.key(0), clip) for clip in range(CLIPS)]
    kept = jnp.concatenate([trecvit.draw_kept_tubes(mae, key, 1) for key in keys])
    said, _ = run_mae(mae, RUNTIME, params, jnp.asarray(batch["frames"]), kept)
    painter = Painter(mae, RUNTIME, AugmentConfig(size=(8, 12)), CHANGE, make_mesh(MeshConfig()), CLIPS)
    hidden = np.asarray(trecvit.masked_patches(kept, 6))
    return painter, params, batch, hidden, np.asarray(said, np.float64)


def test_the_held_out_loss_of_changes_is_of_hidden_patches_that_have_a_frame_before(painted) -> None:
    painter, params, batch, hidden, said = painted
    truth = cells(batch["frames"] / 255)
    errors = np.square(said[:, 1:] - 4 * np.diff(truth, axis=1)).mean(axis=-1)
    total, count = painter.losses(params, batch)
    assert count == hidden[0].sum() * (FRAMES - 1)  # the second clip cannot be read
    assert total == pytest.approx(errors[0][:, hidden[0]].sum(), rel=1e-4)


def test_pictures_of_changes_are_the_frame_before_plus_the_change(painted) -> None:
    painter, params, batch, hidden, said = painted
    truth, seen, picture = painter.pictures(params, batch)
    np.testing.assert_array_equal(truth, batch["frames"])
    grey = hidden[:, None, :, None]
    np.testing.assert_array_equal(cells(seen), np.where(grey, 128, cells(truth)))
    np.testing.assert_array_equal(picture[:, 0], seen[:, 0])
    changed = np.clip(cells(truth[:, :-1] / 255) + said[:, 1:] / 4, 0, 1) * 255
    np.testing.assert_allclose(cells(picture[:, 1:]), np.where(grey, changed, cells(truth[:, 1:])), atol=0.51)


def test_the_papers_recipe_paints_pixels_and_the_generated_clips_changes() -> None:
    def settings(args: str) -> MAETrainConfig:
        return freeze_all(with_defaults(get_config(args), SCHEMA)).mae

    paper = settings("objective=mae,data=kinetics,path=k400")
    assert paper == MAETrainConfig()
    assert (paper.mask_ratio, paper.target, paper.normalize) == (0.9, "pixels", True)
    generated = settings("objective=mae")
    assert dataclasses.replace(paper, target="change", normalize=False, painted="all") == dataclasses.replace(
        generated, mask_ratio=0.9, decoder_depth=4
    )
