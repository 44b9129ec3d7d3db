"""What TAPNext promises beyond the contracts: masks, read-outs, resolutions, precision, errors, a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.common.params import flatten_names
from models.tapnext import TAPNext, TAPNextRuntime, apply, cast_params, init_state
from tests.models.tapnext.small_tapnext import (
    QUICK_COMPILE,
    RUNTIME,
    queries,
    random_params,
    run,
    small,
    video,
)

CONFIG = small()
FIELDS = ("tracks_yx", "track_logits", "visible_logits")


def logits_of(output):
    return np.concatenate([output.track_logits, output.visible_logits[..., None]], axis=-1)


def test_output_is_float32_tracks_per_query():
    output, none = run(CONFIG, RUNTIME, random_params(CONFIG), video(2, 5), queries(2))
    assert none is None
    assert output.layers is None
    shapes = [getattr(output, name).shape for name in FIELDS]
    assert shapes == [(2, 4, 5, 2), (2, 4, 5, 20), (2, 4, 5)]
    assert {getattr(output, name).dtype for name in FIELDS} == {jnp.dtype(jnp.float32)}
    assert float(output.tracks_yx.min()) >= 0.5
    assert (np.asarray(output.tracks_yx) <= np.array([7.5, 11.5])).all()


def test_points_see_each_other_unless_they_are_not_in_use():
    """Masked tracks weigh exactly nothing: what they track changes no bit of the others."""
    params, x = random_params(CONFIG), video(2, 5)
    in_use = jnp.array([[True, True, False, False], [True, False, True, True]])
    other = queries(2).at[0, 2:].set(jnp.array([1.0, 7.0, 2.0])).at[1, 1].set(jnp.array([3.0, 1.0, 1.0]))

    def used(query_tyx, in_use=None):
        output, _ = run(CONFIG, RUNTIME, params, x, query_tyx, in_use=in_use)
        flags = [[True, True, False, False], [True, False, True, True]]
        return logits_of(output)[np.array(flags)]

    np.testing.assert_array_equal(used(queries(2), in_use), used(other, in_use))
    assert np.abs(used(queries(2)) - used(other)).max() > 1e-4
    assert np.abs(used(queries(2), in_use) - used(queries(2))).max() > 1e-4
    alone, _ = run(CONFIG, RUNTIME, params, x, queries(2)[:, :2])
    masked, _ = run(CONFIG, RUNTIME, params, x, queries(2), in_use=in_use)
    np.testing.assert_allclose(logits_of(masked)[0, :2], logits_of(alone)[0], atol=2e-5)
    all_used, _ = run(CONFIG, RUNTIME, params, x, queries(2), in_use=jnp.ones((2, 4), bool))
    np.testing.assert_allclose(
        logits_of(all_used), logits_of(run(CONFIG, RUNTIME, params, x, queries(2))[0]), atol=2e-5
    )


@pytest.mark.slow
def test_read_outs_of_the_layers_are_the_models_cut_short():
    """After layer i without the final norm; so the first layer's are those of the model of one layer."""
    config = small(depth=2)
    params, x = random_params(config), video(1, 4)
    output, _ = run(config, RUNTIME, params, x, queries(1), layers=True)
    assert output.layers.track_logits.shape == (2, 1, 4, 4, 20)
    cut = params | {"layers": {"0": params["layers"]["0"]}}
    first, _ = run(CONFIG, RUNTIME, cut, x, queries(1), layers=True)
    for name in FIELDS[1:]:
        np.testing.assert_allclose(getattr(output.layers, name)[0], getattr(first.layers, name)[0], atol=1e-5)


@pytest.mark.slow
def test_other_resolutions_keep_native_coordinates():
    """Twice the pixels: the same patches of an enlarged constant video, and a state of its own size."""
    params = random_params(CONFIG)
    large = jnp.full((1, 3, 16, 24, 3), 0.3)
    output, _ = run(CONFIG, RUNTIME, params, large, queries(1))
    assert float(output.tracks_yx[..., 0].max()) <= 7.5
    state = init_state(CONFIG, queries(1), image_size=(16, 24))
    assert state.layers["0"].lru.shape == (1, 24 + 4, 24)
    streamed, _ = run(CONFIG, RUNTIME, params, large, state=state)
    np.testing.assert_allclose(logits_of(streamed), logits_of(output), atol=2e-5)


