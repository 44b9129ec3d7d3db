"""Programs of warpgroups compute what they would if compiled, but with every callback in their own thread."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback

from tests.kernels.mosaic_gpu_threads import run_program


def program(note, count, x):
    """Loops and branches with callbacks, each among independent work that XLA would hand to its pool."""

    def call(token, value):
        return io_callback(note, jax.ShapeDtypeStruct((), jnp.int32), token, value)

    def one_round(index, carry):
        token, *tiles = carry
        tiles = [lax.sort(tile * -1.5 + index) for tile in tiles]
        token = lax.cond(index % 2 == 0, lambda t: call(t, tiles[-1][0]), lambda t: t + 1, token)
        return token, *tiles

    def row(token, value):
        token = call(token, value)
        return token, value * token

    token, *tiles = lax.fori_loop(0, count, one_round, (jnp.int32(0), *(x + i for i in range(16))))
    token, rows = lax.scan(row, token, tiles[0][:3])
    token = lax.fori_loop(0, 2, lambda _, t: call(t, x), token)
    return token, rows, sum(tiles)


def test_callbacks_stay_in_the_thread_of_their_program():
    calls = []

    def note(token, value):
        calls.append((threading.get_ident(), np.array(value)))
        return np.array(token + 10, np.int32)

    run = functools.partial(program, note)
    args = (jnp.int32(5), jnp.linspace(-1, 1, 4096))
    want = jax.block_until_ready(jax.jit(run)(*args))
    compiled, calls[:] = list(calls), []
    closed = jax.make_jaxpr(run)(*args)
    got = run_program(closed.jaxpr, closed.consts, *args)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), tuple(got), want)
    assert {thread for thread, _ in calls} == {threading.get_ident()}
    assert len(calls) == len(compiled) == 3 + 3 + 2
    for (_, ours), (_, theirs) in zip(calls, compiled, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
