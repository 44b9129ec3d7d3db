"""What FoX promises beyond the contracts: packing, padding, options, precision, pruning, errors, a mesh."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels.forgetting_attention import RESIDUAL_NAMES, TileConfig
from models.common.params import flatten_names
from models.common.stack import rematerialized
from models.fox import Fox, FoxConfig, FoxRuntime, apply, init_state
from models.fox.model import block
from models.fox.span import make_span
from tests.models.fox.small_fox import QUICK_COMPILE, VOCAB, random_params, run, runtime, tokens

LLAMA = dataclasses.replace(FoxConfig.preset("fox_llama", "tiny", vocab_size=VOCAB), num_layers=1)
PRO = FoxConfig.preset("fox_pro", "tiny", vocab_size=VOCAB)
FIXED = {"fgate_type": "fixed", "fgate_bias_init": True, "decay_time_min": 1.0, "decay_time_max": 8.0}
CONFIGS = {
    "llama": LLAMA,
    "llama, rope": dataclasses.replace(LLAMA, use_rope=True),
    "pro": PRO,
    "pro, grouped heads": dataclasses.replace(PRO, num_heads=4, num_kv_heads=2, num_layers=1),
    "transformer": dataclasses.replace(FoxConfig.preset("transformer_pro", "tiny", VOCAB), num_layers=1),
    "fixed gates, gate without norm": dataclasses.replace(
        LLAMA, **FIXED, use_output_gate=True, ogate_act="silu"
    ),
    "bias only, norm without gate": dataclasses.replace(
        LLAMA, fgate_type="bias_only", use_output_norm=True, use_v_shift=True, hidden_act="sigmoid"
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_packed_documents_equal_each_alone(config):
    """Logits and gradients, with loss on the last token of one document and the first of the next."""
    params = random_params(config)
    docs = tokens(2, 6)
    weights = jax.random.normal(jax.random.key(3), (2, 6, VOCAB))

    def loss(params, x, reset, weights):
        logits, _ = apply(config, runtime(), params, x, reset=reset)
        return jnp.sum(logits * weights), logits

    grad = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK_COMPILE)
    alone, logits_alone = grad(params, docs, jnp.zeros((2, 6), bool), weights)
    starts = jnp.arange(12)[None] % 6 == 0
    packed, logits = grad(params, docs.reshape(1, 12), starts, weights.reshape(1, 12, VOCAB))
    np.testing.assert_allclose(logits.reshape(2, 6, VOCAB), logits_alone, atol=2e-5)
    alone, packed = flatten_names(alone), flatten_names(packed)
    for name, expected in alone.items():
        scale = float(jnp.abs(expected).max()) + 1.0
        np.testing.assert_allclose(packed[name], expected, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize("name", ["pro", "transformer"])
def test_left_padding_equals_the_unpadded_row(name):
    """In values and gradients, whatever the padding ids are; a document start on padding means nothing."""
    config = CONFIGS[name]
    params, x = random_params(config), tokens(1, 7)
    weights = jax.random.normal(jax.random.key(3), (1, 7, VOCAB))
    padded = jnp.concatenate([jnp.full((1, 3), 5), x], axis=1)
    mask = jnp.arange(10)[None] >= 3

    def loss(params, x, reset, mask):
        logits, _ = apply(config, runtime(), params, x, reset=reset, mask=mask)
        return jnp.sum(logits[:, -7:] * weights), logits[:, -7:]

    grad = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK_COMPILE)
    expected_grads, expected = grad(params, x, None, None)
    grads, logits = grad(params, padded, (jnp.arange(10) == 1)[None], mask)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    for key, value in flatten_names(expected_grads).items():
        scale = float(jnp.abs(value).max()) + 1.0
        np.testing.assert_allclose(flatten_names(grads)[key], value, atol=2e-5 * scale, err_msg=key)


def test_fixed_gates_get_no_gradient_but_act():
    config = CONFIGS["fixed gates, gate without norm"]
    params, x = random_params(config), tokens(1, 6)
    step = jax.jit(
        jax.value_and_grad(lambda p: jnp.sum(apply(config, runtime(), p, x)[0] ** 2)),
        compiler_options=QUICK_COMPILE,
    )
    loss, grads = step(params)
    grads = flatten_names(grads)
    np.testing.assert_array_equal(grads["layers/0/attn/fgate_fixed/bias"], 0)
    changed = jax.tree.map(lambda p: p, params)
    changed["layers"]["0"]["attn"]["fgate_fixed"]["bias"] += 1.0
    assert abs(float(step(changed)[0] - loss)) > 1e-3


def test_mixed_precision():
    """bfloat16 matmuls around a float32 residual stream: close to float32, and float32 where promised."""
    params, x = random_params(PRO), tokens(2, 12)
    half = runtime(compute_dtype="bfloat16")
    expected, _ = run(PRO, runtime(), params, x)
    logits, _ = run(PRO, half, params, x)
    hidden, _ = run(PRO, half, params, x, output="hidden")
    stats, _ = run(PRO, half, params, x, output="stats")
    assert (logits.dtype, hidden.dtype, stats.log_fgate.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    error = np.abs(np.asarray(logits, np.float32) - expected)
    assert 1e-4 < error.mean() < 0.02 * float(jnp.std(expected)) + 0.02
    head = params["lm_head"]["kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(hidden.astype(jnp.bfloat16) @ head, logits)


@pytest.mark.parametrize("mode", ["weights", "auto", "tight"])
def test_statistics_and_pruning_modes(mode):
    config = dataclasses.replace(PRO, num_layers=1)
    x, params = tokens(2, 40), jax.tree.map(lambda p: p, random_params(config))
    attn = params["layers"]["0"]["attn"]
    attn["fgate_proj"]["bias"] = jnp.array([-3.0, 9.0])  # one head forgets fast, one keeps
    exact, _ = run(config, runtime(), params, x)
    pruning = runtime(
        log_pruning_tolerance=-10.0, adaptive_threshold=mode, tiles=TileConfig((4, 4), (4, 4), (4, 4))
    )
    pruned, _ = run(config, pruning, params, x)
    np.testing.assert_allclose(pruned, exact, atol=2e-3)
    stats, _ = run(config, pruning, params, x, output="stats")
    assert stats.log_fgate.shape == (1, 2, 40, 2)
    assert float(stats.visited_fraction[..., 0].max()) < 0.9
    assert float(stats.visited_fraction[..., 1].min()) > 0.95
    if mode == "tight":
        published = dataclasses.replace(pruning, adaptive_threshold="auto")
        least = run(config, published, params, x, output="stats")[0].visited_fraction
        assert float(stats.visited_fraction.mean()) < float(least.mean()), "not the published rule's tiles"
    q_scale, k_scale = (jnp.abs(attn[name]["scale"]).reshape(2, 16).max(1) for name in ("q_norm", "k_norm"))
    bound = -(2 * 4 * q_scale * k_scale + math.log(40)) - 10
    if mode == "weights":
        np.testing.assert_allclose(stats.threshold, jnp.broadcast_to(bound, (1, 2, 2)), rtol=1e-5)
    else:
        assert bool((stats.threshold >= bound - 1e-4).all()), "norms of q and k respect the weights' bound"


def test_statistics_without_pruning_or_gates():
    config = CONFIGS["transformer"]
    for options in ({}, {"log_pruning_tolerance": -10.0}):
        stats, _ = run(config, runtime(**options), random_params(config), tokens(1, 6), output="stats")
        assert (stats.threshold, stats.visited_fraction) == (None, None)
        np.testing.assert_array_equal(stats.log_fgate, np.zeros((1, 1, 6, 2)))


def test_rematerialization_saves_memory():
    """What the backward pass keeps of a layer falls from policy to policy."""
    params = random_params(LLAMA)["layers"]["0"]
    span = make_span(tokens(2, 64), None, None, None)

    def layer(params, x, span, key):
        del key
        return block(LLAMA, FoxRuntime(), params, x, span)[0]

    def kept(policy: str) -> int:
        wrapped = rematerialized(layer, policy, RESIDUAL_NAMES)
        _, pullback = jax.eval_shape(
            lambda p, x: jax.vjp(lambda p, x: wrapped(p, x, span, None), p, x), params, jnp.zeros((2, 64, 32))
        )
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))

    inputs = sum(leaf.size for leaf in jax.tree.leaves(params)) * 4 + 2 * 64 * 32 * 4
    sizes = {policy: kept(policy) for policy in ("none", "dots", "attention", "full")}
    assert sizes["none"] > sizes["dots"] > sizes["attention"] > sizes["full"] >= inputs
    assert sizes["full"] < 1.2 * inputs


def test_module_is_a_thin_shell():
    model = Fox(PRO, rngs=nnx.Rngs(params=0))
    x = tokens(1, 5)
    assert flatten_names(model.params()).keys() == flatten_names(random_params(PRO)).keys()
    model = Fox(PRO, runtime(), params=random_params(PRO))
    logits, state = jax.jit(lambda m, x: m(x, init_state(PRO, 1, 8)))(model, x)
    expected, _ = run(PRO, runtime(), random_params(PRO), x)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    assert int(state.length[0]) == 5
    with nnx.set_graph_mode(False):
        graph, leaves = nnx.split(model)
        again = nnx.merge(graph, leaves)
    assert again.config == PRO
    for arguments in ({}, {"rngs": nnx.Rngs(0), "params": random_params(PRO)}):
        with pytest.raises(ValueError, match="exactly one of rngs"):
            Fox(PRO, **arguments)


def test_clear_errors(unchecked_types):
    params, x = random_params(LLAMA), tokens(2, 4)
    with pytest.raises(ValueError, match="not those of this FoxConfig:\nmissing"):
        apply(PRO, runtime(), params, x)
    with pytest.raises(ValueError, match="output = 'loss'; it must be one of"):
        apply(LLAMA, runtime(), params, x, output="loss")
    with pytest.raises(ValueError, match="state was made for 3 rows, tokens have 2"):
        apply(LLAMA, runtime(), params, x, init_state(LLAMA, 3, 8))
    with pytest.raises(ValueError, match=r"reset has shape \(2, 3\)"):
        apply(LLAMA, runtime(), params, x, reset=jnp.zeros((2, 3), bool))
    with pytest.raises(ValueError, match=r"mask must be left padding .* rows \[1\] are not"):
        apply(LLAMA, runtime(), params, x, mask=jnp.array([[0, 0, 1, 1], [1, 1, 0, 1]], bool))
    with pytest.raises(ValueError, match='output="stats" describes a whole pass'):
        apply(LLAMA, runtime(), params, x, init_state(LLAMA, 2, 8), output="stats")
    with pytest.raises(ValueError, match="max_length = 0; it must be at least 1"):
        init_state(LLAMA, 1, 0)


MESH_PROGRAM = """
import dataclasses, jax, jax.numpy as jnp, numpy as np
from models.common.sharding import ShardingRules, param_shardings
from models.fox import FoxConfig, FoxRuntime, apply, init_params, init_state, param_axes

