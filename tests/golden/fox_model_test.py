"""Tiny models against the official code: logits, losses, gradients, padding, pruning, decoding.

Every model_*.npz of the golden folder is read by its own schema: options and sizes come from the file, and
each quantity it holds is checked. Weights go through `convert.from_official`.
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

# Many small programs that run once each: half the compile time for the same arithmetic.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
run = jax.jit(apply, static_argnums=(0, 1), static_argnames=("output",), compiler_options=QUICK_COMPILE)


def split_names(golden: Golden, group: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(group): value for name, value in golden.items() if name.startswith(group)}


def assert_close(actual: Any, expected: Any, kind: str, what: str) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=TOLERANCE[kind], err_msg=what)


def token_losses(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]


def check_training(config: FoxConfig, params: Any, golden: Golden) -> None:
    def loss(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits, _ = apply(config, RUNTIME, params, jnp.asarray(golden["input_ids"]))
        losses = token_losses(logits, golden["labels"])
        return losses.mean(), (logits, losses)

    grads, (logits, losses) = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert_close(logits, golden["logits"], "logits", "logits")
    assert_close(losses, golden["loss_per_token"], "loss", "loss per token")
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


def check_decoding(config: FoxConfig, params: Any, golden: Golden, prefix: str) -> None:
    """Greedy continuation: the prompt whole, or in two chunks if it is padded; then single steps."""
    prompt, expected = golden[f"{prefix}_prompt"], golden[f"{prefix}_tokens"]
    rows, length = prompt.shape
    mask = golden[f"{prefix}_attention_mask"].astype(bool) if prefix == "decpad" else None
    # One buffer size for both kinds of prompt: the single step is compiled once per file.
    totals = {
        kind: golden[f"{kind}_prompt"].shape[1] + golden[f"{kind}_tokens"].shape[1]
        for kind in ("dec", "decpad")
        if f"{kind}_prompt" in golden
    }
    step = functools.partial(run, config, RUNTIME, params)
    state = init_state(config, rows, max(totals.values()))
    for part in np.array_split(np.arange(length), 1 if mask is None else 2):
        logits, state = step(
            jnp.asarray(prompt[:, part]), state, mask=None if mask is None else jnp.asarray(mask[:, part])
        )
    for s in range(expected.shape[1]):
        assert_close(logits[:, -1], golden[f"{prefix}_logits"][:, s], "logits", f"logits of step {s}")
        token = np.asarray(logits[:, -1]).argmax(-1).astype(np.int32)
        np.testing.assert_array_equal(token, expected[:, s], err_msg=f"token of step {s}")
        logits, state = step(jnp.asarray(token[:, None]), state)


# What a file may hold: a key that says so, and the check.
CHECKS: dict[str, tuple[str, Callable[[FoxConfig, Any, Golden], None]]] = {
    "logits, losses, gradients": ("grad_global_norm", check_training),
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
