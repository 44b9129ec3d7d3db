"""Which kernels of ours a streamed frame has on Hopper, and which settings of them are refused."""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from kernels.common.dispatch import compiling_for
from models.tapnext import TAPNextRuntime, apply, init_state, prepare_params
from tests.models.tapnext.small_tapnext import queries, random_params, small, video

CONFIG = small(depth=2, width=64, mlp_size=128, lru_width=64, num_heads=1)
KERNEL = TAPNextRuntime(compute_dtype="bfloat16", gated_mlp="pallas_mosaic_gpu")
GATED, APART, FRAME = "gated_product", "product_in_parts", "frame_step"


def kernels_in_a_frame(runtime: TAPNextRuntime, *, joined: bool, platform: str = "gpu") -> Counter[str]:
    """Calls of functions that call a kernel: one function is compiled for all layers. 40 tokens: eights."""
    params = random_params(CONFIG)
    with compiling_for(*(("gpu", "9.0", "NVIDIA H100") if platform == "gpu" else ("cpu", None))):
        params = prepare_params(params, "bfloat16") if joined else params
        state = init_state(CONFIG, queries(4), dtype=jnp.bfloat16)
        step = jax.jit(functools.partial(apply, CONFIG, runtime))
        lowered = step.trace(params, video(4, 1), state=state).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    calls = Counter(re.findall(rf"call @({GATED}|{APART}|{FRAME})(?:_\d+)?\(", text))
    assert text.count("custom_call @mosaic_gpu") >= len(calls)
    return calls


def test_one_of_each_a_layer_where_parameters_are_joined():
    every = {GATED: CONFIG.depth, APART: CONFIG.depth, FRAME: CONFIG.depth}
    assert kernels_in_a_frame(KERNEL, joined=True) == every
    assert kernels_in_a_frame(dataclasses.replace(KERNEL, gated_mlp=None), joined=True) == every
    assert kernels_in_a_frame(KERNEL, joined=False) == {}
    without = dataclasses.replace(KERNEL, gated_mlp="xla", scan_implementation="xla_scan")
    assert kernels_in_a_frame(without, joined=True) == {APART: CONFIG.depth}


def test_none_elsewhere_or_in_float32():
    automatic = dataclasses.replace(KERNEL, gated_mlp=None)
    assert kernels_in_a_frame(automatic, joined=True, platform="cpu") == {}
    assert kernels_in_a_frame(TAPNextRuntime(), joined=True) == {}


@pytest.mark.usefixtures("unchecked_types")
def test_settings_that_cannot_run_are_refused():
    assert TAPNextRuntime().gated_mlp is None
    with pytest.raises(ValueError, match="gated_mlp = 'magic'; it must be one of"):
        TAPNextRuntime(gated_mlp="magic")
    with pytest.raises(ValueError, match="'xla' or None with compute_dtype='float32'"):
        TAPNextRuntime(gated_mlp="pallas_mosaic_gpu")