config = dataclasses.replace(FoxConfig.preset("fox_pro", "tiny", vocab_size=56), num_layers=1, num_kv_heads=1)
runtime = FoxRuntime(log_pruning_tolerance=-10.0, remat="full", scan_layers=True)
params = init_params(config, jax.random.key(0))
tokens = jax.random.randint(jax.random.key(1), (8, 10), 0, 56)
reset = jax.random.bernoulli(jax.random.key(2), 0.2, (8, 10))
mask = jnp.arange(10)[None] >= jnp.arange(8)[:, None] % 3

def loss(params, tokens):
    return (apply(config, runtime, params, tokens, reset=reset, mask=mask)[0] ** 2).mean()

def decode(params, tokens, state):
    _, state = apply(config, runtime, params, tokens[:, :6], state, reset[:, :6], mask[:, :6])
    return apply(config, runtime, params, tokens[:, 6:7], state)[0]

def everything(params, tokens):
    return *jax.value_and_grad(loss)(params, tokens), decode(params, tokens, init_state(config, 8, 12))

options = {"xla_backend_optimization_level": 0}
expected = jax.jit(everything, compiler_options=options)(params, tokens)
mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
with jax.set_mesh(mesh):
    split = jax.device_put(params, param_shardings(params, param_axes(config), mesh, ShardingRules()))
    kernel = split["layers"]["0"]["attn"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (8, 32), kernel.sharding
    placed = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    found = jax.jit(everything, compiler_options=options)(split, placed)
    assert found[1]["layers"]["0"]["attn"]["q_proj"]["kernel"].sharding == kernel.sharding
    undivided = jax.eval_shape(lambda p, t: apply(config, runtime, p, t)[0], split, tokens[:3])
    assert undivided.shape == (3, 10, 56)
for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6)
print("equal")
"""


@pytest.mark.slow
def test_a_mesh_changes_nothing(run_python):
    """Loss, gradients (split as their parameters) and decoding on data=2 x fsdp=4, and an undivided batch."""
    assert run_python("-c", MESH_PROGRAM, devices=8).stdout.strip() == "equal"
