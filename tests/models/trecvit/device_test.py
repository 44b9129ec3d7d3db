"""The model on a GPU, prepared for inference: its kernels against layers in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common.compiler import compiler_options
from models.common.recurrent_state import handed_over, taken_over
from models.trecvit import TRecViTConfig, TRecViTRuntime, apply, init_params, init_state, prepare_params

pytestmark = pytest.mark.gpu

CLIPS, FRAMES = 2, 8
# Few enough frames for clips of few tokens to be worth a kernel.
SMALL = {"image_size": (112, 80), "depth": 3, "frames_per_clip": FRAMES, "num_classes": 50}
# Groups of 64 and of 128 channels; 36 tokens a frame, padded to 40.
CONFIGS = {
    "paper": TRecViTConfig(**SMALL, width=384, num_heads=6, mlp_size=1536),
    "released": TRecViTConfig(**SMALL, width=384, num_heads=6, mlp_size=1536, state_multiplier=2),
}


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_clips_and_streams_are_what_float32_makes_of_them(name: str, scan_layers: bool) -> None:
    config = CONFIGS[name]
    params = init_params(config, jax.random.key(0))
    video = np.random.default_rng(0).integers(0, 256, (CLIPS, FRAMES, *config.image_size, 3), np.uint8)
    exact = TRecViTRuntime()
    half = TRecViTRuntime(compute_dtype="bfloat16", attention_implementation="cudnn", scan_layers=scan_layers)
    ready = prepare_params(params, "bfloat16")

    def encoded(runtime: TRecViTRuntime, params: object, frames: jax.Array) -> jax.Array:
        run = jax.jit(
            lambda params, frames: apply(config, runtime, params, frames, output="encoded")[0],
            compiler_options=compiler_options(),
        )
        if runtime is half:
            assert "recurrent_clip" in str(run.trace(params, frames).jaxpr)
        return run(params, frames)

    @functools.partial(jax.jit, donate_argnums=1, compiler_options=compiler_options())
    def step(frames: jax.Array, state: object) -> tuple[jax.Array, object]:
        return apply(config, half, ready, frames, taken_over(state), output="encoded")

    with jax.default_matmul_precision("highest"):
        wanted = np.asarray(encoded(exact, params, video))
    state, parts = init_state(config, CLIPS, "bfloat16"), []
    # One frame a call, and several: two kernels, one memory.
    for begin, end in ((0, 1), (1, 2), (2, 5), (5, 6), (6, FRAMES)):
        part, state = step(jnp.asarray(video[:, begin:end]), handed_over(state))
        parts.append(np.asarray(part))
    scale = np.abs(wanted).max()
    for found in (np.asarray(encoded(half, ready, video)), np.concatenate(parts, axis=1)):
        assert np.abs(found - wanted).max() < 0.02 * scale
        assert np.abs(found - wanted).mean() < 0.01 * np.abs(wanted).mean()