def test_bytes_are_pixels():
    params = random_params(CONFIG)
    bytes_ = (127.5 * (video(2, 5) + 1)).astype(jnp.uint8)
    found, _ = run(CONFIG, RUNTIME, params, bytes_, queries(2))
    expected, _ = run(CONFIG, RUNTIME, params, bytes_.astype(jnp.float32) / 127.5 - 1, queries(2))
    np.testing.assert_allclose(logits_of(found), logits_of(expected), atol=1e-6)


def test_mixed_precision():
    """bfloat16 matmuls: close to float32, float32 where promised, and the same from parameters cast once."""
    params, x = random_params(CONFIG), video(2, 5)
    expected, _ = run(CONFIG, RUNTIME, params, x, queries(2))
    half = TAPNextRuntime(compute_dtype="bfloat16", residual_dtype="bfloat16")
    state = init_state(CONFIG, queries(2), dtype="bfloat16")
    output, state = run(CONFIG, half, params, x, state=state)
    error = np.abs(logits_of(output) - logits_of(expected))
    assert 1e-5 < error.mean() < 0.05 * logits_of(expected).std() + 0.02
    layer = state.layers["0"]
    assert (output.track_logits.dtype, layer.lru.dtype, layer.conv[0].dtype) == (
        jnp.float32,
        jnp.float32,
        jnp.bfloat16,
    )
    once = cast_params(params, "bfloat16")
    again, _ = run(CONFIG, half, once, x, state=init_state(CONFIG, queries(2), dtype="bfloat16"))
    np.testing.assert_array_equal(logits_of(again), logits_of(output))


@pytest.mark.slow
def test_numerics_differ_where_they_should():
    """The same weights: GELU and epsilon change the logits a little, a query at the border a lot."""
    params, x = random_params(CONFIG), video(2, 5)
    torch = dataclasses.replace(CONFIG, numerics="torch")
    inside = queries(2)
    border = inside.at[0, 0, 1:].set(jnp.array([0.05, 11.95]))

    def gap(query_tyx):
        pair = (run(config, RUNTIME, params, x, query_tyx)[0] for config in (CONFIG, torch))
        one, other = map(logits_of, pair)
        return np.abs(one - other)[0, 0].max()

    assert 1e-4 < gap(inside) < gap(border)


def test_module_is_a_thin_shell():
    params, x = random_params(CONFIG), video(2, 5)
    model = TAPNext(CONFIG, params=params)
    assert flatten_names(model.params()).keys() == flatten_names(params).keys()
    step = jax.jit(lambda m, x: m(x, init_state(CONFIG, queries(2))), compiler_options=QUICK_COMPILE)
    output, state = step(model, x)
    expected, _ = run(CONFIG, RUNTIME, params, x, queries(2))
    np.testing.assert_allclose(output.track_logits, expected.track_logits, atol=2e-5)
    assert int(state.step[0]) == 5
    with nnx.set_graph_mode(False):
        graph, leaves = nnx.split(model)
        assert nnx.merge(graph, leaves).config == CONFIG
    for arguments in ({}, {"rngs": nnx.Rngs(0), "params": params}):
        with pytest.raises(ValueError, match="exactly one of rngs"):
            TAPNext(CONFIG, **arguments)


