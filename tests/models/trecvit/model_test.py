"""What TRecViT promises beyond the contracts: packing, precision, dropout, memory, errors, a mesh."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels.linear_scan import RESIDUAL_NAMES
from models.common.params import flatten_names
from models.common.stack import rematerialized
from models.trecvit import TRecViT, TRecViTConfig, TRecViTRuntime, apply, cast_params, init_state
from models.trecvit.model import block
from tests.models.trecvit.small_trecvit import QUICK_COMPILE, random_params, run, small, video

RUNTIME = TRecViTRuntime()
CONFIG = small()


@pytest.mark.parametrize(
    "head", ["classes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("readout", "dense"))]
)
def test_packed_clips_equal_each_alone(head):
    """Logits and gradients, with a loss on the last frame of one clip and the first of the next."""
    config = small(head=head, use_mlp=True)
    params, x = random_params(config), video(4, 3)
    shape = (4, 3, 2, 3, 5) if head == "dense" else (4, 3, 5)
    weights = jax.random.normal(jax.random.key(3), shape)

    def loss(params, x, reset, weights):
        logits, _ = apply(config, RUNTIME, params, x, reset=reset)
        return jnp.sum(logits * weights), logits

    grad = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK_COMPILE)
    alone, logits_alone = grad(params, x, jnp.zeros((4, 3), bool), weights)
    starts = jnp.tile(jnp.arange(6) % 3 == 0, (2, 1))
    packed, logits = grad(params, x.reshape(2, 6, *x.shape[2:]), starts, weights.reshape(2, 6, *shape[2:]))
    np.testing.assert_allclose(logits.reshape(shape), logits_alone, atol=2e-5)
    alone, packed = flatten_names(alone), flatten_names(packed)
    for name, expected in alone.items():
        scale = float(jnp.abs(expected).max()) + 1.0
        np.testing.assert_allclose(packed[name], expected, atol=2e-5 * scale, err_msg=name)


def test_mixed_precision():
    """bfloat16 matmuls: close to float32, and float32 where promised."""
    params, x = random_params(CONFIG), video(2, 4)
    expected, _ = run(CONFIG, RUNTIME, params, x)
    half = TRecViTRuntime(compute_dtype="bfloat16", residual_dtype="bfloat16")
    logits, state = run(CONFIG, half, params, x, init_state(CONFIG, 2, "bfloat16"))
    error = np.abs(np.asarray(logits - expected))
    assert 1e-5 < error.mean() < 0.03 * float(jnp.std(expected)) + 0.02
    assert (logits.dtype, state.layers["0"].lru.dtype, state.head.dtype) == (jnp.float32,) * 3
    for residual in ("float32", "bfloat16"):
        runtime = dataclasses.replace(half, residual_dtype=residual)
        encoded = jax.eval_shape(lambda x, r=runtime: apply(CONFIG, r, params, x, output="encoded")[0], x)
        assert encoded.dtype == residual


@pytest.mark.parametrize(
    "head", ["classes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("readout", "dense"))]
)
def test_parameters_cast_once_give_the_same_bits(head):
    config = small(head=head, use_mlp=True)
    params, x = random_params(config), video(1, 3)
    half = TRecViTRuntime(compute_dtype="bfloat16")
    once = cast_params(params, "bfloat16")
    names = flatten_names(once)
    layer = "layers/0/recurrent"
    assert (
        names[f"{layer}/linear_x/bias"].dtype == names[f"{layer}/rglru/a_gate/kernel"].dtype == jnp.bfloat16
    )
    for name in ("conv/kernel", "conv/bias", "rglru/a_gate/bias", "rglru/a_param"):
        assert names[f"{layer}/{name}"].dtype == jnp.float32
    np.testing.assert_array_equal(run(config, half, once, x)[0], run(config, half, params, x)[0])


def test_bytes_are_pixels():
    params, x = random_params(CONFIG), (255 * video(1, 2)).astype(jnp.uint8)
    logits, _ = run(CONFIG, RUNTIME, params, x)
    expected, _ = run(CONFIG, RUNTIME, params, x.astype(jnp.float32) / 255)
    np.testing.assert_array_equal(logits, expected)


def test_dropout_follows_its_key():
    config = small(dropout=0.4, head_dropout=0.4, depth=2)
    params, x = random_params(config), video(2, 4)
    keys = jax.random.split(jax.random.key(0), 2)
    first, second = (run(config, RUNTIME, params, x, output="clip", rng=key)[0].logits for key in keys)
    assert float(jnp.abs(first - second).max()) > 1e-3
    scanned = dataclasses.replace(RUNTIME, scan_layers=True)
    again = run(config, scanned, params, x, output="clip", rng=keys[0])[0].logits
    np.testing.assert_allclose(again, first, atol=1e-5)


def test_rematerialization_saves_memory():
    """What the backward pass keeps of a layer falls from policy to policy."""
    params, x = random_params(CONFIG)["layers"]["0"], jnp.zeros((2, 16, 7, 16))
    positions = jnp.tile(jnp.arange(16), (2, 1))

    def layer(params, x, positions, key):
        return block(CONFIG, RUNTIME, params, x, positions, None, key)[0]

    def kept(policy):
        wrapped = rematerialized(layer, policy, RESIDUAL_NAMES)
        _, pullback = jax.eval_shape(
            lambda p, x: jax.vjp(lambda p, x: wrapped(p, x, positions, None), p, x), params, x
        )
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))

    sizes = {policy: kept(policy) for policy in ("none", "dots", "full")}
    assert sizes["none"] > sizes["dots"] > sizes["full"]


def test_module_is_a_thin_shell():
    params, x = random_params(CONFIG), video(1, 3)
    model = TRecViT(CONFIG, params=params)
    assert flatten_names(model.params()).keys() == flatten_names(params).keys()
    step = jax.jit(lambda m, x: m(x, init_state(CONFIG, 1)), compiler_options=QUICK_COMPILE)
    logits, state = step(model, x)
    np.testing.assert_allclose(logits, run(CONFIG, RUNTIME, params, x)[0], atol=2e-5)
    assert int(state.length[0]) == 3
    with nnx.set_graph_mode(False):
        graph, leaves = nnx.split(model)
        assert nnx.merge(graph, leaves).config == CONFIG
    for arguments in ({}, {"rngs": nnx.Rngs(0), "params": params}):
        with pytest.raises(ValueError, match="exactly one of rngs"):
            TRecViT(CONFIG, **arguments)


def test_clear_errors(unchecked_types):
    params, x = random_params(CONFIG), video(2, 4)

    def call(video=x, config=CONFIG, **options):
        return apply(config, RUNTIME, params, video, **options)

    with pytest.raises(ValueError, match="not those of this TRecViTConfig:\nmissing"):
        call(config=small(depth=2))
    with pytest.raises(ValueError, match=r"frames are \(8, 8\) \(height, width\), the model's are \(8, 12\)"):
        call(video(2, 4, (8, 8)))
    with pytest.raises(
        ValueError, match=r"video has shape \(2, 4, 8, 12\); it must be \[B, T, height, width, 3\]"
    ):
        call(x[..., 0])
    with pytest.raises(ValueError, match=r"it must be .* with T >= 1"):
        call(x[:, :0])
    with pytest.raises(ValueError, match="state was made for 3 rows, video has 2"):
        call(state=init_state(CONFIG, 3))
    with pytest.raises(ValueError, match="state was made for 13 tokens per frame, the model has 7"):
        call(state=init_state(small(image_size=(16, 12)), 2))
    with pytest.raises(ValueError, match=r"reset has shape \(2, 3\); it must be \[B, T\] = \(2, 4\)"):
        call(reset=jnp.zeros((2, 3), bool))
    with pytest.raises(ValueError, match="output = 'loss'; it must be one of"):
        call(output="loss")
    with pytest.raises(ValueError, match='output="clip" describes whole videos'):
        call(output="clip", state=init_state(CONFIG, 2))
    with pytest.raises(ValueError, match="9 frames make 2 clips of frames_per_clip = 4"):
        call(video(2, 9), output="clip")
    dense, bare = small(head="dense"), small(head="none")
    with pytest.raises(ValueError, match="the dense head classifies patches"):
        apply(dense, RUNTIME, random_params(dense), x, output="clip")
    with pytest.raises(ValueError, match="a model with head 'none' has 'encoded' only"):
        apply(bare, RUNTIME, random_params(bare), x)


MESH_PROGRAM = """
import dataclasses, sys
import jax, jax.numpy as jnp, numpy as np
from models.common.sharding import ShardingRules, param_shardings
from models.trecvit import MAEConfig, TRecViTConfig, TRecViTRuntime, apply, apply_mae, draw_kept_tubes
from models.trecvit import init_mae_params, init_mae_state, mae_param_axes
from models.trecvit import init_params, init_state, param_axes

