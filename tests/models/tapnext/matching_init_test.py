"""The matching initialisation: the official one's parameters, and attention that finds points untrained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from models.common.layers import linear
from models.common.params import ParamSpec, flatten_names, unflatten_names
from models.common.rglru import frame_positions, residual_block
from models.common.shapes import Params
from models.common.vit import layer_norm
from models.tapnext import (
    TAPNextConfig,
    TAPNextRuntime,
    init_matching_params,
    make_queries,
    param_specs,
)
from models.tapnext.matching_init import assign_channels, cosines, with_matching
from models.tapnext.model import block, image_tokens
from models.tapnext.queries import point_tokens
from tests.models.tapnext.small_tapnext import QUICK_COMPILE

CONFIG = TAPNextConfig(
    image_size=(64, 64), patch_size=(4, 4), width=128, depth=2, mlp_size=32, num_heads=4, head_width=16
)
QUERIES, FRAMES, STEP, SIDE = 32, 4, 8, 64


@functools.cache
def official() -> Params:
    """Drawn by NumPy, as `init_params` does: compiling that takes longer."""
    draw = np.random.default_rng(0)

    def value(spec: ParamSpec) -> Array:
        match spec.init.kind:
            case "zeros" | "ones":
                values = np.full(spec.shape, float(spec.init.kind == "ones"))
            case "uniform":
                values = draw.uniform(spec.init.low, spec.init.high, spec.shape)
            case "custom":  # the recurrence's radii
                values = np.log(1 / draw.uniform(0.9, 0.999, spec.shape) - 1)
            case _:
                values = spec.init.high * draw.standard_normal(spec.shape)
        return jnp.asarray(values, jnp.float32)

    return unflatten_names({name: value(spec) for name, spec in param_specs(CONFIG).items()})


@functools.cache
def params() -> Params:
    return with_matching(CONFIG, official())


def moving_colours() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Waves of red, green and blue in three directions, that move down and to the right by 8 pixels a frame;
    points asked for in frame 0 at places that stay in the picture; their tracks [Q, T, 2]."""
    place = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), -1) + 0.5
    directions = np.array([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]])
    frames = []
    for frame in range(FRAMES):
        waves = np.sin(2 * np.pi / 90 * (place - STEP * frame) @ directions.T + np.arange(3))
        frames.append(127.5 + 60 * waves)
    start = np.random.default_rng(0).uniform(4, SIDE - STEP * FRAMES, (QUERIES, 2))
    tracks = start[:, None] + STEP * np.arange(FRAMES)[:, None]
    query = np.concatenate([np.zeros((QUERIES, 1)), start], axis=1).astype(np.float32)
    return np.stack(frames).astype(np.uint8), query, tracks


def looked_at(values: Params, layer: int, head: int) -> np.ndarray:
    """[Q, T, 2]: the middle of what each point's token attends to among the image's."""

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def attention(values: Params, video: Array, query: Array) -> Array:
        runtime = TAPNextRuntime()
        positions = frame_positions(video, None, None)
        image = image_tokens(CONFIG, runtime, values["image"], video)
        points = point_tokens(CONFIG, values["points"], make_queries(query), positions)
        x = jnp.concatenate([image, points], axis=2)
        for before in range(layer):
            x = block(CONFIG, runtime, values["layers"][str(before)], x, positions)[0]
        group = values["layers"][str(layer)]
        normed = layer_norm(residual_block(x, group, positions)[0], group["attn_norm"])
        part = slice(head * 32, (head + 1) * 32)
        q, k = (linear(normed, group["attn"][name], jnp.float32)[..., part] for name in ("q_proj", "k_proj"))
        return jax.nn.softmax(jnp.einsum("btqd,btkd->btqk", q, k) / 32**0.5, axis=-1)

    video, query, _ = moving_colours()
    weights = np.asarray(attention(values, jnp.asarray(video[None]), jnp.asarray(query[None])))
    seen = weights[0, :, -QUERIES:, : CONFIG.num_patches]
    assert seen.sum(axis=-1).mean() > 0.5  # the rest is for points
    centres = np.stack(np.meshgrid(*[np.arange(2.0, SIDE, 4)] * 2, indexing="ij"), -1).reshape(-1, 2)
    return np.swapaxes(seen @ centres / seen.sum(axis=-1, keepdims=True), 0, 1)


def test_the_parameters_are_those_of_the_official_initialisation() -> None:
    """Names and shapes, also traced; the heads and the norms as they were drawn."""
    traced = jax.eval_shape(functools.partial(init_matching_params, CONFIG), jax.random.key(0))
    found, before = flatten_names(params()), flatten_names(official())
    shapes = {name: (spec.shape, jnp.float32) for name, spec in param_specs(CONFIG).items()}
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == shapes
    assert {name: (x.shape, x.dtype) for name, x in flatten_names(traced).items()} == shapes
    assert all(np.isfinite(x).all() for x in found.values())
    kept = [name for name in found if "norm" in name or "head" in name or "up" in name.split("/")]
    assert len(kept) > 30
    assert all((found[name] == before[name]).all() for name in kept)


def test_the_first_layer_looks_where_a_point_is_asked_for() -> None:
    tracks = moving_colours()[2]
    error = np.linalg.norm(looked_at(params(), layer=0, head=0)[:, 0] - tracks[:, 0], axis=-1)
    assert np.median(error) < 4  # patches are 4 pixels


@pytest.mark.parametrize("head", [0, 1])
def test_the_last_layer_finds_points_again(head: int) -> None:
    """Before any training, and only with this initialisation."""
    tracks = moving_colours()[2]
    errors = [
        np.median(np.linalg.norm(looked_at(values, layer=1, head=head) - tracks, axis=-1)[:, 1:])
        for values in (params(), official())
    ]
    assert errors[0] < 0.5 * errors[1], errors


def test_cosines_are_orthonormal_coarsest_first() -> None:
    rows = cosines(8)
    np.testing.assert_allclose(rows @ rows.T, np.eye(8), atol=1e-12)
    assert (np.count_nonzero(np.diff(np.sign(rows), axis=1), axis=1) == np.arange(8)).all()


def test_channels_do_not_overlap() -> None:
    channels = assign_channels(CONFIG)
    assert len({channels.image, channels.asked, *channels.content}) == 2 + 27
    assert not channels.coarse[[channels.image, channels.asked, *channels.content]].any()
    directions = channels.positions
    np.testing.assert_allclose(directions.T @ directions, np.eye(directions.shape[1]), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 1}, r"depth = 1, num_heads = 4, lru_width = 128: the matching initialisation needs at "),
        ({"num_heads": 1}, r"num_heads = 1"),
        ({"lru_width": 64}, r"lru_width = 64: .*lru_width = 128"),
        ({"width": 8, "num_heads": 2, "image_size": (512, 512)}, r"width = 8: positions of \(512, 512\)"),
    ],
)
def test_models_that_cannot_start_so(options: dict, message: str) -> None:
    sizes = {"image_size": (64, 64), "width": 128, "depth": 3, "mlp_size": 16, "num_heads": 4}
    with pytest.raises(ValueError, match=message):
        with_matching(TAPNextConfig(**sizes | options), {})
