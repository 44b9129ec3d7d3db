"""RG-LRU, convolution, blocks and whole TRecViT classifiers against the official code.

Every file of the golden folder is read by its own schema: what a case is, its sizes and options come from the
names and shapes it holds, and each quantity it holds is checked. Weights go through `models.trecvit.convert`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common import rglru, vit
from models.common.block_diagonal import block_diagonal
from models.common.official import read_leaves
from models.common.params import ZEROS, ParamSpec, flatten_names
from models.common.temporal_conv import temporal_conv
from models.trecvit import TRecViTConfig, TRecViTRuntime, apply, convert, heads, init_state
from models.trecvit.model import tokenize

# Golden README: float32 on CPU.
LAYER = {"rtol": 1e-5, "atol": 2e-6}
HALF = {"rtol": 0, "atol": 0.05}  # cases computed in bfloat16 by the official code
FEATURES = {"rtol": 0, "atol": 1e-5}
LOGITS = {"rtol": 0, "atol": 3e-6}
GRADIENT = 2e-5  # of the leaf's largest entry
KEY_BIAS = 1e-7  # its gradient is zero in theory

QUICK_COMPILE = {"xla_backend_optimization_level": 0}
RUNTIME = TRecViTRuntime()
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def below(golden: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


def cases(golden: Arrays) -> dict[str, Arrays]:
    names = dict.fromkeys(name.split("/")[0] for name in golden)
    return {name: below(golden, f"{name}/") for name in names}


def assert_close(actual: Any, expected: np.ndarray, what: str, tolerance: dict[str, float]) -> None:
    actual = np.asarray(jnp.asarray(actual, jnp.float32)).reshape(expected.shape)
    np.testing.assert_allclose(actual, expected, err_msg=what, **tolerance)


def assert_gradients(found: Arrays, expected: Arrays) -> None:
    for name, gradient in expected.items():
        error = np.abs(np.asarray(found[name]).reshape(gradient.shape) - gradient).max(initial=0)
        scale = gradient
        if name.endswith("key/bias"):  # zero in theory: measured by its kernel, and never below KEY_BIAS
            scale = expected[name.replace("bias", "kernel")]
        limit = GRADIENT * np.abs(scale).max(initial=0)
        limit = max(limit, KEY_BIAS) if name.endswith("key/bias") else limit
        assert error <= limit, f"gradient of {name}: off by {error:.3g}, allowed {limit:.3g}"


def jitted(function: Any) -> Any:
    return jax.jit(function, compiler_options=QUICK_COMPILE)


def run_layer(case: Arrays, specs: Any, call: Any, params: Any, inputs: Arrays) -> Any:
    """Outputs of `call(params, **inputs)`, its first being y.

    Checks the gradients of sum(y dy) (+ sum(h_last dh_last)) in the parameters and inputs that the file has.
    """
    primals = {name: jnp.asarray(value) for name, value in inputs.items()}

    @jitted
    def outputs_and_gradients(params: Any, primals: Any) -> Any:
        outputs, pull = jax.vjp(lambda params, primals: call(params, **primals), params, primals)
        cotangents = [jnp.zeros_like(leaf) for leaf in jax.tree.leaves(outputs)]
        for i, name in enumerate(("dy", "dh_last")):
            if name in case:
                cotangents[i] = jnp.asarray(case[name], cotangents[i].dtype)
        return outputs, pull(jax.tree.unflatten(jax.tree.structure(outputs), cotangents))

    outputs, (d_params, d_inputs) = outputs_and_gradients(params, primals)
    if "dy" in case:
        expected = below(case, "dparams/")
        found = convert.write_leaves(specs, d_params)
        assert set(expected) == set(found)
        assert_gradients(found, expected)
        given = {name: case[f"d{name}"] for name in inputs if f"d{name}" in case}
        assert_gradients(d_inputs, given)
    return outputs


def check_rg_lru(case: Arrays) -> None:
    specs = rglru.rg_lru_specs(
        case["x"].shape[-1], int(case["num_heads"]), 0.5, real=bool(case.get("only_real", 1))
    )
    params = read_leaves(specs, below(case, "params/"))
    dtype = str(case.get("compute_dtype", "float32"))
    tolerance = LAYER if dtype == "float32" else HALF
    positions = jnp.asarray(case["segment_pos"])
    inputs = {name: case[name] for name in ("x", "h0") if name in case}

    def call(params: Any, x: Any, h0: Any = None) -> Any:
        return rglru.rg_lru(x.astype(dtype), params, positions, h0, dtype)

    outputs = run_layer(case, specs, call, params, inputs)
    assert outputs[0].dtype == jnp.dtype(dtype)
    assert outputs[1].dtype == jnp.float32
    assert_close(outputs[0], case["y"], "y", tolerance)
    assert_close(outputs[1], case["h_last"], "h_last", tolerance)
    for gate in ("input_gate", "a_gate"):
        if f"{gate}_preact" in case:
            preact = block_diagonal(jnp.asarray(case["x"], dtype), params[gate], dtype)
            assert_close(preact, case[f"{gate}_preact"], gate, tolerance)
    if "y_decode" in case:
        step = jitted(rglru.rg_lru)
        h = jnp.asarray(case["h0"]) if "h0" in case else jnp.zeros_like(outputs[1])
        for t in range(case["x"].shape[1]):
            y, h = step(jnp.asarray(case["x"][:, t : t + 1]), params, positions[:, t : t + 1], h)
            assert_close(y, case["y_decode"][:, t : t + 1], f"y of step {t}", LAYER)
            assert_close(h, case["h_decode"][:, t], f"state after step {t}", LAYER)


def check_radius(case: Arrays) -> None:
    found = rglru.a_param_from_uniform(jnp.asarray(case["u"]), float(case["min_rad"]), float(case["max_rad"]))
    # Lambda = log(1/radius - 1) near radius 0.999 magnifies the rounding of the radius a thousandfold.
    assert_close(found, case["a_param"], "a_param", {"rtol": 1e-5, "atol": 1e-5})
    assert_close(jnp.exp(-jax.nn.softplus(found)), case["radius"], "radius", LAYER)


def check_conv(case: Arrays) -> None:
    specs = {
        "kernel": ParamSpec(case["params/w"].shape, (None, "norm"), ZEROS, "w"),
        "bias": ParamSpec(case["params/b"].shape, ("norm",), ZEROS, "b"),
    }
    params = read_leaves(specs, below(case, "params/"))
    positions = jnp.asarray(case["segment_pos"])

    def call(params: Any, x: Any) -> Any:
        return temporal_conv(x, params, positions)

    outputs = run_layer(case, specs, call, params, {"x": case["x"]})
    assert_close(outputs[0], case["y"], "y", LAYER)
    assert_close(jnp.stack(outputs[1], axis=1), case["cache"], "cache", LAYER)
    if "x_decode" not in case:
        return
    x, positions = jnp.asarray(case["x_decode"]), jnp.asarray(case["segment_pos_decode"])
    step = jitted(temporal_conv)
    y, cache = step(x, params, positions, outputs[1])
    assert_close(y, case["y_decode"], "y of a chunk", LAYER)
    assert_close(jnp.stack(cache, axis=1), case["cache_decode"][:, -1], "cache after a chunk", LAYER)
    cache = outputs[1]
    for t in range(x.shape[1]):
        y, cache = step(x[:, t : t + 1], params, positions[:, t : t + 1], cache)
        assert_close(y, case["y_decode"][:, t : t + 1], f"y of step {t}", LAYER)
        assert_close(jnp.stack(cache, axis=1), case["cache_decode"][:, t], f"cache after step {t}", LAYER)


def check_recurrent(case: Arrays) -> None:
    """A recurrent block, alone or with its norm, residual and MLP."""
    is_residual = "params/temporal_pre_norm/scale" in case
    prefix = "" if is_residual else "recurrent_block/"
    flat = {prefix + name: value for name, value in below(case, "params/").items()}
    down = flat.get("mlp_block/ffw_down/kernel")
    table = rglru.residual_block_specs(
        width=case["x"].shape[-1],
        recurrent_width=flat["recurrent_block/linear_x/bias"].shape[0],
        num_blocks=int(case["num_heads"]),
        taps=int(case["temporal_width"]),
        num_layers=1,
        min_rad=0.5,
        channel_mlp_size=None if down is None else down.shape[0],
    )
    specs = {name: spec for name, spec in table.items() if spec.official in flat}
    assert len(specs) == len(flat)
    params = read_leaves(specs, flat)

    def step(params: Any, x: Any, positions: Any, state: Any = None) -> Any:
        if is_residual:
            return rglru.residual_block(x, params, positions, state)
        return rglru.recurrent_block(x, params["recurrent"], positions, state)

    def call(params: Any, x: Any, step: Any = step) -> Any:
        return step(params, x, jnp.asarray(case["segment_pos"]))

    renamed = {name.replace("dparams/", f"dparams/{prefix}"): value for name, value in case.items()}
    outputs = run_layer(renamed, specs, call, params, {"x": case["x"]})
    assert_close(outputs[0], case["y"], "y", LAYER)
    assert_close(outputs[1].lru, case["rg_lru_state"], "recurrent state", LAYER)
    assert_close(jnp.stack(outputs[1].conv, axis=1), case["conv1d_state"], "convolution state", LAYER)
    if "x_decode" not in case:
        return
    x, positions = jnp.asarray(case["x_decode"]), jnp.asarray(case["segment_pos_decode"])
    step = jitted(step)
    for sizes in ([x.shape[1]], [1] * x.shape[1]):
        state, parts, start = outputs[1], [], 0
        for size in sizes:
            part = slice(start, start + size)
            y, state = step(params, x[:, part], positions[:, part], state)
            parts.append(y)
            start += size
        what = f"continued in chunks of {sizes[0]}"
        assert_close(jnp.concatenate(parts, 1), case["y_decode"], f"y {what}", LAYER)
        assert_close(state.lru, case["rg_lru_state_decode"], f"recurrent state {what}", LAYER)
        assert_close(
            jnp.stack(state.conv, axis=1), case["conv1d_state_decode"], f"convolution state {what}", LAYER
        )


def check_vit(case: Arrays) -> None:
    x, num_heads = jnp.asarray(case["x"]), int(case["num_heads"])
    mlp_size = case["params/MlpBlock_0/Dense_0/bias"].shape[0]
    specs = vit.vit_block_specs(x.shape[-1], mlp_size, num_heads)
    params = read_leaves(specs, below(case, "params/"))

    def call(params: Any, x: Any) -> Any:
        normed = vit.layer_norm(x, params["attn_norm"])
        attended = vit.attention(normed, params["attn"], num_heads, "float32")
        update = vit.mlp(vit.layer_norm(x + attended, params["mlp_norm"]), params["mlp"], "float32")
        return vit.vit_block(x, params, num_heads, "float32"), attended, x + attended, update

    outputs = run_layer(case, specs, call, params, {"x": case["x"]})
    for name, found in zip(("y", "sa", "plus_sa", "mlp"), outputs, strict=True):
        if name in case:
            assert_close(found, case[name], name, LAYER)


# What a case is, by a name it holds.
KINDS = {
    "params/a_param": check_rg_lru,
    "u": check_radius,
    "params/w": check_conv,
    "params/linear_x/kernel": check_recurrent,
    "params/recurrent_block/linear_x/kernel": check_recurrent,
    "params/LayerNorm_0/scale": check_vit,
}


@pytest.mark.golden("rglru.npz", "blocks.npz", room="trecvit")
def test_layers_match_the_official_code(golden_file, subtests):
    checked = 0
    for name, case in cases(dict(np.load(golden_file))).items():
        for key, check in KINDS.items():
            if key in case:
                checked += 1
                with subtests.test(name):
                    check(case)
    assert checked >= 1


def config_of(golden: Arrays) -> TRecViTConfig:
    sizes = below(golden, "config/")
    mlp = golden.get("params/encoder/residualblock_00/mlp_block/ffw_down/kernel")
    return TRecViTConfig(
        image_size=golden["video"].shape[2:4],
        patch_size=tuple(int(size) for size in sizes["patch_size"][1:]),
        width=int(sizes["width"]),
        depth=int(sizes["depth"]),
        mlp_size=int(sizes["mlp_dim"]),
        num_heads=int(sizes["num_heads"]),
        state_multiplier=int(sizes["state_multiplier"]),
        conv_width=int(sizes["conv1d_temporal_width"]),
        positions=str(sizes["posemb"]),
        pool=str(sizes["pool_type"]),
        use_mlp=bool(sizes["use_mlp"]),
        channel_mlp_size=None if mlp is None else mlp.shape[0],
        num_classes=int(sizes["num_classes"]),
        rep_size=int(sizes["rep_size"]),
        frames_per_clip=int(sizes["frames_per_clip"]),
    )


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_COMPILE)
def stages_of(config: TRecViTConfig, params: Any, video: Any) -> dict[str, Any]:
    """Everything the official forward pass keeps, by its names, with our axes [B, T, P, D]."""
    clips, size = heads.split_clips(video.shape[1], config.frames_per_clip)
    positions = jnp.broadcast_to(jnp.arange(clips * size) % size, video.shape[:2])
    x = tokenize(config, RUNTIME, params, video)
    stages = {"tokens": x}
    for name, layer in params["layers"].items():
        x, _ = rglru.residual_block(x, layer, positions)
        stages[f"inter/residualblock_{int(name):02d}"] = x
        x = vit.vit_block(x, layer, config.num_heads, "float32")
        stages[f"inter/encoderblock_{name}"] = x
    stages["encoded"] = vit.layer_norm(x, params["norm"])
    stages["head_input"] = heads.pool_tokens(config, stages["encoded"])
    features = heads.frame_features(config, params, stages["encoded"], "float32")
    stages["pre_logits"] = features.reshape(len(video), clips, size, -1).mean(axis=2)
    output, _ = apply(config, RUNTIME, params, video, output="clip")
    return stages | {"logits": output.logits, "probs": output.probs}


def check_stages(config: TRecViTConfig, params: Any, golden: Arrays) -> None:
    stages = stages_of(config, params, jnp.asarray(golden["video"]))
    clips, _ = heads.split_clips(golden["video"].shape[1], config.frames_per_clip)
    for name, found in stages.items():
        if name not in golden:
            continue
        if found.ndim == 4:
            found = found.reshape(len(found) * clips, -1, *found.shape[2:])
        if name.startswith("inter/residualblock"):  # one row per tube there
            found = jnp.swapaxes(found, 1, 2)
        tolerance = LOGITS if name in ("logits", "probs") else FEATURES
        assert_close(found, golden[name], name, tolerance)


def check_training(config: TRecViTConfig, params: Any, golden: Arrays) -> None:
    def loss(params: Any) -> Any:
        output, _ = apply(config, RUNTIME, params, jnp.asarray(golden["video"]), output="clip")
        picked = jnp.take_along_axis(jax.nn.log_softmax(output.logits), golden["labels"][:, None], axis=1)
        return -picked.mean()

    value, grads = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK_COMPILE)(params)
    assert_close(value, golden["loss"], "loss", LOGITS)
    found, expected = convert.to_official(grads, config), below(golden, "grads/")
    assert found.keys() == expected.keys()
    assert_gradients(found, expected)


def check_streaming(config: TRecViTConfig, params: Any, golden: Arrays) -> None:
    """Frame by frame and in chunks, the logits so far are those of the model run on frames 0..t."""
    step = jax.jit(apply, static_argnums=(0, 1), compiler_options=QUICK_COMPILE)
    video = jnp.asarray(golden["video"])
    frames = video.shape[1]
    for chunk in {1, max(frames // 2, 1)}:
        state = init_state(config, len(video))
        for start in range(0, frames, chunk):
            part = slice(start, start + chunk)
            logits, state = step(config, RUNTIME, params, video[:, part], state)
            assert_close(logits, golden["prefix_logits"][:, part], f"logits from frame {start}", LOGITS)


@pytest.mark.golden("tiny_*.npz", "mu_*.npz", room="trecvit")
def test_classifier_matches_the_official_code(golden_file, subtests):
    golden = dict(np.load(golden_file))
    config = config_of(golden)
    params = convert.from_official(below(golden, "params/"), config)
    with subtests.test("features, logits, probabilities"):
        check_stages(config, params, golden)
    if below(golden, "grads/"):
        with subtests.test("loss and gradients"):
            check_training(config, params, golden)
    if "prefix_logits" in golden:
        with subtests.test("streaming"):
            check_streaming(config, params, golden)


@pytest.mark.golden("tiny_*.npz", "mu_*.npz", room="trecvit")
def test_checkpoint_survives_the_round_trip(golden_file):
    golden = dict(np.load(golden_file))
    flat, config = below(golden, "params/"), config_of(golden)
    read = convert.config_from_official(flat, config.grid, frames_per_clip=config.frames_per_clip)
    assert read == config
    params = convert.from_official(flat, config)
    back = convert.to_official(params, config)
    assert back.keys() == flat.keys()
    for name, array in flat.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    assert len(flatten_names(params)) == len(flat)
