"""What the losses are taken over: masks, hidden points, padding, deep supervision, accumulation, a mesh."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tasks.common.mesh import MeshConfig, batch_sharding, make_mesh, put_whole_batch
from tasks.points.losses import (
    PointLossConfig,
    ReadOut,
    coordinate_cross_entropy,
    huber,
    loss_masks,
)
from tasks.points.losses import point_losses as eager_losses

# Compiled as one program: op by op each test would compile a hundred.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
point_losses = jax.jit(eager_losses, static_argnums=(2, 3, 4), compiler_options=QUICK_COMPILE)
B, Q, T, L = 2, 3, 5, 4
BINS = (8, 12)


@dataclasses.dataclass
class Output:
    tracks_yx: Any
    track_logits: Any
    visible_logits: Any
    layers: Any = None


jax.tree_util.register_dataclass(
    Output, data_fields=("tracks_yx", "track_logits", "visible_logits", "layers"), meta_fields=()
)


def read_out(rng: np.random.Generator, *lead: int) -> ReadOut:
    shape = (*lead, B, Q, T)
    return ReadOut(
        jnp.asarray(rng.uniform(0, 8, (*shape, 2)), jnp.float32),
        jnp.asarray(rng.normal(size=(*shape, sum(BINS))), jnp.float32),
        jnp.asarray(rng.normal(size=shape), jnp.float32),
    )


@pytest.fixture
def output() -> Output:
    rng = np.random.default_rng(0)
    return Output(*read_out(rng), layers=read_out(rng, L))


@pytest.fixture
def batch() -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    tracks = rng.uniform(0, 8, (B, Q, T, 2))
    visible = rng.random((B, Q, T)) < 0.6
    tracks[0, 0, 4] = (-3.0, 2.0)  # hidden because outside
    visible[0, 0, 4] = False
    query = np.concatenate([rng.integers(0, T, (B, Q, 1)), rng.uniform(0, 8, (B, Q, 2))], axis=-1)
    return {
        "tracks_yx": jnp.asarray(tracks, jnp.float32),
        "visible": jnp.asarray(visible),
        "query_tyx": jnp.asarray(query, jnp.float32),
        "valid": jnp.asarray([[True, True, False], [True, True, True]]),
    }


def masks_of(batch, **options):
    config = PointLossConfig(**options)
    return loss_masks(batch["query_tyx"], batch["tracks_yx"], batch["visible"], batch["valid"], config, BINS)


def test_frames_before_the_query_and_padding_do_not_count(batch):
    coordinate, visibility = masks_of(batch)
    for b, q, t in np.ndindex(B, Q, T):
        counts = batch["valid"][b, q] and t >= int(batch["query_tyx"][b, q, 0])
        assert visibility[b, q, t] == counts
        assert coordinate[b, q, t] == (counts and batch["visible"][b, q, t])
    everything, _ = masks_of(batch, from_query=False)
    assert (everything == (batch["valid"][..., None] & batch["visible"])).all()


def test_a_fraction_of_a_query_frame_is_dropped(batch):
    batch["query_tyx"] = batch["query_tyx"].at[..., 0].set(2.9)
    assert (masks_of(batch).visibility[1, 0] == jnp.array([0, 0, 1, 1, 1])).all()


def test_hidden_points_count_by_their_weight_inside_the_frame_only(batch):
    coordinate, _ = masks_of(batch, occluded=0.2, from_query=False)
    hidden = ~np.asarray(batch["visible"]) & np.asarray(batch["valid"])[..., None]
    outside = np.zeros_like(hidden)
    outside[0, 0, 4] = True
    assert np.allclose(np.asarray(coordinate)[hidden & ~outside], 0.2)
    assert coordinate[0, 0, 4] == 0


def test_the_total_is_what_it_says(output, batch):
    """Every part recomputed here, element by element."""
    config = PointLossConfig(layers=0.5, layer_weights=(0.1, 0.0, 0.3, 1.0), final=2.0, occluded=0.2)
    loss, aux = point_losses(output, batch, config, BINS)
    coordinate, visibility = (np.asarray(m, np.float64) for m in masks_of(batch, occluded=0.2))
    target = batch["tracks_yx"]

    def one(tracks, logits, visible_logits):
        log_p = np.log(1 / (1 + np.exp(-np.asarray(visible_logits, np.float64) * (2 * batch["visible"] - 1))))
        by = (
            np.asarray(huber(tracks, target, BINS)),
            np.asarray(coordinate_cross_entropy(logits, target, BINS)),
        )
        parts = [np.sum(value * coordinate) / coordinate.sum() for value in by]
        return 0.1 * parts[0] + parts[1] - np.sum(log_p * visibility) / visibility.sum()

    expected = 2.0 * one(output.tracks_yx, output.track_logits, output.visible_logits)
    for layer, weight in enumerate(config.layer_weights):
        expected += weight * one(*(field[layer] for field in output.layers))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert aux["weight"] == pytest.approx(coordinate.sum())
    assert aux.keys() == {
        "huber", "coordinate", "visibility", "layers", "delta_avg", "occlusion_accuracy", "weight",
    }  # fmt: skip


def test_blocks_read_one_at_a_time_give_the_same(output, batch):
    """The features here are a scale of the read-outs, so that there is something to differentiate."""
    config = PointLossConfig()

    def loss_of(scale, one_at_a_time):
        scaled = jax.tree.map(lambda x: x * scale, output)
        if one_at_a_time:
            scaled.layers = (scale * jnp.ones(L), output.layers)
            return eager_losses(
                scaled, batch, config, BINS, lambda f: jax.tree.map(lambda x: x * f[0], f[1])
            )[0]
        return eager_losses(scaled, batch, config, BINS)[0]

    grad = jax.jit(jax.value_and_grad(loss_of), static_argnums=1, compiler_options=QUICK_COMPILE)
    (whole, d_whole), (single, d_single) = grad(jnp.float32(1.1), False), grad(jnp.float32(1.1), True)
    assert single == pytest.approx(float(whole), rel=1e-6)
    assert d_single == pytest.approx(float(d_whole), rel=1e-5)


def test_unknown_truth_does_not_reach_gradients(output, batch):
    visible = batch["visible"]
    known = batch["tracks_yx"]
    batch["tracks_yx"] = jnp.where(visible[..., None], known, jnp.nan)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    @jax.grad
    def gradient(output, batch):
        return eager_losses(output, batch, PointLossConfig(), BINS)[0]

    with_nan = gradient(output, batch)
    without = gradient(output, batch | {"tracks_yx": known})
    for found, expected in zip(jax.tree.leaves(with_nan), jax.tree.leaves(without), strict=True):
        assert jnp.isfinite(found).all()
        np.testing.assert_array_equal(found, expected)


def test_nothing_visible_is_a_loss_of_visibility_alone(output, batch):
    batch["visible"] = jnp.zeros_like(batch["visible"])
    loss, aux = point_losses(output, batch, PointLossConfig(layers=0), BINS)
    assert loss == pytest.approx(float(aux["visibility"][0] / aux["visibility"][1]))
    assert aux["weight"] == 0
    nobody = batch | {"valid": jnp.zeros((B, Q), bool)}
    assert point_losses(output, nobody, PointLossConfig(), BINS)[0] == 0


def test_micro_batches_add_up_to_the_batch(output, batch):
    """normalize="values": sum of weight x loss over rows, divided by the weights."""
    config = PointLossConfig(normalize="values", occluded=0.2)
    whole, aux = point_losses(output, batch, config, BINS)
    rows = []
    for b in range(B):
        row = jax.tree.map(lambda x: x[b : b + 1], output)  # noqa: B023
        row.layers = jax.tree.map(lambda x: x[:, b : b + 1], output.layers)  # noqa: B023
        rows.append(point_losses(row, {k: v[b : b + 1] for k, v in batch.items()}, config, BINS))
    total = sum(part["weight"] for _, part in rows)
    assert aux["weight"] == total
    assert sum(loss * part["weight"] for loss, part in rows) / total == pytest.approx(float(whole), rel=1e-6)


def test_a_mesh_gives_the_same(output, batch):
    config = PointLossConfig()
    expected, _ = point_losses(output, batch, config, BINS)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        placed = put_whole_batch({k: np.asarray(v) for k, v in batch.items()}, mesh)
        on_mesh = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), output)
        by_clip = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))
        on_mesh.layers = jax.tree.map(lambda x: jax.device_put(x, by_clip), output.layers)
        loss, _ = point_losses(on_mesh, placed, config, BINS)
    assert loss == pytest.approx(float(expected), rel=1e-6)


def test_training_metrics(output, batch):
    exact = Output(
        jnp.where(batch["visible"][..., None], batch["tracks_yx"], 0.0),
        *read_out(np.random.default_rng(2))[1:],
    )
    exact.visible_logits = jnp.where(batch["visible"], 3.0, -3.0)
    _, aux = point_losses(exact, batch, PointLossConfig(layers=0), BINS)
    assert aux["delta_avg"][0] == aux["delta_avg"][1] > 0
    assert aux["occlusion_accuracy"][0] == aux["occlusion_accuracy"][1]
    # 3 pixels of a frame 256 wide: within 4, 8 and 16.
    exact.tracks_yx = exact.tracks_yx + jnp.array([0.0, 3.0 * BINS[1] / 256])
    _, aux = point_losses(exact, batch, PointLossConfig(layers=0), BINS)
    assert aux["delta_avg"][0] / aux["delta_avg"][1] == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"huber": -1.0}, r"huber = -1\.0: must be a finite number from 0 on"),
        ({"occluded": float("nan")}, "occluded = nan"),
        ({"layer_weights": (1.0, -2.0)}, r"layer_weights\[1\] = -2\.0"),
        ({"huber": 0.0, "coordinate": 0.0, "visibility": 0.0}, "nothing would be learnt"),
        ({"final": 0.0, "layers": 0.0}, "nothing would be learnt"),
        ({"normalize": "sum"}, "normalize = 'sum'"),
    ],
)
def test_bad_settings_are_refused(unchecked_types, options, message):
    with pytest.raises(ValueError, match=message):
        PointLossConfig(**options)


def test_what_does_not_fit_the_model_is_refused(output, batch):
    with pytest.raises(ValueError, match="2 layer_weights for a model of 4 blocks"):
        eager_losses(output, batch, PointLossConfig(layer_weights=(1.0, 1.0)), BINS)
    output.layers = None
    with pytest.raises(ValueError, match="read-outs of every block, which the output lacks"):
        eager_losses(output, batch, PointLossConfig(), BINS)
    with pytest.raises(ValueError, match=r"20 coordinate logits; 8 \+ 8 bins"):
        coordinate_cross_entropy(output.track_logits, batch["tracks_yx"], (8, 8))
