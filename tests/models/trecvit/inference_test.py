"""Prepared parameters, and frames padded to whole groups of tokens on GPUs: the same results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common.dispatch import compiling_for
from kernels.common.hopper_rows import ROW_GROUP
from models.common.joined import is_joined
from models.trecvit import TRecViTRuntime, apply, init_state, prepare_params
from models.trecvit.state import padded_tokens
from tests.models.trecvit.small_trecvit import random_params, run, small, video

RUNTIME = TRecViTRuntime()
HEADS = [
    {"head": "classes", "pool": "gap", "use_mlp": True},
    {"head": "readout"},
    *(pytest.param({"head": name}, marks=pytest.mark.slow) for name in ("classes", "dense", "none")),
]


@pytest.mark.parametrize("options", HEADS, ids=lambda options: "-".join(map(str, options.values())))
def test_a_gpus_clips_and_streams_are_a_cpus(options):
    """No kernel takes them here: what is tested is the padding, and the joined maps."""
    config = small(depth=2, **options)
    params, frames = random_params(config), video(2, 3)
    output = "encoded" if config.head == "none" else "logits"
    expected, _ = run(config, RUNTIME, params, frames, output=output)
    with compiling_for("gpu", "8.0"):
        ready, state, parts = prepare_params(params, "float32"), init_state(config, 2), []
        assert is_joined(ready)
        tokens = state.layers["0"].lru.shape[1]
        assert (tokens % ROW_GROUP, config.num_tokens % ROW_GROUP == 0) == (0, False)
        found, _ = run(config, RUNTIME, ready, frames, output=output)
        for t in range(3):
            part, state = run(config, RUNTIME, ready, frames[:, t : t + 1], state, output=output)
            assert state.layers["1"].lru.shape[1] == tokens
            parts.append(part)
    np.testing.assert_allclose(found, expected, atol=3e-5)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=3e-5)


def test_padding_is_not_looked_at():
    """Whatever is in the memory of tokens that are not there."""
    config = small()
    params, frames = random_params(config), video(1, 2)
    with compiling_for("gpu", "8.0"):
        state = init_state(config, 1)
        _, state = run(config, RUNTIME, params, frames[:, :1], state)
        other = jax.tree.map(
            lambda x: x.at[:, config.num_tokens :].set(7.0) if x.ndim == 3 else x, state.layers
        )
        expected, _ = run(config, RUNTIME, params, frames[:, 1:], state)
        found, _ = run(config, RUNTIME, params, frames[:, 1:], state._replace(layers=other))
    np.testing.assert_array_equal(found, expected)


def test_on_cpus_nothing_is_joined_or_padded():
    config = small()
    params = random_params(config)
    assert padded_tokens(config.num_tokens) == config.num_tokens
    here = prepare_params(params, "bfloat16")
    assert not is_joined(here)
    assert here["layers"]["0"]["recurrent"]["linear_x"]["kernel"].dtype == jnp.bfloat16


def test_states_and_parameters_of_other_models_are_refused():
    config = small()
    params, frames = random_params(config), video(1, 1)
    with compiling_for("gpu", "8.0"):
        state, ready = init_state(config, 1), prepare_params(params, "float32")
        with pytest.raises(ValueError, match=r"(?s)not those of this TRecViTConfig.*linear_x\+linear_y"):
            run(small(state_multiplier=2), RUNTIME, ready, frames)
    with pytest.raises(ValueError, match="state was made for 8 tokens per frame, the model has 7"):
        apply(config, RUNTIME, params, frames, state)