config = TRecViTConfig(image_size=(8, 12), patch_size=(4, 4), width=16, depth=1, mlp_size=24, num_heads=2,
    rep_size=16, num_classes=8, frames_per_clip=4, dropout=0.1)
slow = sys.argv[1] != "classes"
runtime = TRecViTRuntime(remat="full" if slow else "none", scan_layers=slow)
video = jax.random.uniform(jax.random.key(1), (8, 8, 8, 12, 3))
reset = jax.random.bernoulli(jax.random.key(2), 0.2, (8, 5))
if sys.argv[1] == "mae":
    mae = MAEConfig(dataclasses.replace(config, head="none"), 0.67, decoder_width=8, decoder_depth=1)
    params, axes, state = init_mae_params(mae, jax.random.key(0)), mae_param_axes(mae), init_mae_state(mae, 8)
    kept = draw_kept_tubes(mae, jax.random.key(4), 8)
    call = lambda p, x, *args: apply_mae(mae, runtime, p, x, kept[:len(x)], *args)
    whole = lambda p, x: call(p, x, None, None, jax.random.key(3))[0]
else:
    config = dataclasses.replace(config, head=sys.argv[1])
    params, axes, state = init_params(config, jax.random.key(0)), param_axes(config), init_state(config, 8)
    call = lambda p, x, *args: apply(config, runtime, p, x, *args)
    whole = lambda p, x: call(p, x, None, None, "clip", jax.random.key(3))[0].logits