def test_clear_errors(unchecked_types):
    params, x, points = random_params(CONFIG), video(2, 4), queries(2)

    def call(video=x, query_tyx=points, config=CONFIG, **options):
        return apply(config, RUNTIME, params, video, query_tyx, **options)

    with pytest.raises(ValueError, match="not those of this TAPNextConfig:\nmissing"):
        call(config=small(depth=2))
    with pytest.raises(ValueError, match="video: frame height = 9; it must be a multiple of the patch"):
        call(video(2, 4, (9, 12)))
    with pytest.raises(ValueError, match=r"video has shape .*; it must be \[B, T, height, width, 3\]"):
        call(x[..., 0])
    with pytest.raises(ValueError, match=r"it must be .* with T >= 1"):
        call(x[:, :0])
    with pytest.raises(ValueError, match=r"video has dtype int32; it must be uint8, or floating"):
        call(x.astype(jnp.int32))
    with pytest.raises(ValueError, match="query_tyx is None; a call without a state needs"):
        call(query_tyx=None)
    with pytest.raises(ValueError, match="query_valid describes query_tyx, which is None"):
        call(query_tyx=None, query_valid=jnp.ones((2, 4), bool), state=init_state(CONFIG, points))
    with pytest.raises(ValueError, match="the queries are of 3 videos, video has 2 rows"):
        call(query_tyx=queries(3))
    with pytest.raises(ValueError, match="state was made for 3 rows, video has 2"):
        call(state=init_state(CONFIG, queries(3)))
    with pytest.raises(
        ValueError, match="state was made for 4 tracks, the queries are 3: their number cannot"
    ):
        call(query_tyx=points[:, :3], state=init_state(CONFIG, points))
    with pytest.raises(
        ValueError, match=r"state was made for 24 patches per frame, .* \(8, 12\) pixels have 6"
    ):
        call(state=init_state(CONFIG, points, image_size=(16, 24)))
    with pytest.raises(ValueError, match=r"reset has shape \(2, 3\); it must be \[B, T\] = \(2, 4\)"):
        call(reset=jnp.zeros((2, 3), bool))
    with pytest.raises(ValueError, match=r"in_use has shape \(2, 3\); it must be \[B, Q\] = \(2, 4\)"):
        call(in_use=jnp.ones((2, 3), bool))


MESH_PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from models.common.sharding import ShardingRules, param_shardings
from models.tapnext import TAPNextConfig, TAPNextRuntime, apply, init_params, init_state, param_axes

config = TAPNextConfig(image_size=(8, 12), patch_size=(4, 4), width=16, depth=2, mlp_size=24, num_heads=2,
    head_width=12, decode_radius=2)
runtime = TAPNextRuntime(remat="full", scan_layers=True)
params = init_params(config, jax.random.key(0))
video = jax.random.uniform(jax.random.key(1), (8, 7, 8, 12, 3))
points = jax.random.uniform(jax.random.key(2), (8, 3, 2, 3)) * jnp.array([7, 8, 12])
valid = jax.random.bernoulli(jax.random.key(3), 0.8, (8, 3, 2))
used = jax.random.bernoulli(jax.random.key(4), 0.7, (8, 3))
reset = jax.random.bernoulli(jax.random.key(5), 0.2, (8, 7))
state = init_state(config, points, valid)

def loss(params, video, points, valid, used):
    output, _ = apply(config, runtime, params, video, points, query_valid=valid, in_use=used, layers=True)
    return sum(jnp.mean(x**2) for x in jax.tree.leaves(output))

def everything(params, video, points, valid, used, state, reset):
    outputs, after = apply(config, runtime, params, video, state=state, reset=reset, in_use=used)
    logits = (outputs.track_logits, outputs.visible_logits)
    return jax.value_and_grad(loss)(params, video, points, valid, used), logits, after

options = {"xla_backend_optimization_level": 0}
batch = (video, points, valid, used, state, reset)
expected = jax.jit(everything, compiler_options=options)(params, *batch)
mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
with jax.set_mesh(mesh):
    split = jax.device_put(params, param_shardings(params, param_axes(config), mesh, ShardingRules()))
    kernel = lambda tree: tree["layers"]["0"]["attn"]["q_proj"]["kernel"]
    assert kernel(split).addressable_shards[0].data.shape == (4, 16), kernel(split).sharding
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    found = jax.jit(everything, compiler_options=options)(split, *jax.device_put(batch, rows))
    assert kernel(found[0][1]).sharding == kernel(split).sharding
    undivided = jax.eval_shape(
        lambda p, x: apply(config, runtime, p, x, points[:3])[0].tracks_yx, split, video[:3])
    assert undivided.shape == (3, 3, 7, 2)
for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=5e-6)
print("equal")
"""


@pytest.mark.slow
def test_a_mesh_changes_nothing(run_python):
    """Loss, gradients (split as their parameters) and a stream on data=2 x fsdp=4, and an undivided batch."""
    assert run_python("-c", MESH_PROGRAM, devices=8).stdout.strip() == "equal"
