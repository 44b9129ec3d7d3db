"""Chunked cross-entropy against the plain log-softmax, in value, gradients, memory and on a mesh."""

import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import fox
from tasks.common.optim import OptimConfig, make_optimizer
from tasks.common.state import TrainState
from tasks.common.step import make_train_step
from tasks.lm import losses

RUNTIME = fox.FoxRuntime(attention_implementation="reference")  # compiles fastest


def plain_losses(hidden, head, labels, mask):
    log_probs = jax.nn.log_softmax(hidden.astype(jnp.float32) @ head.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    return jnp.where(mask, -picked, 0.0)


def problem(batch=3, length=13, width=8, vocab=17, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(batch, length, width)), dtype)
    head = jnp.asarray(rng.normal(size=(width, vocab)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)
    mask = jnp.asarray(rng.random((batch, length)) < 0.7)
    return hidden, head, labels, mask


@pytest.mark.parametrize("length", [1, 7, 16])
@pytest.mark.parametrize("chunk", [1, 3, 5, 16, 100, None])
def test_value_and_gradients_equal_plain_log_softmax(length, chunk):
    hidden, head, labels, mask = problem(length=length)

    def chunked(hidden, head):
        total, count = losses.chunked_cross_entropy(hidden, head, labels, mask, chunk)
        return 1.7 * total / count

    def plain(hidden, head):
        return 1.7 * plain_losses(hidden, head, labels, mask).sum() / mask.sum()

    value, grads = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, head)
    expected, expected_grads = jax.value_and_grad(plain, (0, 1))(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(chunked(hidden, head), expected, rtol=1e-6)  # the path without gradients
    for got, want in zip(grads, expected_grads, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("chunk", [1, 4, 13, None])
def test_token_losses_and_their_gradients_equal_plain(chunk):
    hidden, head, labels, mask = problem()
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=labels.shape), jnp.float32)
    got, pull = jax.vjp(lambda h, w: losses.token_losses(h, w, labels, mask, chunk), hidden, head)
    want, pull_plain = jax.vjp(lambda h, w: plain_losses(h, w, labels, mask), hidden, head)
    np.testing.assert_allclose(got, want, atol=2e-6)
    for a, b in zip(pull(cotangent), pull_plain(cotangent), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_head_gradient_is_accumulated_in_float32_under_bfloat16_compute():
    """Many small equal contributions: a bfloat16 accumulator would stop growing near 256 of them."""
    length = 2048
    hidden = jnp.ones((1, length, 1), jnp.bfloat16)
    head = jnp.zeros((1, 2), jnp.float32)
    labels = jnp.zeros((1, length), jnp.int32)
    total, count = losses.chunked_cross_entropy(hidden, head, labels, None, 1)
    grad = jax.grad(lambda w: losses.chunked_cross_entropy(hidden, w, labels, None, 1)[0])(head)
    assert grad.dtype == jnp.float32
    assert count == length
    np.testing.assert_allclose(total, length * np.log(2), rtol=1e-5)
    np.testing.assert_allclose(grad, [[-length / 2, length / 2]], rtol=1e-6)


def test_bfloat16_compute_stays_close_to_float32():
    hidden, head, labels, mask = problem(length=40, width=32)
    run = lambda dtype: jax.value_and_grad(  # noqa: E731
        lambda h: losses.chunked_cross_entropy(h, head, labels, mask, 8, compute_dtype=dtype)[0]
    )(hidden)
    (exact, d_exact), (rough, d_rough) = run("float32"), run("bfloat16")
    assert d_rough.dtype == hidden.dtype
    np.testing.assert_allclose(rough, exact, rtol=1e-2)
    np.testing.assert_allclose(d_rough, d_exact, atol=0.05)
    assert not np.array_equal(rough, exact)


def test_mask_hides_labels_and_no_tokens_means_zero():
    hidden, head, labels, mask = problem()
    ignored = jnp.where(mask, labels, -100)
    a = losses.chunked_cross_entropy(hidden, head, labels, mask, 4)
    b = losses.chunked_cross_entropy(hidden, head, ignored, mask, 4)
    np.testing.assert_array_equal(a, b)
    nothing = jnp.zeros_like(mask)
    total, count = losses.chunked_cross_entropy(hidden, head, ignored, nothing, 4)
    grad = jax.grad(lambda w: losses.chunked_cross_entropy(hidden, w, ignored, nothing, 4)[0])(head)
    assert total == 0
    assert count == 0
    assert not np.any(grad)


@pytest.mark.parametrize("bad", [-1, 17])
def test_a_label_outside_the_vocabulary_gives_nan_not_a_plausible_loss(bad):
    hidden, head, labels, _ = problem()
    labels = labels.at[1, 2].set(bad)
    assert np.isnan(losses.chunked_cross_entropy(hidden, head, labels, None, 4)[0])
    assert np.isnan(losses.token_losses(hidden, head, labels, None, 4)).sum() == 1


def test_large_logits_do_not_overflow():
    hidden, head, labels, mask = problem()
    total, _ = losses.chunked_cross_entropy(hidden * 1e4, head, labels, mask, 4)
    np.testing.assert_allclose(total, plain_losses(hidden * 1e4, head, labels, mask).sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": jnp.zeros((9, 17))}, "same D"),
        ({"labels": jnp.zeros((3, 12), jnp.int32)}, "labels must have shape"),
        ({"mask": jnp.zeros((3, 12), bool)}, "mask must have"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    hidden, head, labels, mask = problem()
    arguments = {"hidden": hidden, "head": head, "labels": labels, "mask": mask, "chunk_size": 4} | change
    with pytest.raises(ValueError, match=message):
        # past the runtime shape checks of the test run, as in production
        losses._checked_weights(*(arguments[k] for k in ("hidden", "head", "labels", "mask", "chunk_size")))


def largest_float32(program: str) -> int:
    sizes = re.findall(r"f32\[([\d,]+)\]", program)
    return max(int(np.prod([int(n) for n in s.split(",")])) for s in sizes)


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_no_float32_array_of_all_logits_in_the_compiled_program(mode):
    batch, length, width, vocab = 2, 16384, 16, 50304
    shapes = (
        jax.ShapeDtypeStruct((batch, length, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
    )

    def train(hidden, head, labels):
        total = lambda h, w: losses.chunked_cross_entropy(h, w, labels)[0]  # noqa: E731
        return jax.value_and_grad(total, (0, 1))(hidden, head)

    compiled = jax.jit(train if mode == "train" else losses.token_losses).lower(*shapes).compile()
    limit = 1 << 28
    assert largest_float32(compiled.as_text()) <= limit < batch * length * vocab
    # at most three chunk-sized buffers, where the logits alone would be eight of those of float32
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * limit + 4 * width * vocab * 4


def test_default_chunk_never_covers_the_whole_sequence():
    assert losses.default_chunk_size(2, 16384, 50304) == 2048
    assert losses.default_chunk_size(1, 100, 256) == 25
    assert losses.default_chunk_size(64, 16384, 1 << 27) == 1


def test_default_chunk_divides_the_sequence_where_few_more_chunks_do_it():
    assert losses.default_chunk_size(1, 16384, 50304) == 4096
    assert losses.default_chunk_size(2, 16384 + 128, 50304) == -(-16512 // 7)  # 129 tiles: no small divisor
    assert losses.default_chunk_size(4, 8192, 16384) == 2048


def test_default_chunk_of_one_token():
    assert losses.default_chunk_size(1, 1, 256) == 1


MESH_PROGRAM = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from tasks.lm import losses

    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(8, 13, 8)).astype(np.float32)
    head = rng.normal(size=(8, 17)).astype(np.float32)
    labels = rng.integers(0, 17, (8, 13)).astype(np.int32)
    mask = rng.random((8, 13)) < 0.7
    cotangent = rng.normal(size=(8, 13)).astype(np.float32)

    def summed(hidden, head, labels, mask):
        total, count = losses.chunked_cross_entropy(hidden, head, labels, mask, 5)
        return total / count

    def each(hidden, head, labels, mask, cotangent):
        return jnp.sum(cotangent * losses.token_losses(hidden, head, labels, mask, 5))

    grad = lambda f: jax.jit(jax.value_and_grad(f, (0, 1)))
    expected = grad(summed)(hidden, head, labels, mask)
    expected_each = grad(each)(hidden, head, labels, mask, cotangent)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        h, y, m, c = (jax.device_put(x, rows) for x in (hidden, labels, mask, cotangent))
        w = jax.device_put(head, NamedSharding(mesh, P("fsdp")))
        for fn, want, args in ((summed, expected, ()), (each, expected_each, (c,))):
            value, (dh, dw) = grad(fn)(h, w, y, m, *args)
            np.testing.assert_allclose(value, want[0], rtol=1e-5)
            np.testing.assert_allclose(dh, want[1][0], atol=1e-5)
            np.testing.assert_allclose(dw, want[1][1], atol=1e-5)
            for got, like in ((dh, h), (dw, w)):
                assert got.sharding.is_equivalent_to(like.sharding, got.ndim), got.sharding
        program = grad(summed).lower(h, w, y, m).compile().as_text()
        in_loops = [l for l in program.splitlines() if "all-reduce" in l and "while" in l]
        assert not in_loops, in_loops
    print("equal on 8 devices")
"""


@pytest.mark.slow
def test_equal_on_a_mesh_of_eight_devices():
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": ".",
        "PATH": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MESH_PROGRAM)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal on 8 devices" in done.stdout


def lm_problem():
    config = fox.FoxConfig.preset("fox_llama", "tiny", vocab_size=17)
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 17, (4, 9)).astype(np.int32),
        "labels": rng.integers(0, 17, (4, 9)).astype(np.int32),
        "reset": rng.random((4, 9)) < 0.2,
        "loss_mask": rng.random((4, 9)) < 0.6,
    }
    return config, fox.init_params(config, jax.random.key(0)), batch


def test_lm_loss_is_the_mean_over_counted_tokens():
    config, params, host_batch = lm_problem()
    batch = jax.tree.map(jnp.asarray, host_batch)
    loss_fn = losses.lm_loss_fn(config, RUNTIME, chunk_size=4)
    loss, aux = loss_fn(params, batch, None)
    logits, _ = fox.apply(config, RUNTIME, params, batch["tokens"], reset=batch["reset"])
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    plain = -np.take_along_axis(log_probs, host_batch["labels"][..., None], axis=-1)[..., 0][
        batch["loss_mask"]
    ]
    np.testing.assert_allclose(loss, plain.mean(), rtol=1e-6)
    np.testing.assert_allclose(aux["loss"], (plain.sum(), plain.size), rtol=1e-6)
    assert aux["weight"] == plain.size
    batch["loss_mask"] = jnp.zeros_like(batch["loss_mask"])
    assert loss_fn(params, batch, None)[0] == 0
    whole = {k: v for k, v in batch.items() if k in ("tokens", "labels")}
    assert loss_fn(params, whole, None)[1]["weight"] == 36


@pytest.mark.slow
def test_micro_batches_with_unequal_masks_equal_the_whole_batch():
    config, params, batch = lm_problem()
    batch["loss_mask"][:2] = False
    batch["loss_mask"][0, 0] = True  # one counted token in one half, many in the other
    optimizer = make_optimizer(OptimConfig(peak_lr=1e-2, total=10), None)
    results = []
    for accum in (1, 2):
        step = make_train_step(losses.lm_loss_fn(config, RUNTIME), optimizer, seed=0, accum=accum)
        own = jax.tree.map(jnp.copy, params)
        state = TrainState(step=jnp.int32(0), params=own, opt_state=optimizer.init(own))
        micro = {k: v.reshape(accum, 4 // accum, *v.shape[1:]) for k, v in batch.items()}
        results.append(step(state, micro, jnp.float32(1e-2)))
    (one, metrics_one), (two, metrics_two) = results
    np.testing.assert_allclose(metrics_one["loss"], metrics_two["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics_one["grad_norm"], metrics_two["grad_norm"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # Adam's first step amplifies rounding of tiny gradients


def test_log_normaliser_in_one_pass_is_the_one_of_jax():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 50)) * 30, jnp.float32)
    logits = logits.at[0, 0, :49].set(-jnp.inf).at[0, 1].add(1e30).at[1, 0].set(-80.0)
    weights = jnp.arange(6.0).reshape(2, 3)

    def value_and_gradient(function):
        return jax.jit(jax.value_and_grad(lambda x: (function(x) * weights).sum()))(logits)

    np.testing.assert_allclose(
        losses._logsumexp_in_one_pass(logits), jax.nn.logsumexp(logits, axis=-1), rtol=2e-6
    )
    ours, theirs = (value_and_gradient(f) for f in (losses._logsumexp_in_one_pass, losses._logsumexp))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), ours, theirs)
    assert bool(jnp.isnan(losses._logsumexp_in_one_pass(logits.at[1, 1, 7].set(jnp.nan))[1, 1]))
    assert losses._logsumexp_in_one_pass(jnp.full((1, 4), -jnp.inf)) == -jnp.inf


def test_a_gpu_reads_the_logits_once():
    logits = jax.ShapeDtypeStruct((2, 8, 100), jnp.float32)
    reductions = {
        platform: jax.export.export(jax.jit(losses._log_normaliser), platforms=[platform])(logits)
        .mlir_module()
        .count("stablehlo.reduce(")
        for platform in ("cuda", "cpu")
    }
    assert reductions["cuda"] == 1
    assert reductions["cpu"] > 1