def everything(params, video, state):
    first, state = call(params, video[:, :5], state, reset)
    return jax.value_and_grad(lambda p: (whole(p, video) ** 2).mean())(params), first, state

options = {"xla_backend_optimization_level": 0}
expected = jax.jit(everything, compiler_options=options)(params, video, state)
mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
with jax.set_mesh(mesh):
    split = jax.device_put(params, param_shardings(params, axes, mesh, ShardingRules()))
    name = lambda tree: tree.get("encoder", tree)["layers"]["0"]["attn"]["q_proj"]["kernel"]
    assert name(split).addressable_shards[0].data.shape == (4, 16), name(split).sharding
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    found = jax.jit(everything, compiler_options=options)(split, *jax.device_put((video, state), rows))
    assert name(found[0][1]).sharding == name(split).sharding
    undivided = jax.eval_shape(lambda p, x: call(p, x)[0], split, video[:3])
    assert undivided.shape[:2] == (3, 8)
for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=2e-6)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "head", ["classes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("readout", "mae"))]
)
def test_a_mesh_changes_nothing(run_python, head):
    """Loss, gradients (split as their parameters) and a stream on data=2 x fsdp=4, and an undivided batch."""
    assert run_python("-c", MESH_PROGRAM, head, devices=8).stdout.strip() == "equal"


def test_default_config_is_the_papers():
    assert TRecViTConfig.preset("B") == TRecViTConfig()
