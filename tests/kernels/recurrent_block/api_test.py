"""Public function: what it computes, what it refuses, who is chosen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common.dispatch import ImplementationError, compiling_for
from kernels.explain import main
from kernels.linear_scan import rglru_scan
from kernels.recurrent_block import (
    BlockParams,
    Clip,
    Frame,
    Memory,
    explain,
    has_kernel,
    recurrent_clip,
    recurrent_frame,
)
from kernels.recurrent_block.api import IMPLEMENTATIONS, PREFERENCE, shapes
from kernels.recurrent_block.workloads import Workload, make_call


def call(work: Workload, dtype: str = "float32") -> tuple[Frame, BlockParams]:
    arrays, options = make_call(work)
    given = {name: jnp.asarray(x, "float32" if "gate" in name else dtype) for name, x in arrays.items()}
    taps = tuple(given[name] for name in given if name.startswith("tap"))
    frame = Frame(given["branches"], taps, given["gate_h"], options["positions"])
    names = ("gate_conv", "gate_conv_bias", "blocks", "gate_bias", "gate_rate")
    return frame, BlockParams(*(given[name] for name in names))


def test_by_hand() -> None:
    """One channel: x = 2, y = 0.5, two frames before it (1, 3), the older one of another segment."""
    one = lambda *values: jnp.asarray([values], jnp.float32)  # noqa: E731
    frame = Frame(one(2.0, 0.5), (one(7.0), one(3.0)), one(4.0), jnp.asarray([1], jnp.int32))
    rate, bias = 0.7, np.asarray([0.1, -0.2])
    params = BlockParams(
        jnp.asarray([[100.0], [0.5], [2.0]]), jnp.asarray([0.25]), jnp.asarray([[[0.3, 0.6]]]),
        jnp.asarray(bias, jnp.float32), jnp.asarray([rate], jnp.float32),
    )  # fmt: skip
    v = 0.25 + 2.0 * 2.0 + 0.5 * 3.0
    i, r = 1 / (1 + np.exp(-(np.asarray([0.3, 0.6]) * v + bias)))
    a = np.exp(-rate * r)
    h = a * 4.0 + np.sqrt(1 - a * a) * i * v
    gelu = 0.25 * (1 + np.tanh(np.sqrt(2 / np.pi) * (0.5 + 0.044715 * 0.5**3)))
    for name in ("xla", "reference"):
        found = recurrent_frame(frame, params, implementation=name)
        np.testing.assert_allclose(np.ravel(found.gated), h * gelu, rtol=1e-6)
        np.testing.assert_allclose(np.ravel(found.h), h, rtol=1e-6)
        np.testing.assert_array_equal(np.ravel(found.newest), 2.0)
        start = recurrent_frame(frame._replace(positions=jnp.zeros(1, jnp.int32)), params)
        alone = 0.25 + 2.0 * 2.0
        entering = alone / (1 + np.exp(-(0.3 * alone + 0.1)))
        np.testing.assert_allclose(np.ravel(start.h), entering, rtol=1e-6, err_msg="nothing before it counts")


def test_frames_one_by_one_are_the_scan_of_all() -> None:
    """With a convolution that looks at nothing but the frame, and maps of the gates that are 0."""
    frame, params = call(Workload(3, 2, 4))
    weights = jnp.zeros_like(params.conv_kernel).at[-1].set(1.0)
    params = params._replace(
        conv_kernel=weights, conv_bias=0 * params.conv_bias, gate_blocks=0 * params.gate_blocks
    )
    xs = np.random.default_rng(1).standard_normal((5, 3, 8)).astype(np.float32)
    gates = [jnp.broadcast_to(half, (3, 5, 8)) for half in jnp.split(params.gate_bias, 2)]
    # rate = 8 softplus(Lambda)
    a_param = jnp.log(jnp.expm1(params.rate / 8))
    h, _ = rglru_scan(jnp.asarray(xs.swapaxes(0, 1)), *gates, a_param, frame.h)
    for t, x in enumerate(xs):
        branches = jnp.concatenate([x, jnp.zeros_like(x)], axis=-1)
        found = recurrent_frame(frame._replace(branches=branches), params)
        np.testing.assert_allclose(found.h, h[:, t], rtol=2e-5, atol=2e-6)
        frame = frame._replace(h=found.h, taps=(*frame.taps[1:], found.newest))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("remembers", [True, False])
def test_a_clip_is_its_frames_one_by_one(implementation: str, remembers: bool) -> None:
    """Two streams of three tokens; the second starts anew at its third frame."""
    _, params = call(Workload(3, 2, 4))
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    memory = Memory(tuple(draw(2, 3, 8) for _ in range(3)), draw(2, 3, 8))
    if not remembers:
        memory = jax.tree.map(jnp.zeros_like, memory)
    branches, positions = draw(2, 5, 3, 16), jnp.asarray([[5, 6, 7, 8, 9], [2, 3, 0, 1, 2]])
    clip = Clip(branches, positions, memory if remembers else None)
    found = recurrent_clip(clip, params, implementation=implementation)
    taps, h = tuple(tap.reshape(6, 8) for tap in memory.taps), memory.h.reshape(6, 8)
    for t in range(5):
        frame = Frame(branches[:, t].reshape(6, 16), taps, h, jnp.repeat(positions[:, t], 3))
        result = recurrent_frame(frame, params, implementation="reference")
        np.testing.assert_allclose(found.gated[:, t].reshape(6, 8), result.gated, rtol=2e-5, atol=2e-6)
        taps, h = (*taps[1:], result.newest), result.h
    np.testing.assert_allclose(found.h.reshape(6, 8), h, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"branches": jnp.ones((2, 3, 16))}, r"branches must be \[B, T, P, 2 E\] without an empty axis"),
        ({"branches": jnp.ones((2, 0, 3, 16))}, r"without an empty axis; got shape \(2, 0, 3, 16\)"),
        ({"positions": jnp.zeros((2, 4), jnp.int32)}, r"positions must have shape \(2, 5\); got \(2, 4\)"),
        ({"positions": jnp.zeros((2, 5))}, "positions has dtype float32; they are whole numbers"),
        ({"memory": Memory((), jnp.ones((2, 3, 8)))}, r"conv_kernel must have shape \(1, 8\); got \(4, 8\)"),
        (
            {"memory": Memory((jnp.ones((2, 3, 8)),) * 3, jnp.ones((2, 4, 8)))},
            r"memory.h must have shape \(2, 3, 8\); got \(2, 4, 8\)",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_wrong_clips_are_named(changed: dict[str, Any], message: str) -> None:
    _, params = call(Workload(3, 2, 4))
    clip = Clip(jnp.ones((2, 5, 3, 16)), jnp.zeros((2, 5), jnp.int32), None)._replace(**changed)
    with pytest.raises(ValueError, match=f"recurrent_clip: .*{message}"):
        recurrent_clip(clip, params)


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        ("frame", {"h": jnp.ones((0, 8))}, r"h must be \[R, E\] without an empty axis; got shape \(0, 8\)"),
        ("frame", {"branches": jnp.ones((5, 8))}, r"branches must have shape \(5, 16\); got \(5, 8\)"),
        ("frame", {"taps": (jnp.ones((5, 7)),) * 3}, r"taps\[0\] must have shape \(5, 8\); got \(5, 7\)"),
        ("frame", {"taps": (jnp.ones((5, 8)),)}, r"conv_kernel must have shape \(2, 8\); got \(4, 8\)"),
        ("frame", {"positions": jnp.zeros(5)}, "positions has dtype float32; they are whole numbers"),
        ("frame", {"h": jnp.ones((5, 8), jnp.bfloat16)}, "h has dtype bfloat16; the state is float32"),
        ("params", {"gate_blocks": jnp.ones((3, 2, 4))}, "3 groups do not divide E = 8"),
        ("params", {"rate": jnp.ones(8, jnp.int32)}, "rate has dtype int32; use one of float16"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_wrong_arguments_are_named(part: str, changed: dict[str, Any], message: str) -> None:
    frame, params = call(Workload(5, 2, 4))
    if part == "frame":
        frame = frame._replace(**changed)
    else:
        params = params._replace(**changed)
    with pytest.raises(ValueError, match=f"recurrent_frame: {message}"):
        recurrent_frame(frame, params)


def test_the_kernel_is_chosen_on_hopper_alone() -> None:
    frame, params = shapes(1280, 768, 64, 4, "bfloat16")
    assert set(PREFERENCE) <= set(IMPLEMENTATIONS) - {"reference"}
    with compiling_for("gpu", "9.0", "NVIDIA H100"):
        assert has_kernel(frame, params)
        lines = [line.split() for line in explain(frame, params).splitlines()]
        assert ["pallas_mosaic_gpu", "runs"] in lines
        assert ["xla", "could", "run"] in lines
    with compiling_for("cpu", None):
        assert not has_kernel(frame, params)
        with pytest.raises(ImplementationError, match="needs an NVIDIA Hopper GPU"):
            recurrent_frame(*call(Workload(5, 2, 4)), implementation="pallas_mosaic_gpu")


def test_explained_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recurrent_block", "--shape=R2048,S128"]) == 0
    printed = capsys.readouterr().out
    assert "recurrent_frame: R2048 E768 S128 J4 bfloat16" in printed
    assert "recurrent_clip: B1 T32 R2048 E768 S128 J4 bfloat16" in printed
    for arguments, message in (
        (["--shape=K3"], "has sizes B, T, R, E, S, J; got K"),
        (["--shape=S100"], "S = 100 does not divide E = 768"),
        (["--pruning=auto"], "no pruning"),
    ):
        with pytest.raises(SystemExit):
            main(["recurrent_block", *arguments])
        assert message in capsys.readouterr().err


def test_a_traced_call_takes_abstract_arrays() -> None:
    frame, params = shapes(16, 128, 64, 4, "bfloat16")
    result = jax.eval_shape(recurrent_frame, frame, params)
    assert [(x.shape, str(x.dtype)) for x in result] == [
        ((16, 128), "bfloat16"), ((16, 128), "float32"), ((16, 128), "bfloat16"),
    ]  # fmt: skip
