"""Tiny FoX and Transformer models against the official code: logits, losses, gradients, padding, pruning, decoding.

Every model_*.npz of the golden folder is read by its own schema: options and sizes come from the file, and each
quantity it holds is checked. Weights go through `convert.from_official`.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.params import flatten_names
from models.fox import FoxConfig, FoxRuntime, apply, convert, init_state, param_specs, trainable_mask

pytestmark = pytest.mark.golden("model_*.npz", room="fox")

# Golden README, fp32 column.
TOLERANCE = {"logits": 1e-4, "loss": 2e-5, "grad": 5e-6, "threshold": 1e-4}

RUNTIME = FoxRuntime()
Golden = dict[str, np.ndarray]

run = jax.jit(apply, static_argnums=(0, 1), static_argnames=("output",))


def split_names(golden: Golden, group: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(group): value for name, value in golden.items() if name.startswith(group)}


def assert_close(actual: Any, expected: Any, kind: str, what: str) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=TOLERANCE[kind], err_msg=what)


def token_losses(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]


def check_logits(config: FoxConfig, params: Any, golden: Golden) -> None:
    logits, _ = run(config, RUNTIME, params, jnp.asarray(golden["input_ids"]))
    assert_close(logits, golden["logits"], "logits", "logits")
    assert_close(token_losses(logits, golden["labels"]), golden["loss_per_token"], "loss", "loss per token")


def check_gradients(config: FoxConfig, params: Any, golden: Golden) -> None:
    def loss(params: Any) -> jax.Array:
        logits, _ = apply(config, RUNTIME, params, jnp.asarray(golden["input_ids"]))
        return token_losses(logits, golden["labels"]).mean()

    grads = jax.jit(jax.grad(loss))(params)
    official = convert.to_official(grads, config)
    for name, expected in split_names(golden, "grad/").items():
        assert_close(official[name], expected, "grad", f"gradient of {name}")
    trainable = flatten_names(trainable_mask(grads))
    squares = sum(float(jnp.sum(g**2)) for name, g in flatten_names(grads).items() if trainable[name])
    assert np.sqrt(squares) == pytest.approx(float(golden["grad_global_norm"]), rel=1e-5)


def check_padding(config: FoxConfig, params: Any, golden: Golden) -> None:
    mask = golden["pad_attention_mask"].astype(bool)
    logits, _ = run(config, RUNTIME, params, jnp.asarray(golden["input_ids"]), mask=jnp.asarray(mask))
    assert_close(np.asarray(logits)[mask], golden["pad_logits"][mask], "logits", "logits after left padding")


def check_pruning(config: FoxConfig, params: Any, golden: Golden) -> None:
    runtime = FoxRuntime(log_pruning_tolerance=float(golden["acp_log_pruning_tolerance"]))
    tokens = jnp.asarray(golden["input_ids"])
    stats, _ = run(config, runtime, params, tokens, output="stats")
    assert_close(stats.threshold, golden["acp_thresholds"], "threshold", "thresholds [layer, batch, head]")
    logits, _ = run(config, runtime, params, tokens)
    assert_close(logits, golden["logits"], "logits", "logits with pruning")


def decode(
    config: FoxConfig, params: Any, prompt: np.ndarray, steps: int, mask: np.ndarray | None, chunks: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy continuation: the prompt in chunks of the given lengths, then single steps."""
    step = functools.partial(run, config, RUNTIME, params)
    state = init_state(config, prompt.shape[0], prompt.shape[1] + steps)
    for start, end in zip(np.cumsum([0, *chunks[:-1]]), np.cumsum(chunks), strict=True):
        part = None if mask is None else jnp.asarray(mask[:, start:end])
        logits, state = step(jnp.asarray(prompt[:, start:end]), state, mask=part)
    tokens, picked = [], []
    for _ in range(steps):
        picked.append(np.asarray(logits[:, -1]))
        tokens.append(picked[-1].argmax(-1).astype(np.int32))
        logits, state = step(jnp.asarray(tokens[-1][:, None]), state)
    return np.stack(tokens, 1), np.stack(picked, 1)


def check_decoding(config: FoxConfig, params: Any, golden: Golden, prefix: str) -> None:
    prompt, expected = golden[f"{prefix}_prompt"], golden[f"{prefix}_tokens"]
    mask = golden[f"{prefix}_attention_mask"].astype(bool) if prefix == "decpad" else None
    length = prompt.shape[1]
    for chunks in ([length], [5, 1, length - 6]):
        tokens, logits = decode(config, params, prompt, expected.shape[1], mask, chunks)
        np.testing.assert_array_equal(tokens, expected, err_msg=f"prompt in chunks of {chunks}")
        assert_close(logits, golden[f"{prefix}_logits"], "logits", f"prompt in chunks of {chunks}")


# What a file may hold: a key that says so, and the check.
CHECKS: dict[str, tuple[str, Callable[[FoxConfig, Any, Golden], None]]] = {
    "logits": ("logits", check_logits),
    "gradients": ("grad_global_norm", check_gradients),
    "padding": ("pad_logits", check_padding),
    "pruning": ("acp_thresholds", check_pruning),
    "decoding": ("dec_tokens", functools.partial(check_decoding, prefix="dec")),
    "padded decoding": ("decpad_tokens", functools.partial(check_decoding, prefix="decpad")),
}


def test_model_matches_the_official_code(golden_file, subtests):
    golden = dict(np.load(golden_file))
    config = convert.config_from_official(json.loads(str(golden["config_json"])))
    state_dict = split_names(golden, "param/")
    params = convert.from_official(state_dict, config)
    assert "logits" in golden
    for name, (key, check) in CHECKS.items():
        if key in golden:
            with subtests.test(name):
                check(config, params, golden)


def test_state_dict_survives_the_round_trip(golden_file):
    golden = dict(np.load(golden_file))
    config = convert.config_from_official(json.loads(str(golden["config_json"])))
    state_dict = split_names(golden, "param/")
    params = convert.from_official(state_dict, config)
    assert set(flatten_names(params)) == set(param_specs(config))
    back = convert.to_official(params, config)
    assert back.keys() == state_dict.keys()
    for name, array in state_dict.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
