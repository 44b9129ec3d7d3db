"""Run by sharded_test.py on simulated devices: sharded scans against whole ones, with all gradients."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kernels.linear_scan import linear_scan, rglru_scan
from kernels.linear_scan.sharded import sharded_linear_scan, sharded_rglru_scan

BATCH, LENGTH, WIDTH = 2, 48, 6


def with_gradients(function, *arrays):
    """Results, and gradients of their sum with random weights."""

    def loss(*arrays):
        out, rng = function(*arrays), np.random.default_rng(3)
        return sum(jnp.sum(o * rng.standard_normal(o.shape)) for o in out), out

    run = jax.value_and_grad(loss, argnums=tuple(range(len(arrays))), has_aux=True)
    (_, out), gradients = jax.jit(run)(*arrays)
    return *out, *gradients


def check(what, actual, wanted):
    for index, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        np.testing.assert_allclose(a, w, rtol=1e-11, atol=1e-12, err_msg=f"{what}: result {index}")


def main(implementation: str) -> None:
    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((2, 4), ("data", "time"))
    with jax.set_mesh(mesh):
        compare(mesh, implementation)


def compare(mesh: jax.sharding.Mesh, implementation: str) -> None:
    rng = np.random.default_rng(0)
    normal = [jnp.asarray(rng.standard_normal((BATCH, LENGTH, WIDTH))) for _ in range(4)]
    x, gate_x, gate_a, a = normal
    a = a.at[1, 20].set(0)
    h0 = jnp.asarray(rng.standard_normal((BATCH, WIDTH)))
    a_param = jnp.asarray(rng.uniform(-6, 0, WIDTH))
    reset = jnp.zeros((BATCH, LENGTH), bool).at[0, 12].set(True).at[1, 40].set(True)
    # The whole sequences are sharded in batch: the scans themselves see explicitly sharded types too.
    whole = jax.device_put((x, a, gate_x, gate_a), NamedSharding(mesh, PartitionSpec("data")))
    x, a, gate_x, gate_a = jax.device_put(whole, NamedSharding(mesh, PartitionSpec("data", "time")))
    for reverse, state in ((False, True), (True, False)):
        start = (h0,) if state else ()
        options = {"reverse": reverse, "implementation": implementation}
        sharded = {"axis": "time", "mesh": mesh, **options}
        check(
            f"linear {options} {state}",
            with_gradients(lambda *args: sharded_linear_scan(*args, **sharded), x, a, *start),  # noqa: B023
            with_gradients(lambda *args: linear_scan(*args, reverse=reverse), *whole[:2], *start),  # noqa: B023
        )

        def gated(scan, flags=reset if state else None, **options):
            return lambda x, gx, ga, p, h0=None: scan(x, gx, ga, p, h0, flags, **options)

        others = (a_param, *start)
        check(
            f"rglru {options} {state}",
            with_gradients(gated(sharded_rglru_scan, **sharded), x, gate_x, gate_a, *others),
            with_gradients(gated(rglru_scan, reverse=reverse), whole[0], *whole[2:], *others),
        )
    poisoned = jnp.where(jnp.zeros_like(reset).at[0, :12].set(True)[..., None], jnp.nan, x)
    h, h_last = sharded_rglru_scan(poisoned, gate_x, gate_a, a_param, h0, reset, axis="time", mesh=mesh)
    assert bool(jnp.isfinite(h_last).all())
    assert bool(np.isfinite(np.asarray(h)[0, 12:]).all())
    check("mesh of the context", sharded_linear_scan(x, a, axis="time"), linear_scan(*whole[:2]))
    collectives(mesh, x, a)
    manual(mesh, implementation, (whole[0], *whole[2:], a_param))


def manual(mesh, implementation, arrays):
    """Inside of a shard_map over the batch: a_param is the same everywhere, its gradient a sum."""

    def scan(x, gate_x, gate_a, a_param):
        h, h_last = rglru_scan(x, gate_x, gate_a, a_param, implementation=implementation)
        return linear_scan(h, jax.nn.sigmoid(gate_a), h_last, implementation=implementation)

    rows, shared = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(scan, mesh=mesh, in_specs=(rows, rows, rows, shared), out_specs=rows)
    check("in shard_map", with_gradients(mapped, *arrays), with_gradients(scan, *arrays))


def collectives(mesh, x, a):
    """States are exchanged once in each direction, and no array with a time axis."""

    def loss(x, a):
        h, h_last = sharded_linear_scan(x, a, axis="time", mesh=mesh)
        return jnp.sum(h**2) + jnp.sum(h_last)

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, a).compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line or " all-gather-start(" in line]
    # XLA adds some of its own: it gathers the states' batch over "data" first.
    assert sum("/all_gather" in line for line in gathers) == 2, gathers
    for line in gathers:
        assert f",{LENGTH}," not in line, line
        assert f",{LENGTH // 4}," not in line, line
    assert not any(name in text for name in ("all-to-all", "collective-permute(")), (
        "only all-gather is needed"
    )


if __name__ == "__main__":
    main(sys.argv[1])
