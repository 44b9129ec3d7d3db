"""The recurrent block against plain loops in float64, in one pass and in chunks, with starts anywhere."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.block_diagonal import block_diagonal
from models.common.params import flatten_names, initialize, unflatten_names
from models.common.recurrent_state import handed_over, init_recurrent_state, taken_over
from models.common.rglru import (
    RadiusInit,
    frame_positions,
    recurrent_block,
    residual_block,
    residual_block_specs,
    rg_lru,
    rg_lru_specs,
)
from models.common.temporal_conv import temporal_conv

QUICK_COMPILE = {"xla_backend_optimization_level": 0}
B, T, P, D, E, G = 2, 9, 3, 6, 8, 2


def random_tree(specs, seed=0):
    draw = np.random.default_rng(seed)
    return unflatten_names(
        {name: jnp.asarray(0.5 * draw.normal(size=s.shape), jnp.float32) for name, s in specs.items()}
    )


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def starts():
    """At the first frame, two in a row, and one right after a chunk border."""
    reset = np.zeros((B, T), bool)
    reset[0, [0, 4, 5]] = True
    reset[1, 3] = True
    return jnp.asarray(reset)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rg_lru_loop(x, params, positions, h, real):
    """Frame by frame, channel group by channel group, in float64. x [B, T, P, E], h [B, P, E]."""
    flat = {name: np.asarray(leaf, np.float64) for name, leaf in flatten_names(params).items()}
    x, half, out = np.asarray(x, np.float64), x.shape[-1] // 2, []

    def gate(name, value):
        groups = np.split(value, G, axis=-1)
        kernel, bias = flat[f"{name}/kernel"], flat[f"{name}/bias"]
        return sigmoid(np.concatenate([groups[g] @ kernel[g] + bias[g] for g in range(G)], axis=-1))

    def merged(z):
        return z if real else np.concatenate([z.real, z.imag], axis=-1)

    if not real:
        h = h[..., :half] + 1j * h[..., half:]
    for t in range(x.shape[1]):
        i, r = gate("input_gate", x[:, t]), gate("a_gate", x[:, t])
        log_a = -8 * r * np.log1p(np.exp(flat["a_param"]))
        value = x[:, t] if real else x[:, t, :, :half] + 1j * x[:, t, :, half:]
        turn = 1 if real else np.exp(1j * r * flat["a_imag_param"])
        begins = (np.asarray(positions[:, t]) == 0)[:, None, None]
        scale = np.where(begins, 1, np.sqrt(1 - np.exp(2 * log_a)))
        h = np.where(begins, 0, np.exp(log_a) * turn * h) + scale * i * value
        out.append(merged(h))
    return np.stack(out, axis=1), merged(h)


@pytest.mark.parametrize("real", [True, False], ids=["real", "complex"])
def test_rg_lru_is_its_equation_in_any_chunking(real):
    """The official code drops imaginary parts as soon as there is a cache."""
    params = random_tree(rg_lru_specs(E, G, 0.5, real=real))
    x, h = normal(B, T, P, E), normal(B, P, E, seed=2)
    positions = frame_positions(x, jnp.array([0, 7]), starts())
    expected, expected_last = rg_lru_loop(x, params, positions, np.asarray(h), real)
    step = jax.jit(rg_lru, compiler_options=QUICK_COMPILE)
    for sizes in ([T], [4, 1, 4]):
        parts, start, state = [], 0, h
        for size in sizes:
            part = slice(start, start + size)
            y, state = step(x[:, part], params, positions[:, part], state)
            parts.append(y)
            start += size
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=2e-6)
        np.testing.assert_allclose(state, expected_last, atol=2e-6)


def conv_loop(x, kernel, bias, reset, before):
    """Sums over the frames of the segment, which may begin `before` the call."""
    x = np.concatenate([before, x], axis=1)
    past, taps = before.shape[1], kernel.shape[0]
    out = np.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(past, x.shape[1]):
            out[b, t] = bias
            for s in range(min(taps, t + 1)):
                out[b, t] += kernel[taps - 1 - s] * x[b, t - s]
                if t - s >= past and reset[b, t - s - past]:
                    break
    return out[:, past:]


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_convolution_is_its_sum_in_any_chunking(taps):
    """Chunks shorter and longer than the kernel; starts in a chunk, at its first frame, in an earlier one."""
    params = {"kernel": normal(taps, E, seed=3), "bias": normal(E, seed=4)}
    x, reset = normal(B, T, P, E), starts()
    before = np.zeros((B, taps - 1, P, E))
    expected = conv_loop(
        np.asarray(x, np.float64), *map(np.asarray, params.values()), np.asarray(reset), before
    )
    step = jax.jit(temporal_conv, compiler_options=QUICK_COMPILE)
    for sizes in ([T], [1, 3, 1, 1, 3]):
        parts, start, length = [], 0, jnp.zeros(B, jnp.int32)
        cache = init_recurrent_state(B, E, taps, (P,)).conv
        for size in sizes:
            part = slice(start, start + size)
            positions = frame_positions(x[:, part], length, reset[:, part])
            y, cache = step(x[:, part], params, positions, cache)
            assert [tap.shape for tap in cache] == [(B, P, E)] * (taps - 1)
            length = positions[:, -1] + 1
            parts.append(y)
            start += size
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=1e-6)
    for back, tap in enumerate(reversed(cache)):
        np.testing.assert_array_equal(tap, x[:, T - 1 - back])


def test_packed_segments_equal_each_alone():
    """Outputs and gradients of a residual block with MLP; a tube is a row of its own."""
    params = random_tree(residual_block_specs(D, E, G, 4, 1, 0.5, channel_mlp_size=10))
    x, weights = normal(4, 5, P, D), normal(4, 5, P, D, seed=5)

    def loss(params, x, positions, weights):
        y, _ = residual_block(x, params, positions)
        return jnp.sum(y * weights), y

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), compiler_options=QUICK_COMPILE)
    (alone, dx_alone), y_alone = grad(params, x, frame_positions(x, None, None), weights)
    packed_x = x.reshape(2, 10, P, D)
    packed, y = grad(params, packed_x, jnp.tile(jnp.arange(10) % 5, (2, 1)), weights.reshape(2, 10, P, D))
    np.testing.assert_allclose(y.reshape(x.shape), y_alone, atol=1e-6)
    np.testing.assert_allclose(packed[1].reshape(x.shape), dx_alone, atol=2e-5)
    for name, expected in flatten_names(alone).items():
        found = flatten_names(packed[0])[name]
        np.testing.assert_allclose(
            found, expected, atol=2e-5 * float(jnp.abs(expected).max()) + 1e-6, err_msg=name
        )
    rows = jnp.swapaxes(x, 1, 2).reshape(-1, 5, D)
    tubes, _ = jax.jit(residual_block, compiler_options=QUICK_COMPILE)(
        rows, params, jnp.tile(jnp.arange(5), (12, 1))
    )
    np.testing.assert_allclose(jnp.swapaxes(tubes.reshape(4, P, 5, D), 1, 2), y_alone, atol=1e-5)


def test_half_precision_keeps_gates_and_states_in_float32():
    params = random_tree(residual_block_specs(D, E, G, 4, 1, 0.5))
    x, positions = normal(B, T, P, D), jnp.tile(jnp.arange(T), (B, 1))
    run = jax.jit(recurrent_block, static_argnames="dtype", compiler_options=QUICK_COMPILE)
    y, state = run(x, params["recurrent"], positions, dtype="bfloat16")
    exact, _ = run(x, params["recurrent"], positions, dtype="float32")
    assert (y.dtype, state.lru.dtype, state.conv[0].dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    assert 1e-4 < float(jnp.abs(y.astype(jnp.float32) - exact).max()) < 0.05
    gate = params["recurrent"]["rglru"]["a_gate"]
    assert block_diagonal(normal(2, E).astype(jnp.bfloat16), gate, "bfloat16").dtype == jnp.float32


def test_initial_values_have_the_official_spread():
    """Standard deviations of section 3 of the sheet; radii uniform by area. 4 sigma of the sampling error."""
    width, inner, blocks, taps, layers = 64, 128, 4, 4, 12
    specs = residual_block_specs(width, inner, blocks, taps, layers, 0.6, channel_mlp_size=96)
    draw = jax.jit(lambda key: initialize(specs, key), compiler_options=QUICK_COMPILE)
    flat = flatten_names(draw(jax.random.key(0)))
    spread = {
        "recurrent/linear_x/kernel": width**-0.5,
        "recurrent/linear_y/kernel": width**-0.5,
        "recurrent/linear_out/kernel": math.sqrt(2 / (layers * inner)),
        "recurrent/conv/kernel": 0.05,
        "recurrent/rglru/input_gate/kernel": inner**-0.5,  # not of the block's 32 channels
        "recurrent/rglru/a_gate/kernel": inner**-0.5,
        "channel_mlp/up/kernel": (2 * width) ** -0.5,
        "channel_mlp/down/kernel": math.sqrt(2 / (layers * 96)),
    }
    for name, value in flat.items():
        if name in spread:
            assert abs(float(value.std()) / spread[name] - 1) < 4 / math.sqrt(2 * value.size), name
        elif not name.endswith("a_param"):
            np.testing.assert_array_equal(value, 0, err_msg=name)
    for low in (0.5, 0.9):
        lam = RadiusInit(low)(jax.random.key(1), (4000,))
        area = np.asarray(jnp.exp(-2 * jax.nn.softplus(lam)))
        assert low**2 - 1e-4 < area.min() < low**2 + 0.01
        assert 0.999**2 - 0.01 < area.max() < 0.999**2 + 1e-4
        middle = (low**2 + 0.999**2) / 2
        assert abs(area.mean() - middle) < 4 * (0.999**2 - low**2) / math.sqrt(12 * 4000)
    theta = rg_lru_specs(8, 2, 0.5, real=False)["a_imag_param"].init(jax.random.key(2), (1000,))
    assert 0 <= float(theta.min()) < float(theta.max()) < 0.1 * math.pi


def test_a_memory_handed_over_is_updated_in_place():
    """Of three taps two stay where they are, and the new one replaces the oldest."""
    state = {"0": init_recurrent_state(2, 3, 4, (5,)), "step": jnp.zeros(2)}
    marked = jax.tree.map(lambda x, k: x + k, state, jax.tree.unflatten(jax.tree.structure(state), range(5)))
    handed = handed_over(marked)
    assert [float(tap[0, 0, 0]) for tap in handed["0"].conv] == [2, 3, 1]
    jax.tree.map(np.testing.assert_array_equal, taken_over(handed), marked)

    def step(handed, new):
        memory = taken_over(handed)["0"]
        return memory._replace(conv=(*memory.conv[1:], 2 * new))

    compiled = jax.jit(step, donate_argnums=0).lower(handed, handed["0"].conv[0]).compile().as_text()
    assert compiled.count(" copy(") == 0
