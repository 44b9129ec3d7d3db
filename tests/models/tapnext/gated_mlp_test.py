"""`TAPNextRuntime.gated_mlp`: which programs have the kernel, and which settings are refused."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from kernels.common.dispatch import compiling_for
from models.tapnext import TAPNextRuntime, apply, init_state, prepare_params
from tests.models.tapnext.small_tapnext import queries, random_params, small, video

CONFIG = small(depth=2, width=64, mlp_size=128, lru_width=64)
KERNEL = TAPNextRuntime(compute_dtype="bfloat16", gated_mlp="pallas_mosaic_gpu")


def kernels_in_a_frame(runtime: TAPNextRuntime, *, joined: bool) -> int:
    params = random_params(CONFIG)
    with compiling_for("gpu", "9.0", "NVIDIA H100"):
        params = prepare_params(params, "bfloat16") if joined else params
        state = init_state(CONFIG, queries(1), dtype=jnp.bfloat16)
        step = jax.jit(functools.partial(apply, CONFIG, runtime))
        lowered = step.trace(params, video(1, 1), state=state).lower(lowering_platforms=("cuda",))
    # The layers call one function, which calls the kernel.
    text = lowered.as_text()
    assert text.count("custom_call @mosaic_gpu") <= 1
    return len(re.findall(r"call @forward(_\d+)?\(", text))


def test_one_kernel_a_layer_where_asked_for_and_parameters_are_joined():
    assert kernels_in_a_frame(KERNEL, joined=True) == CONFIG.depth
    assert kernels_in_a_frame(dataclasses.replace(KERNEL, gated_mlp=None), joined=True) == CONFIG.depth
    assert kernels_in_a_frame(KERNEL, joined=False) == 0
    assert kernels_in_a_frame(dataclasses.replace(KERNEL, gated_mlp="xla"), joined=True) == 0


@pytest.mark.usefixtures("unchecked_types")
def test_settings_that_cannot_run_are_refused():
    assert TAPNextRuntime().gated_mlp is None
    with pytest.raises(ValueError, match="gated_mlp = 'magic'; it must be one of"):
        TAPNextRuntime(gated_mlp="magic")
    with pytest.raises(ValueError, match="'xla' or None with compute_dtype='float32'"):
        TAPNextRuntime(gated_mlp="pallas_mosaic_gpu")
