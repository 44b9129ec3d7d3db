"""Soft cross-entropy and masked auto-encoding against NumPy, the shared training step, and a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.trecvit import MAEConfig, TRecViTConfig
from tasks.common.errors import ConfigError
from tasks.common.optim import OptimConfig, make_optimizer
from tasks.common.state import TrainState
from tasks.common.step import make_train_step
from tasks.video import losses
from tasks.video.augment import AugmentConfig, augment, augment_frames
from tasks.video.mixing import soft_targets

KEY = jax.random.key(0)
CLASSES = 7


def scores(seed=0, rows=6, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(size=(rows, CLASSES)) * 3, dtype)
    targets = rng.random((rows, CLASSES)).astype(np.float32)
    return logits, jnp.asarray(targets / targets.sum(axis=1, keepdims=True))


row_scores = jax.jit(losses.classification_scores)
loss_and_gradient = jax.jit(jax.value_and_grad(losses.classification_loss, has_aux=True))


def plain(logits, targets):
    logits = np.asarray(logits, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -(np.asarray(targets, np.float64) * log_probs).sum(axis=1)


def test_value_gradient_and_sums_are_those_of_numpy():
    logits, targets = scores()
    (loss, aux), gradient = loss_and_gradient(logits, targets)
    np.testing.assert_allclose(loss, plain(logits, targets).mean(), rtol=1e-6)
    np.testing.assert_allclose(aux["loss"], (plain(logits, targets).sum(), 6), rtol=1e-6)
    np.testing.assert_allclose(gradient, (jax.nn.softmax(logits) - targets) / 6, atol=1e-6)
    order = np.argsort(-np.asarray(logits), axis=1)
    label = np.asarray(targets).argmax(axis=1)
    for k in (1, 5):
        hits = (order[:, :k] == label[:, None]).any(axis=1).sum()
        np.testing.assert_array_equal(aux[f"top{k}"], (hits, 6))
    assert aux["weight"] == 6


def test_bfloat16_logits_are_computed_in_float32():
    logits, targets = scores(dtype=jnp.bfloat16)
    (loss, aux), gradient = loss_and_gradient(logits, targets)
    assert loss.dtype == jnp.float32
    assert aux["loss"][0].dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, plain(logits.astype(jnp.float32), targets).mean(), rtol=1e-6)


def test_ranks_by_hand():
    logits = jnp.asarray([[9.0, 8, 7, 6, 5, 4, 3]]).repeat(7, axis=0)
    got = row_scores(logits, jnp.eye(7))
    np.testing.assert_array_equal(got.top1, [1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(got.top5, [1, 1, 1, 1, 1, 0, 0])


def test_equal_logits_are_right_once_in_as_many_classes_and_nan_never():
    targets = jnp.eye(7)
    got = row_scores(jnp.zeros((7, 7)), targets)
    assert got.top1.sum() == 1
    assert got.top5.sum() == 5
    np.testing.assert_allclose(got.loss, np.log(7), rtol=1e-6)
    got = row_scores(jnp.full((7, 7), jnp.nan), targets)
    assert got.top1.sum() == 0
    assert got.top5.sum() == 0


def test_a_target_of_zero_ignores_a_logit_of_minus_infinity():
    got = row_scores(jnp.asarray([[0.0, -jnp.inf, 0.0]]), jnp.asarray([[0.5, 0.0, 0.5]]))
    np.testing.assert_allclose(got.loss, [np.log(2)], rtol=1e-6)


def test_rows_that_are_not_valid_do_not_count():
    logits, targets = scores()
    logits = logits.at[2].set(jnp.nan)
    valid = jnp.asarray([True, True, False, True, False, True])
    run = jax.jit(losses.classification_loss)
    loss, aux = run(logits, targets, valid)
    np.testing.assert_allclose(loss, plain(logits, targets)[np.asarray(valid)].mean(), rtol=1e-6)
    assert aux["weight"] == 4
    loss, aux = run(logits, targets, jnp.zeros(6, bool))
    assert loss == 0
    assert aux["top1"][1] == 0


def test_a_label_that_is_no_class_makes_the_loss_nan():
    logits, _ = scores()
    labels = jnp.asarray([0, 1, 2, 3, 4, CLASSES])
    (loss, _), _ = loss_and_gradient(logits, soft_targets(labels, CLASSES, 0.1))
    assert np.isnan(loss)


AUGMENT = AugmentConfig(size=(8, 8), flip=0.5, label_smoothing=0.1, repeats=2)


def batch(rows=4):
    rng = np.random.default_rng(0)
    return {
        "frames": rng.integers(0, 256, (rows, 3, 10, 12, 3), np.uint8),
        "label": (np.arange(rows) % CLASSES).astype(np.int32),
        "clip": np.arange(rows, dtype=np.int32),
    }


def linear(params, frames, rng, is_training):
    assert is_training
    features = frames.astype(jnp.bfloat16).mean(axis=1).reshape(frames.shape[0], -1)
    noise = jax.random.normal(rng, (), jnp.float32)
    return features @ params["w"].astype(jnp.bfloat16) + (noise * 0.1).astype(jnp.bfloat16)


def weights():
    return {"w": jnp.asarray(np.random.default_rng(1).normal(size=(192, CLASSES)) * 0.1, jnp.float32)}


def test_the_training_loss_is_the_loss_of_the_augmented_batch():
    data = jax.tree.map(jnp.asarray, batch())
    loss_fn = losses.video_loss_fn(linear, AUGMENT, CLASSES)

    augment_key, model_key = jax.random.split(KEY)
    augmented = jax.jit(augment, static_argnames=("config", "num_classes"))
    rows = augmented(AUGMENT, data["frames"], data["label"], augment_key, num_classes=CLASSES)
    logits = linear(weights(), rows.frames, model_key, True)
    (loss, aux), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(weights(), data, KEY)
    np.testing.assert_allclose(
        loss, plain(logits.astype(jnp.float32), rows.targets).mean(), rtol=1e-2
    )  # bf16
    assert aux["weight"] == 8
    assert np.isfinite(gradient["w"]).all()
    assert np.any(gradient["w"])


def train(loss_fn, params, data, steps=3, lr=1e-2, **options):
    optimizer = make_optimizer(OptimConfig(peak_lr=lr, total=10, weight_decay=0.0))
    step = make_train_step(loss_fn, optimizer, seed=0, **options)
    state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))
    history = []
    for _ in range(steps):
        state, metrics = step(state, jax.tree.map(lambda x: x[None], data), jnp.float32(lr))
        history.append({name: float(value) for name, value in metrics.items()})
    return history


def test_the_shared_step_trains_on_it():
    config = AugmentConfig(size=(10, 12))

    def classify(params, frames, rng, is_training):
        return frames.mean(axis=1).reshape(frames.shape[0], -1) @ params["w"]

    params = {"w": jnp.zeros((360, CLASSES))}
    history = train(losses.video_loss_fn(classify, config, CLASSES), params, batch())
    np.testing.assert_allclose(history[0]["loss"], np.log(CLASSES), rtol=1e-5)
    assert history[2]["loss"] < history[1]["loss"] < history[0]["loss"]
    assert {"top1", "top5"} <= history[0].keys()


def test_wrong_use_is_named():
    with pytest.raises(ConfigError, match="num_classes = 0: must be at least 1"):
        losses.video_loss_fn(linear, AUGMENT, 0)
    loss_fn = losses.video_loss_fn(linear, AugmentConfig(size=(8, 8)), CLASSES + 1)
    with pytest.raises(ValueError, match=r"logits of shape \(4, 7\); 8 classes and 4 clips need \(4, 8\)"):
        jax.eval_shape(loss_fn, weights(), batch(), KEY)


@pytest.mark.parametrize(("tokens", "ratio", "hidden"), [(196, 0.9, 176), (7, 0.3, 2)])
def test_masks_hide_exactly_as_many_tubes_as_asked(tokens, ratio, hidden):

    @jax.jit
    def draw(key):
        masked = losses.tube_mask(key, 50, tokens, ratio)
        return masked, losses.visible_tubes(masked, tokens - hidden)

    masked, kept = map(np.asarray, draw(KEY))
    assert losses.masked_count(tokens, ratio) == hidden
    np.testing.assert_array_equal(masked.sum(axis=1), hidden)
    assert len({row.tobytes() for row in masked}) > 10
    spread = masked.mean(axis=0)
    assert abs(spread - hidden / tokens).max() < 0.35  # no place is favoured
    assert kept.dtype == np.int32
    for row, mask in zip(kept, masked, strict=True):
        np.testing.assert_array_equal(row, np.flatnonzero(~mask))


def test_masks_count_as_the_model_does():
    config = MAEConfig(encoder=TRecViTConfig(head="none"), mask_ratio=0.9)
    tokens = config.encoder.num_patches
    assert tokens - losses.masked_count(tokens, 0.9) == config.num_kept


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0.0, "mask_ratio = 0.0: must be between 0 and 1"),
        (1.0, "mask_ratio = 1.0: must be between"),
        (0.1, "mask_ratio = 0.1 masks 0 of 4 tubes: at least one must be masked and one kept"),
    ],
)
def test_bad_mask_ratios(ratio, message):
    with pytest.raises(ConfigError, match=message):
        losses.tube_mask(KEY, 2, 4, ratio)


PATCH = (4, 2)


def mae_problem(rows=3):
    rng = np.random.default_rng(0)
    frames = rng.random((rows, 2, 8, 6, 3)).astype(np.float32)
    return frames, rng.normal(size=(rows, 2, 6, 24)).astype(np.float32), rng.random((rows, 6)) < 0.6


@pytest.mark.parametrize(("on", "normalize"), [("masked", True), ("all", False)])
def test_mae_loss_is_numpys(on, normalize):
    frames, predictions, masked = mae_problem()
    total, count = 0.0, 0
    for clip in range(3):
        for patch in range(6):
            if on == "masked" and not masked[clip, patch]:
                continue
            row, column = divmod(patch, 3)
            for t in range(2):
                pixels = frames[clip, t, row * 4 : row * 4 + 4, column * 2 : column * 2 + 2].astype(
                    np.float64
                )
                if normalize:  # per patch and colour, as VideoMAE
                    pixels = (pixels - pixels.mean(axis=(0, 1))) / (pixels.std(axis=(0, 1), ddof=1) + 1e-6)
                total += np.mean((predictions[clip, t, patch] - pixels.ravel()) ** 2)
                count += 1
    got, aux = jax.jit(lambda *a: losses.mae_loss(*a, patch_size=PATCH, normalize=normalize, on=on))(
        predictions, frames, masked
    )
    np.testing.assert_allclose(got, total / count, rtol=1e-5)
    np.testing.assert_allclose(aux["loss"], (total, count), rtol=1e-5)
    assert aux["weight"] == count


@pytest.mark.parametrize("on", ["masked", "all"])
def test_mae_loss_of_changes_is_numpys_and_asks_nothing_of_the_first_frame(on):
    frames, predictions, masked = mae_problem()
    given, hidden = jnp.asarray(frames), jnp.asarray(masked)

    def loss(predictions):
        return losses.mae_loss(predictions, given, hidden, patch_size=PATCH, on=on, target="change")

    (got, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(predictions))
    cells = frames.reshape(3, 2, 2, 4, 3, 2, 3).swapaxes(3, 4).reshape(3, 2, 6, 24)
    errors = np.square(predictions[:, 1] - 4 * (cells[:, 1] - cells[:, 0])).mean(axis=-1)
    counted = masked if on == "masked" else np.ones_like(masked)
    np.testing.assert_allclose(got, errors[counted].mean(), rtol=1e-5)
    assert aux["weight"] == counted.sum()
    np.testing.assert_array_equal(np.any(gradient, axis=-1)[:, 1], counted)
    assert not np.any(gradient[:, 0])


def test_mae_loss_has_a_finite_gradient_on_flat_patches_only_where_masked():
    _, predictions, masked = mae_problem()
    flat = jnp.full((3, 2, 8, 6, 3), 0.5)
    gradient = jax.jit(
        jax.grad(lambda p: losses.mae_loss(p, flat, jnp.asarray(masked), patch_size=PATCH)[0])
    )(jnp.asarray(predictions, jnp.bfloat16))
    gradient = np.asarray(gradient, np.float32)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient.any(axis=(1, 3)), masked)


def test_mae_training_hides_from_the_encoder_what_it_is_judged_on():
    """A model that copies what it may see and says nothing of the rest pays for the hidden patches only."""
    config = AugmentConfig(size=(8, 6), flip=0.5)
    data = {"frames": jnp.asarray(batch()["frames"])}

    def reconstruct(params, frames, kept, rng, is_training):
        truth = losses.pixel_targets(frames, PATCH)
        seen = jnp.any(kept[:, :, None] == jnp.arange(6), axis=1)
        return jnp.where(seen[:, None, :, None], truth, params["fill"])

    options = {"patch_size": PATCH, "mask_ratio": 0.5}
    run = [losses.mae_loss_fn(reconstruct, config, on=on, **options) for on in ("masked", "all")]
    masked, whole = jax.jit(lambda *a: [loss_fn(*a) for loss_fn in run])(
        {"fill": jnp.float32(0.0)}, data, KEY
    )
    # Standardised pixels: the mean square is (n - 1) / n for patches of n pixels.
    np.testing.assert_allclose(masked[0], 7 / 8, rtol=1e-3)
    np.testing.assert_allclose(whole[0], 7 / 16, rtol=1e-3)
    assert masked[1]["weight"] == 4 * 3 * 3
    assert whole[1]["weight"] == 4 * 3 * 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixup_alpha": 0.8}, "augment.mixup_alpha = 0.8: must be 0 for masked auto-encoding"),
        ({"label_smoothing": 0.1}, "augment.label_smoothing = 0.1: must be 0 for masked"),
        ({"size": (10, 6)}, r"augment.size = \(10, 6\): must be a multiple of the patch size \(4, 2\)"),
    ],
)
def test_bad_mae_configs(change, message):
    config = AugmentConfig(**{"size": (8, 6), **change})
    with pytest.raises(ConfigError, match=message):
        losses.mae_loss_fn(lambda *a, **k: None, config, patch_size=PATCH)


def test_bad_mae_arguments(unchecked_types):
    frames, predictions, masked = map(jnp.asarray, mae_problem())
    with pytest.raises(
        ValueError, match=r"predictions have shape \(3, 2, 5, 24\); the patches \(3, 2, 6, 24\)"
    ):
        losses.mae_loss(predictions[:, :, 1:], frames, masked, patch_size=PATCH)
    with pytest.raises(ValueError, match="on = 'some': must be 'masked' or 'all'"):
        losses.mae_loss(predictions, frames, masked, patch_size=PATCH, on="some")
    with pytest.raises(ValueError, match="target = 'motion': must be 'pixels' or 'change'"):
        losses.mae_loss(predictions, frames, masked, patch_size=PATCH, target="motion")
    with pytest.raises(ValueError, match="video has 1 frame"):
        losses.mae_loss(predictions[:, :1], frames[:, :1], masked, patch_size=PATCH, target="change")


MESH_PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from tasks.video import losses
from tasks.video.augment import AugmentConfig, augment, prepare_eval

rng = np.random.default_rng(0)
batch = {
    "frames": rng.integers(0, 256, (16, 2, 10, 12, 3), np.uint8),
    "label": (np.arange(16) % 7).astype(np.int32),
}
config = AugmentConfig(
    size=(8, 8), scale=(0.9, 1.2), flip=0.5, randaugment_layers=1, color_probability=0.5, mixup_alpha=0.8,
    randaugment_operations=("rotate", "equalize"), cutmix_alpha=1.0, label_smoothing=0.1, repeats=2,
)
plain = AugmentConfig(size=(8, 8), flip=0.5)
params = {"w": rng.normal(size=(192, 7)).astype(np.float32)}

def classify(params, frames, rng, is_training):
    w = params["w"] if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(params["w"], P())
    return frames.mean(axis=1).reshape(frames.shape[0], -1) @ w

def reconstruct(params, frames, kept, rng, is_training):
    return losses.pixel_targets(frames, (4, 4)) * 0.5

def everything(params, batch, key):
    loss = losses.video_loss_fn(classify, config, 7)
    mae = losses.mae_loss_fn(reconstruct, plain, patch_size=(4, 4), mask_ratio=0.5)
    return (
        augment(config, batch["frames"], batch["label"], key, num_classes=7),
        jax.value_and_grad(loss, has_aux=True)(params, batch, key),
        mae(params, batch, key),
        prepare_eval(plain, batch["frames"], 2),
    )

expected = jax.device_get(jax.jit(everything)(params, batch, jax.random.key(3)))
mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
with jax.set_mesh(mesh):
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    spread = jax.tree.map(lambda x: jax.device_put(x, rows), batch)
    weights = jax.device_put(params, NamedSharding(mesh, P("fsdp")))
    got = jax.jit(everything)(weights, spread, jax.random.key(3))
    assert got[0].frames.sharding.spec[0] == ("data", "fsdp"), got[0].frames.sharding
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
jax.tree.map(close, jax.device_get(got), expected)
print("equal on 8 devices")
"""


@pytest.mark.slow
def test_equal_on_a_mesh_of_eight_devices(run_python):
    assert "equal on 8 devices" in run_python("-c", MESH_PROGRAM, devices=8).stdout


def test_mae_frames_are_augmented_without_labels():
    got = jax.eval_shape(lambda f: augment_frames(AugmentConfig(size=(8, 6)), f, KEY), batch()["frames"])
    assert got.shape == (4, 3, 8, 6, 3)
