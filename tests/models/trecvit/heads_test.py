"""Heads against their definitions: clips, running mean, attention over everything seen, patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.layers import linear
from models.common.vit import layer_norm, mlp
from models.trecvit import TRecViTRuntime, heads, split_clips
from tests.models.trecvit.small_trecvit import QUICK_COMPILE, random_params, run, small, video

RUNTIME = TRecViTRuntime()


def jitted(function):
    return jax.jit(function, compiler_options=QUICK_COMPILE)


@pytest.mark.parametrize(
    ("frames", "expected"),
    [(1, (1, 1)), (3, (1, 3)), (4, (1, 4)), (6, (1, 6)), (8, (2, 4)), (10, (2, 5)), (12, (3, 4))],
)
def test_clip_rule(frames, expected):
    assert split_clips(frames, 4) == expected


def test_frames_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"9 frames make 2 clips of frames_per_clip = 4.*for instance to 8"):
        split_clips(9, 4)


@pytest.mark.parametrize("head", ["classes", "readout"])
def test_clips_are_averaged(head):
    """Three clips in one video: each as if alone; probabilities are the mean of softmaxes."""
    config = small(head=head)
    params, x = random_params(config), video(2, 12)
    output, state = run(config, RUNTIME, params, x, output="clip")
    alone = [run(config, RUNTIME, params, x[:, i : i + 4], output="clip")[0] for i in (0, 4, 8)]
    assert state is None
    np.testing.assert_allclose(output.logits, np.mean([one.logits for one in alone], 0), atol=5e-6)
    np.testing.assert_allclose(output.probs, np.mean([one.probs for one in alone], 0), atol=5e-6)
    assert float(jnp.abs(output.probs - jax.nn.softmax(output.logits)).max()) > 1e-5


def test_running_mean():
    x, before = video(2, 9)[:, :, 0, 0], jnp.ones((2, 3))
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3], [3, 4, 5, 0, 1, 2, 3, 4, 5]])
    means, last = jitted(heads.running_mean)(x, positions, before)
    np.testing.assert_allclose(means[0, 4], x[0, :5].mean(0), atol=1e-6)
    np.testing.assert_allclose(means[0, 8], x[0, 5:].mean(0), atol=1e-6)
    np.testing.assert_allclose(means[1, 2], (3 * before[1] + x[1, :3].sum(0)) / 6, atol=1e-6)
    np.testing.assert_allclose(last[1], x[1, 3:].mean(0), atol=1e-6)


def test_readout_attends_to_every_token_of_the_clip_so_far():
    """One softmax over space and time, as the definition has it, at scores that overflow without care."""
    config = small(head="readout")
    params = jax.tree.map(lambda p: p, random_params(config))
    params["head"]["query"] = params["head"]["query"] * 300
    head = params["head"]
    encoded = jax.random.normal(jax.random.key(3), (2, 5, 7, 16))
    positions = jnp.array([[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]])
    stream = jitted(lambda *args: heads.stream_readout(config, RUNTIME, *args)[0])
    logits = stream(params, encoded, positions)

    @jitted
    def direct(head, seen):
        tokens = layer_norm(seen.reshape(-1, 16), head["norm"])
        k, v = (linear(tokens, head["attn"][n], "float32").reshape(-1, 2, 8) for n in ("k_proj", "v_proj"))
        q = linear(head["query"], head["attn"]["q_proj"], "float32").reshape(2, 8)
        scores = jnp.einsum("nh,snh->ns", q, k) / 8**0.5
        pooled = jnp.einsum("ns,snh->nh", jax.nn.softmax(scores), v).reshape(-1)
        z = head["query"] + linear(pooled, head["attn"]["out_proj"], "float32")
        z = z + mlp(layer_norm(z, head["mlp_norm"]), head["mlp"], "float32")
        return linear(layer_norm(z, head["final_norm"]), head["classes"], "float32"), jnp.abs(scores).max()

    for row, t, first in ((0, 1, 0), (0, 4, 3), (1, 4, 3)):
        expected, largest = direct(head, encoded[row, first : t + 1])
        assert float(largest) > 88
        np.testing.assert_allclose(logits[row, t], expected, atol=2e-5)


def test_dense_head_follows_the_grid():
    config = small(head="dense")
    params, encoded = random_params(config), jax.random.normal(jax.random.key(3), (1, 2, 7, 16))
    logits = heads.dense_classes(config, RUNTIME, params, encoded)
    assert logits.shape == (1, 2, 2, 3, 5)
    expected = linear(encoded[0, 1, 1 + 1 * 3 + 2], params["head"]["classes"], "float32")
    np.testing.assert_allclose(logits[0, 1, 1, 2], expected, atol=2e-6)
