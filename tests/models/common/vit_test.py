"""Patches, positions, norms. The block is compared with the official one in golden/."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common.dispatch import compiling_for
from models.common.params import unflatten_names
from models.common.vit import (
    as_float,
    attention,
    dropout,
    grid_of,
    layer_norm,
    linear_gelu,
    patchify,
    resize_positions,
    sincos_positions,
    unpatchify,
    vit_block,
    vit_block_specs,
)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_patches_times_a_matrix_are_the_strided_convolution():
    video, kernel = normal(2, 3, 8, 12, 3), normal(4, 2, 3, 5, seed=1)
    expected = jax.lax.conv_general_dilated(
        video.reshape(6, 8, 12, 3), kernel, (4, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = patchify(video, (4, 2)) @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(found, expected.reshape(2, 3, 12, 5), atol=1e-5)
    np.testing.assert_array_equal(unpatchify(patchify(video, (4, 2)), (2, 6), (4, 2)), video)


@pytest.mark.parametrize(("size", "name"), [((9, 12), "height = 9"), ((8, 2), "width = 2")])
def test_frames_must_be_multiples_of_the_patch(size, name):
    with pytest.raises(ValueError, match=f"frame {name}; it must be a multiple of the patch size, 4"):
        grid_of(size, (4, 4))


def test_sincos_positions_are_the_formula():
    table = np.asarray(sincos_positions((2, 3), 12))
    for row in range(2):
        for column in range(3):
            w = [10000 ** (-k / 2) for k in range(3)]
            expected = [f(at * x) for at in (column, row) for f in (math.sin, math.cos) for x in w]
            np.testing.assert_allclose(table[row * 3 + column], expected, atol=1e-6)
    with pytest.raises(ValueError, match="width = 10; sincos2d positions need a multiple of 4"):
        sincos_positions((2, 2), 10)


def test_positions_are_resized():
    """The same grid is untouched, constants stay, a smooth ramp is followed, axes are not confused."""
    table = normal(12, 5)
    assert resize_positions(table, (3, 4), (3, 4)) is table
    np.testing.assert_allclose(resize_positions(jnp.ones((12, 5)), (3, 4), (5, 7)), 1, atol=1e-6)
    rows = jnp.repeat(jnp.arange(8.0), 8)[:, None]  # value = row
    tall = resize_positions(rows, (8, 8), (16, 8)).reshape(16, 8)
    np.testing.assert_allclose(tall[4:12], np.tile((np.arange(4, 12)[:, None] + 0.5) / 2 - 0.5, 8), atol=1e-5)
    flat = resize_positions(rows, (8, 8), (8, 16)).reshape(8, 16)
    np.testing.assert_allclose(flat, np.tile(np.arange(8.0)[:, None], 16), atol=1e-5)
    small = resize_positions(normal(64, 5), (8, 8), (4, 2))
    assert small.shape == (8, 5)
    with pytest.raises(ValueError, match="the table has 12 positions"):
        resize_positions(table, (3, 3), (4, 4))


def test_layer_norm_is_the_formula_and_keeps_the_dtype():
    x = normal(4, 6) * 10 + 3
    params = {"scale": normal(6, seed=1), "bias": normal(6, seed=2)}
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    expected = expected * np.asarray(params["scale"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(layer_norm(x, params), expected, atol=2e-6)
    assert layer_norm(x.astype(jnp.bfloat16), params).dtype == jnp.bfloat16


def test_dropout_keeps_the_mean():
    x = jnp.ones((100, 100))
    assert dropout(x, 0.3, None) is x
    dropped = dropout(x, 0.3, jax.random.key(0))
    assert {round(v, 4) for v in np.unique(dropped).tolist()} == {0.0, round(1 / 0.7, 4)}
    assert abs(float(dropped.mean()) - 1) < 0.03


def test_bytes_become_fractions():
    np.testing.assert_array_equal(as_float(np.array([0, 255], np.uint8)), [0.0, 1.0])
    assert as_float(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


def test_gelu_left_to_cublas_is_the_same_up_to_bfloat16():
    """Forward in the product's dtype, as cuBLAS wants it written; backward as everywhere, in float32."""
    params = {"kernel": normal(16, 32), "bias": normal(32, seed=1)}
    x = normal(8, 16, seed=2).astype(jnp.bfloat16)

    def run(x, params):
        out = linear_gelu(x, params, "bfloat16")
        return jnp.sum(out * normal(8, 32, seed=3)), out.astype(jnp.float32)

    grad = jax.grad(run, (0, 1), has_aux=True)
    wanted, expected = grad(x, params)
    with compiling_for("gpu", "9.0"):
        grads, found = grad(x, params)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("tokens", "masked"), [(5, False), (5, True), (6, False), (6, True)])
