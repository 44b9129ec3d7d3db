"""The model on a GPU, whose compiler fuses what the CPU's does not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common.compiler import compiler_options
from models.tapnext import TAPNextConfig, TAPNextRuntime, apply, init_params, init_state

pytestmark = pytest.mark.gpu

CONFIG = TAPNextConfig(
    image_size=(128, 128), patch_size=(8, 8), width=192, depth=2, mlp_size=768, num_heads=3
)
CLIPS, FRAMES, POINTS = 4, 24, 64


@pytest.mark.parametrize("scan_layers", [False, True])
def test_clips_of_a_batch_are_as_alone_and_as_streamed(scan_layers: bool) -> None:
    """Whole clips of these sizes were wrong once, see `models.tapnext.model.point_features`."""
    rng = np.random.default_rng(0)
    params = init_params(CONFIG, jax.random.key(0))
    video = rng.integers(0, 256, (CLIPS, FRAMES, 128, 128, 3), np.uint8)
    query_tyx = rng.uniform(0, 128, (CLIPS, POINTS, 3)).astype(np.float32)
    query_tyx[..., 0] = rng.integers(0, FRAMES, (CLIPS, POINTS))
    runtime = TAPNextRuntime(scan_layers=scan_layers)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def run(video: jax.Array, query_tyx: jax.Array) -> jax.Array:
        return apply(CONFIG, runtime, params, video, query_tyx)[0].track_logits

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def step(video: jax.Array, state: object) -> tuple[jax.Array, object]:
        streamed = dataclasses.replace(runtime, scan_layers=False)
        output, state = apply(CONFIG, streamed, params, video, state=state)
        return output.track_logits, state

    with jax.default_matmul_precision("highest"):
        whole = np.asarray(run(video, query_tyx))
        alone = [run(video[i, None], query_tyx[i, None]) for i in range(CLIPS)]
        state, parts = init_state(CONFIG, jnp.asarray(query_tyx)), []
        for t in range(FRAMES):
            part, state = step(video[:, t, None], state)
            parts.append(part)
    scale = np.abs(whole).max()
    for other in (np.concatenate(alone), np.concatenate(parts, axis=2)):
        np.testing.assert_allclose(other, whole, atol=1e-3 * scale)
