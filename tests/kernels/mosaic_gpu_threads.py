"""The programs of interpreted warpgroups, run by Python one equation after the other.

JAX compiles them, with what an interpreted kernel does as callbacks. XLA may run a callback in its pool of as
many threads as there are cores, which no option forbids. Callbacks that wait for a barrier fill the pool, the
one that would arrive there cannot run, and nothing tells its thread from one that computes for long.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax._src import core as jax_core

__all__ = ["run_program"]


def run_program(jaxpr: Any, consts: Sequence[Any], *args: Any) -> list[Any]:
    """Evaluates a jaxpr, with all its callbacks in the Python thread of the caller."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, jax_core.Literal) else env[var]

    for eqn in jaxpr.eqns:
        values = [read(var) for var in eqn.invars]
        if not eqn.effects:
            with eqn.ctx.manager:
                results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
            results = results if eqn.primitive.multiple_results else [results]
        elif rule := _RULES.get(eqn.primitive.name):
            results = rule(values, **eqn.params)
        else:
            raise NotImplementedError(f"callbacks within {eqn.primitive}")
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _run_closed(closed: Any, *args: Any) -> list[Any]:
    return run_program(closed.jaxpr, closed.consts, *args)


def _run_callback(values: list[Any], *, callback: Any, result_avals: Any, **_: Any) -> list[np.ndarray]:
    """Results are copies that cannot change, as between a compiled program and its callbacks.

    Scalars go in as JAX's, which callbacks ask for; other arrays as NumPy's, which they index much faster.
    """
    results = callback(*(np.asarray(x) if np.ndim(x) else jnp.asarray(x) for x in values))
    copies = [np.array(x, aval.dtype) for x, aval in zip(results, result_avals, strict=True)]
    for copy in copies:
        copy.flags.writeable = False
    return copies


def _run_cond(values: list[Any], *, branches: Any, **_: Any) -> list[Any]:
    chosen, *operands = values
    return _run_closed(branches[min(max(int(chosen), 0), len(branches) - 1)], *operands)


def _run_while(
    values: list[Any], *, cond_nconsts: int, cond_jaxpr: Any, body_nconsts: int, body_jaxpr: Any
) -> list[Any]:
    split = cond_nconsts + body_nconsts
    cond_consts, body_consts, carry = values[:cond_nconsts], values[cond_nconsts:split], values[split:]
    while _run_closed(cond_jaxpr, *cond_consts, *carry)[0]:
        carry = _run_closed(body_jaxpr, *body_consts, *carry)
    return carry


def _run_scan(values: list[Any], *, jaxpr: Any, length: int, ft_in: Any, ft_out: Any, **_: Any) -> list[Any]:
    """Forwards: the interpreter makes no other scans."""
    consts, carry, arrays = (list(part) for part in ft_in.update(values).unpack())
    arrays, rows = [np.asarray(array) for array in arrays], []
    for i in range(length):
        results = _run_closed(jaxpr, *consts, *carry, *(array[i] for array in arrays))
        carry, row = (list(part) for part in ft_out.update(results).unpack())
        rows.append(row)
    return [*carry, *map(np.stack, zip(*rows, strict=True))]


_RULES = {"io_callback": _run_callback, "cond": _run_cond, "while": _run_while, "scan": _run_scan}