def test_cudnn_is_given_even_lengths_to_differentiate(monkeypatch, tokens, masked):
    """Odd ones get a token that nothing attends to: same values, same gradients."""
    params = {f"{name}_proj": {"kernel": normal(8, 8, seed=i)} for i, name in enumerate("qkv")}
    params["out_proj"] = {"kernel": normal(8, 8, seed=4)}
    x, plain, lengths = normal(3, tokens, 8, seed=5), jax.nn.dot_product_attention, []

    def cudnn(q, k, v, implementation, key_value_seq_lengths=None, mask=None):
        lengths.append(q.shape[1])
        if mask is not None:
            assert mask.shape == (3, 1, q.shape[1], q.shape[1])  # heads are all it broadcasts over
        options = {"key_value_seq_lengths": key_value_seq_lengths, "mask": mask}
        return plain(q, k, v, **options, implementation="xla")

    mask = jnp.ones((3, 1, tokens), bool).at[1, 0, 2].set(False) if masked else None

    def run(x, implementation):
        out = attention(x, params, 2, "float32", implementation, mask)
        return jnp.sum(out * normal(3, tokens, 8, seed=6))

    expected = jax.value_and_grad(run)(x, "xla")
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    found = jax.value_and_grad(run)(x, "cudnn")
    assert lengths == [6]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(run(x, "cudnn"), expected[0], atol=1e-4, rtol=1e-5)
    assert lengths[1:] == [tokens]


@pytest.mark.parametrize(("asked", "sizes"), [(3, [4, 6]), (2, [2, 6]), (None, [6, 6])])
def test_cudnn_is_given_even_numbers_of_queries_and_of_keys(monkeypatch, asked, sizes):
    """Of 5 tokens, of which the last 3 (or 2) are asked for."""
    params = {f"{name}_proj": {"kernel": normal(8, 8, seed=i)} for i, name in enumerate("qkv")}
    params["out_proj"] = {"kernel": normal(8, 8, seed=4)}
    x, plain, lengths = normal(3, 5, 8, seed=5), jax.nn.dot_product_attention, []
    mask = jnp.ones((3, 5, 5), bool).at[:, 3, 2].set(False)

    def cudnn(q, k, v, implementation, key_value_seq_lengths=None, mask=None):
        lengths.extend([q.shape[1], k.shape[1]])
        return plain(q, k, v, key_value_seq_lengths=key_value_seq_lengths, mask=mask, implementation="xla")

    def run(x, implementation, asked):
        out = attention(x, params, 2, "float32", implementation, mask, asked)
        return jnp.sum((out * normal(3, 5, 8, seed=6)[:, 5 - out.shape[1] :])[:, -(asked or 5) :])

    def sliced(x):
        out = attention(x, params, 2, "float32", None, mask) * normal(3, 5, 8, seed=6)
        return jnp.sum(out[:, 5 - (asked or 5) :])

    expected = jax.value_and_grad(sliced)(x)
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    found = jax.value_and_grad(run)(x, "cudnn", asked)
    assert lengths == sizes
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 5])
def test_only_the_tokens_asked_for_are_computed(rows):
    """The last ones, as they come out of the whole block; the mask may be of all tokens or of each."""
    params = random_block(8, 12, 2)
    x = normal(2, 3, 5, 8)
    mask = jnp.asarray(np.random.default_rng(1).random((2, 3, rows, 5)) < 0.7).at[..., 0].set(True)
    whole = vit_block(x, params, 2, "float32", mask=mask)
    found = vit_block(x, params, 2, "float32", mask=mask, asked=2)
    assert found.shape == (2, 3, 2, 8)
    np.testing.assert_allclose(found, whole[..., 3:, :], atol=2e-6)


def random_block(width, mlp_size, heads):
    specs = vit_block_specs(width, mlp_size, heads)
    draw = np.random.default_rng(3)
    return unflatten_names(
        {name: jnp.asarray(0.4 * draw.normal(size=spec.shape), jnp.float32) for name, spec in specs.items()}
    )


def test_masked_keys_weigh_exactly_nothing():
    """Whatever they hold; the others see what they would without them; each query may have its own mask."""
    params = {f"{name}_proj": {"kernel": normal(8, 8, seed=i)} for i, name in enumerate("qkv")}
    params["out_proj"] = {"kernel": normal(8, 8, seed=4)}
    x = normal(3, 5, 8, seed=5)
    mask = jnp.array([True, True, False, True, False])

    def run(x, mask=None):
        return attention(x, params, 2, "float32", None, mask)

    found = run(x, jnp.broadcast_to(mask, (3, 1, 5)))
    other = run(x.at[:, [2, 4]].set(100.0), jnp.broadcast_to(mask, (3, 1, 5)))
    np.testing.assert_array_equal(found[:, mask], other[:, mask])
    np.testing.assert_allclose(found[:, mask], run(x[:, mask]), atol=1e-5)
    grad = jax.grad(lambda x: jnp.sum(run(x, jnp.broadcast_to(mask, (3, 1, 5)))[:, mask] ** 2))(x)
    assert not grad[:, ~mask].any()
    assert grad[:, mask].any(axis=-1).all()
    own = run(x, jnp.broadcast_to(jnp.eye(5, dtype=bool) | mask, (3, 5, 5)))
    np.testing.assert_array_equal(own[:, mask], found[:, mask])
    for token in (2, 4):
        seen = mask.at[token].set(True)
        wanted = run(x, jnp.broadcast_to(seen, (3, 1, 5)))[:, token]
        np.testing.assert_allclose(own[:, token], wanted, atol=1e-6)


def test_gelu_is_exact_on_request():
    x = np.linspace(-4, 4, 41)
    exact = [v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    tanh = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    params = {"kernel": jnp.eye(1), "bias": jnp.zeros(1)}
    for approximate, expected in ((False, exact), (True, tanh)):
        found = linear_gelu(jnp.asarray(x[:, None], jnp.float32), params, "float32", approximate)[:, 0]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(np.array(exact) - tanh).max() > 1e-4
