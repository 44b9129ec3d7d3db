"""Frames split over devices: losses and gradients of a whole clip, states handed from device to device."""

import pytest

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from models.tapnext import TAPNextRuntime, apply, param_axes
from models.common.sharding import ShardingRules, param_shardings
from tests.models.tapnext.small_tapnext import QUICK_COMPILE, queries, random_params, small, video

config, runtime = small(depth=2), TAPNextRuntime(remat="full", scan_layers=True)
params, clip, asked = random_params(config), video(2, 12), queries(2)
weights = jax.random.normal(jax.random.key(3), (2, 4, 12, 20))

def loss(params, clip, asked, reset):
    output, _ = apply(config, runtime, params, clip, asked, reset=reset, layers=True)
    deep = jnp.mean(output.layers.track_logits * weights)
    return jnp.mean(output.track_logits * weights) + deep + jnp.mean(output.visible_logits ** 2), output

for reset in (None, jnp.zeros((2, 12), bool).at[0, 5].set(True)):
    run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK_COMPILE)
    (expected, whole), gradients = run(params, clip, asked, reset)
    for shape in ((1, 1, 4), (1, 2, 2)) if reset is None else ((2, 1, 2),):
        mesh = jax.make_mesh(shape, ("data", "fsdp", "time"))
        with jax.set_mesh(mesh):
            split = jax.device_put(params, param_shardings(params, param_axes(config), mesh, ShardingRules()))
            (value, output), found = run(split, clip, asked, reset)
            assert "time" in str(jax.typeof(output.tracks_yx)), jax.typeof(output.tracks_yx)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(output.track_logits, whole.track_logits, atol=2e-5)
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
        leaves = jax.tree.leaves_with_path(gradients)
        for (path, one), many in zip(leaves, jax.tree.leaves(found), strict=True):
            scale = max(float(jnp.abs(one).max()), largest / 100)  # key biases have no gradient but noise
            np.testing.assert_allclose(many, one, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))
print("equal")
"""

SHORT = """
import jax
from models.tapnext import TAPNextRuntime, apply
from tests.models.tapnext.small_tapnext import queries, random_params, small, video

config = small(conv_width=4)
with jax.set_mesh(jax.make_mesh((1, 1, 4), ("data", "fsdp", "time"))):
    try:
        apply(config, TAPNextRuntime(), random_params(config), video(1, 8), queries(1))
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow  # compiles five steps
def test_frames_split_over_devices_change_nothing(run_python) -> None:
    """Alone, beside fsdp=2, beside data=2, parameters split, layers scanned, and a reset in mid-clip."""
    assert run_python("-c", PROGRAM, devices=4, env={"NPROC": "8"}).stdout.strip() == "equal"


@pytest.mark.slow
def test_a_convolution_longer_than_a_devices_frames_is_refused(run_python) -> None:
    said = run_python("-c", SHORT, devices=4, env={"NPROC": "8"}).stdout
    assert "8 frames over 4 devices: the convolution needs 3 frames on each" in said
