"""The optimiser against its equations, and the shapes of the schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tasks.common.errors import ConfigError
from tasks.common.optim import (
    OptimConfig,
    apply_updates,
    clip_by_global_norm,
    global_norm,
    learning_rate,
    make_optimizer,
)


def rates(config: OptimConfig, *units: int) -> list[float]:
    return [learning_rate(config, u) for u in units]


def test_schedules() -> None:
    cosine = OptimConfig(peak_lr=2.0, warmup=100, total=300)
    assert rates(cosine, 0, 50, 100, 200, 300, 999) == pytest.approx([0, 1, 2, 1, 0, 0], abs=1e-15)
    floor = OptimConfig(peak_lr=2.0, warmup=100, total=300, final_lr_fraction=0.1)
    assert rates(floor, 100, 200, 300, 999) == pytest.approx([2, 1.1, 0.2, 0.2])
    linear = OptimConfig(peak_lr=2.0, warmup=100, total=300, schedule="linear", final_lr_fraction=0.5)
    assert rates(linear, 50, 100, 200, 300, 400) == pytest.approx([1, 2, 1.5, 1, 1])
    constant = OptimConfig(peak_lr=2.0, warmup=100, total=300, schedule="constant")
    assert rates(constant, 50, 100, 999) == [1, 2, 2]
    wsd = OptimConfig(peak_lr=2.0, warmup=100, total=300, schedule="wsd", decay=50)
    assert rates(wsd, 50, 100, 250, 275, 300, 400) == pytest.approx([1, 2, 2, 1, 0, 0])
    assert rates(OptimConfig(peak_lr=2.0, total=10, schedule="constant"), 0) == [2]
    with pytest.raises(ValueError, match="units_seen = -1"):
        learning_rate(cosine, -1)


def reference_step(p, g, m, v, t, config, lr, decayed):  # type: ignore[no-untyped-def]
    """AdamW (Loshchilov and Hutter, Algorithm 2) in float64."""
    m = config.b1 * m + (1 - config.b1) * g
    v = config.b2 * v + (1 - config.b2) * g * g
    step = (m / (1 - config.b1**t)) / (np.sqrt(v / (1 - config.b2**t)) + config.eps)
    return p - lr * (step + config.weight_decay * p * decayed), m, v


def test_adamw_with_clip_and_decay_mask_against_the_equations() -> None:
    config = OptimConfig(peak_lr=1.0, total=1, weight_decay=0.3, clip_norm=0.7)
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=(4,))}
    mask = {"w": True, "b": False}
    optimizer = make_optimizer(config, mask)
    ours = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(ours)
    m = {n: np.zeros_like(p) for n, p in params.items()}
    v = {n: np.zeros_like(p) for n, p in params.items()}
    for t, lr in ((1, 0.1), (2, 0.2), (3, 0.05)):
        grads = {n: rng.normal(size=p.shape) for n, p in params.items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        scale = min(1.0, 0.7 / norm)
        before = params
        params = {}
        for n in before:
            params[n], m[n], v[n] = reference_step(
                before[n], grads[n] * scale, m[n], v[n], t, config, lr, mask[n]
            )
        ours, state, norms = apply_updates(
            optimizer,
            jnp.float32(lr),
            jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads),
            state,
            ours,
        )
        for n in params:
            np.testing.assert_allclose(ours[n], params[n], rtol=2e-5, atol=1e-6)
        update = np.sqrt(sum(((params[n] - before[n]) ** 2).sum() for n in params))
        total = np.sqrt(sum((p**2).sum() for p in params.values()))
        np.testing.assert_allclose([norms.grad, norms.update, norms.param], [norm, update, total], rtol=1e-4)


def test_no_clip_and_no_decay() -> None:
    config = OptimConfig(peak_lr=1.0, total=1, weight_decay=0.0, clip_norm=None, b1=0.0, b2=0.0)
    params = {"w": jnp.asarray([1.0, -2.0])}
    optimizer = make_optimizer(config)
    # With b1 = b2 = 0 a step is the sign of the gradient, however large.
    new, _, norms = apply_updates(
        optimizer, jnp.float32(0.5), {"w": jnp.asarray([300.0, -400.0])}, optimizer.init(params), params
    )
    np.testing.assert_allclose(new["w"], [0.5, -1.5], rtol=1e-6)
    assert float(norms.grad) == 500.0


def test_norm_and_clipping_over_leaves_of_all_kinds() -> None:
    rng = np.random.default_rng(0)
    tree = {
        n: jnp.asarray(rng.normal(size=s), jnp.float32)
        for n, s in {"a": (3, 4, 5), "b": (7,), "c": ()}.items()
    }
    tree["d"] = jnp.asarray(rng.normal(size=(6, 2)), jnp.bfloat16)
    wanted = np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in tree.values()))
    assert float(jax.jit(global_norm)(tree)) == pytest.approx(wanted, rel=1e-6)
    assert float(global_norm({})) == 0
    for largest in (0.5, 100.0):
        clip = clip_by_global_norm(largest)
        clipped = clip.update(tree, clip.init(tree))[0]
        for name, x in tree.items():
            assert clipped[name].dtype == x.dtype
            expected = np.float32(x) * min(1.0, largest / wanted)
            np.testing.assert_allclose(
                np.float32(clipped[name]), expected, rtol=1e-2 if name == "d" else 1e-6
            )


def test_norm_of_leaves_that_are_split_over_devices(run_python) -> None:  # type: ignore[no-untyped-def]
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tasks.common.optim import global_norm
mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
specs = {"a": ("fsdp", None), "b": (None, "fsdp"), "c": (None, None), "d": ("fsdp",)}
shapes = {"a": (8, 3), "b": (3, 8), "c": (5, 2), "d": (4,)}
rng = np.random.default_rng(0)
host = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
with jax.set_mesh(mesh):
    tree = {n: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*specs[n]))) for n, x in host.items()}
    norm = jax.jit(global_norm)(tree)
wanted = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in host.values()))
np.testing.assert_allclose(norm, wanted, rtol=1e-6)
"""
    run_python("-c", code, devices=8)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peak_lr", -1.0, "optim.peak_lr = -1.0: must be at least 0"),
        ("total", 0, "optim.total = 0: must be positive"),
        ("warmup", 200, "optim.warmup = 200: must be between 0 and total = 100"),
        ("decay", 101, "optim.decay = 101"),
        ("b2", 1.0, "optim.b2 = 1.0"),
        ("clip_norm", 0.0, "optim.clip_norm = 0.0: must be positive, or none"),
        ("final_lr_fraction", 2.0, "optim.final_lr_fraction = 2.0"),
    ],
)
def test_values_are_checked(field: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        OptimConfig(**{"peak_lr": 1.0, "total": 100, field: value})  # type: ignore[arg-type]
    assert message in str(error.value)
