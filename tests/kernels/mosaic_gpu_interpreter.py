"""JAX's GPU interpret mode, extended to what warp-specialised Hopper kernels use.

Inside `extended_interpreter()`, or a test with the fixture `gpu_interpreter`, every Pallas GPU kernel runs
interpreted on the CPU, with race detection. Beyond the interpreter of jax 0.11 there are:

- `pl.run_state(f)(plgpu.ACC.init(x))`, and stores to accumulators.
- `plgpu.wgmma` with A in registers, and asynchronous: the product is computed when `wgmma_wait`, or reading
  the accumulator, says so; a missing wait gives wrong numbers, as it may on the device. Operands in shared
  memory count as read from issue to wait, through the async proxy: a missing `commit_smem`, or a slot handed
  back before the wait, is reported as a race.
- Groups of `copy_smem_to_gmem` with `commit_group=False`, and its predicate.
- Copies by TMA need places in shared memory that are aligned as the device wants them.
- Barriers whose last phase nobody observed, as on the device, if no scope with barriers follows.
- Reads of shared memory need no `commit_smem` before their slot is handed back to TMA, as on the device.
- A deadlock raises `DeadlockError` at once, and endless loops end after a time limit.
- As many warpgroups may wait at a time as there are: XLA's pool of threads, one per core, runs none of them.
"""

import contextlib
import dataclasses
import functools
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from jax._src import callback, source_info_util
from jax._src import core as jax_core
from jax._src.pallas.mosaic.interpret import race_detection_state as shared_races
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives as gpu_primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret import race_detection_state as gpu_races
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.state import discharge
from jax._src.state import types as state_types
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.kernels.mosaic_gpu_memory import Barrier, DeadlockError, Place, SharedMemory
from tests.kernels.mosaic_gpu_threads import run_program

__all__ = ["DeadlockError", "Interpreter", "RaceError", "extended_interpreter", "gpu_interpreter"]

# Part of all cache keys of JAX: what was compiled with the extensions is not used without, or vice versa.
_EXTENDED = jax.make_user_context(False)
_REGISTERS = gpu_core.MemorySpace.REGS
_Outputs = tuple[jax.Array, Sequence[Any]]  # the token that orders callbacks, and an equation's results

_stock_interpret = jaxpr_interpret.JaxprInterpreter.interpret
_stock_get = gpu_callbacks._get
_stock_copy_gmem_to_smem = gpu_callbacks.copy_gmem_to_smem
_stock_copy_smem_to_gmem = gpu_callbacks.copy_smem_to_gmem

# What runs while a kernel does: callbacks, each in the CPU thread of one warpgroup.


def _memory() -> Any:
    return gpu_callbacks._get_shared_memory()


def _locate(key_array: Any, transforms: tuple[Any, ...] = ()) -> Place:
    key = gpu_callbacks.HostAllocationKey.from_array(key_array)
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    return key, _memory().access(key, transforms)


@gpu_callbacks.fail_on_exception
def _wgmma(*, token, thread, acc, a, b, a_in_registers: bool, source_info):
    a = np.asarray(a[0]) if a_in_registers else _locate(*a)
    _memory().issue(thread, _locate(*acc), a, _locate(*b), source_info)
    return token


@gpu_callbacks.fail_on_exception
def _wgmma_wait(*, token, thread, at_most: int):
    _memory().finish_products(thread, at_most)
    return token


@gpu_callbacks.fail_on_exception
def _store_accumulator(*, token, thread, acc, value):
    _memory().store_accumulator(thread, _locate(acc), np.array(value))
    return token


@gpu_callbacks.fail_on_exception
def _commit_stores(*, token, thread):
    _memory().commit_stores(thread)
    return token


@gpu_callbacks.fail_on_exception
def _check_alignment(*, token, copied):
    _memory().check_alignment(copied)
    return token


def _copy_gmem_to_smem(*, token, dst_allocation_key_as_array, dst_transforms, **rest):
    _check_alignment(token=token, copied=_locate(dst_allocation_key_as_array, dst_transforms))
    return _stock_copy_gmem_to_smem(
        token=token,
        dst_allocation_key_as_array=dst_allocation_key_as_array,
        dst_transforms=dst_transforms,
        **rest,
    )


def _copy_smem_to_gmem(*, token, thread, predicate, commit_group, **rest):
    if predicate is None or predicate:
        source = _locate(rest["src_allocation_key_as_array"], rest["src_transforms"])
        _check_alignment(token=token, copied=source)
        _stock_copy_smem_to_gmem(token=token, thread=thread, predicate=None, commit_group=True, **rest)
    return _commit_stores(token=token, thread=thread) if commit_group else token


def _get(token, mesh_location, thread, allocation_key_as_array, *args, **kwargs):
    result = _stock_get(token, mesh_location, thread, allocation_key_as_array, *args, **kwargs)
    key = gpu_callbacks.HostAllocationKey.from_array(allocation_key_as_array)
    if not _in_registers(key):
        _memory().note_read(thread, key)
    return result


# How equations become callbacks: functions of (JaxprInterpreter, equation, token, input values).


def _call(function: Callable[..., Any], token: jax.Array, **arguments: Any) -> jax.Array:
    return callback.io_callback(function, gpu_callbacks.TOKEN_SHAPE_DTYPE, token=token, **arguments)


def _interpret_wgmma(self, eqn, token, invals) -> _Outputs:
    trees = [eqn.params[f"{name}_transforms_tree"] for name in ("acc", "a", "b")]
    leaves, operands = list(invals[3:]), []
    for var, value, tree in zip(eqn.invars[:3], invals[:3], trees, strict=True):
        count = tree.num_leaves if tree is not None else 0
        transforms = jax.tree.unflatten(tree, leaves[:count]) if tree is not None else ()
        operands.append(jaxpr_interpret.resolve_ref(var.aval, value, transforms))
        leaves = leaves[count:]
    in_registers = not isinstance(eqn.invars[1].aval, state_types.AbstractRef)
    issue = functools.partial(_wgmma, a_in_registers=in_registers, source_info=eqn.source_info)
    acc, a, b = operands
    return _call(issue, token, thread=self.thread, acc=acc, a=a, b=b), []


def _interpret_wgmma_wait(self, eqn, token, invals) -> _Outputs:
    wait = functools.partial(_wgmma_wait, at_most=eqn.params["n"])
    return _call(wait, token, thread=self.thread), []


def _interpret_accumulator_load(self, eqn, token, invals) -> _Outputs:
    if eqn.params["wait_n"] is not None:
        wait = functools.partial(_wgmma_wait, at_most=eqn.params["wait_n"])
        token = _call(wait, token, thread=self.thread)
    token, value = self._interpret_wgmma_accumulator_deref_p(eqn, token, lambda: invals)
    return token, [value]


def _interpret_accumulator_store(self, eqn, token, invals) -> _Outputs:
    acc, value = invals
    return _call(_store_accumulator, token, thread=self.thread, acc=acc, value=value), [value]


def _interpret_commit_group(self, eqn, token, invals) -> _Outputs:
    return _call(_commit_stores, token, thread=self.thread), []


def _interpret_run_state(self, eqn, token, invals) -> _Outputs:
    """References of the outside pass through; values live in registers while the body runs."""
    where = {"mesh_location": self.mesh_location, "thread": self.thread, "source_info": eqn.source_info}
    is_value = [not isinstance(var.aval, state_types.AbstractRef) for var in eqn.invars]
    keys = []
    for value, owned in zip(invals, is_value, strict=True):
        if owned:
            token, request = gpu_callbacks.call_make_allocation_request_array(
                token=token,
                compute_unit=self.thread,
                memory_space_id=memory.get_memory_space_idx(_REGISTERS),
                initial_ref_count=1,
            )
            token, value = gpu_callbacks.call_allocate_buffer(
                token, allocation_request_as_array=request, value=value, **where
            )
        keys.append(value)
    token, _ = self.interpret(eqn.params["jaxpr"], token, *keys)
    token = _call(functools.partial(_wgmma_wait, at_most=0), token, thread=self.thread)
    outputs = []
    for var, key, owned in zip(eqn.outvars, keys, is_value, strict=True):
        value = key
        if owned:
            token, value = gpu_callbacks.call_get(
                token=token,
                result_shape_and_dtype=var.aval,
                allocation_key_as_array=key,
                transforms=(),
                **where,
            )
            token = gpu_callbacks.call_deallocate_buffer(token, allocation_key_as_array=key, **where)
        outputs.append(value)
    return token, outputs


_RULES: dict[Any, Callable[..., _Outputs]] = {
    discharge.run_state_p: _interpret_run_state,
    gpu_primitives.wgmma_ref_p: _interpret_wgmma,
    gpu_primitives.wgmma_wait_p: _interpret_wgmma_wait,
    gpu_primitives.wgmma_accumulator_deref_p: _interpret_accumulator_load,
    gpu_primitives.wgmma_accumulator_store_p: _interpret_accumulator_store,
    gpu_primitives.commit_group_p: _interpret_commit_group,
}


def _interpret(self, jaxpr, token, *args) -> _Outputs:
    """`JaxprInterpreter.interpret` with our rules; any other equation goes to the stock one by itself."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))

    def read(var):
        return var.val if isinstance(var, jax_core.Literal) else env[var]

    for eqn in jaxpr.eqns:
        if rule := _RULES.get(eqn.primitive):
            context = source_info_util.user_context(
                eqn.source_info.traceback, name_stack=eqn.source_info.name_stack
            )
            with context:
                token, out = rule(self, eqn, token, [read(var) for var in eqn.invars])
        else:
            known = [var for var in eqn.invars if not isinstance(var, jax_core.Literal)]
            alone = types.SimpleNamespace(constvars=[], invars=known, eqns=[eqn], outvars=eqn.outvars)
            token, out = _stock_interpret(self, alone, token, *map(read, known))
        env.update(zip(eqn.outvars, out, strict=True))
    return token, [read(var) for var in jaxpr.outvars]


def _in_registers(key: Any) -> bool:
    return key.memory_space_id == memory.get_memory_space_idx(_REGISTERS)


def _except_registers(check: Callable[..., None]) -> Callable[..., None]:
    """Registers belong to one thread; their numbers are used again by its next block, with clocks reset."""

    def checked(self, thread, clock, buffer_key, *rest: Any, **options: Any) -> None:
        if not _in_registers(buffer_key):
            check(self, thread, clock, buffer_key, *rest, **options)

    return checked


class RaceError(AssertionError):
    """Race detection found something; the message holds its reports."""


@dataclasses.dataclass
class Interpreter:
    """What kernels did so far: reports of races, and exceptions in the order in which threads raised them."""

    races: list[str] = dataclasses.field(default_factory=list)
    failures: list[Exception] = dataclasses.field(default_factory=list)

    def watch(self, stop: threading.Event, seconds: float) -> None:
        """Until told to stop: any kernel that runs for longer fails at its next access to memory."""
        seen, since = None, time.monotonic()
        while not stop.wait(min(1.0, seconds / 4)):
            running = gpu_callbacks._shared_memory
            if running is not seen:
                seen, since = running, time.monotonic()
            elif running is not None and time.monotonic() - since > seconds:
                error = TimeoutError(f"a kernel still ran after {seconds} seconds")
                running.set_failed(error, top_level=False)

    def patches(self) -> Iterator[tuple[Any, str, Any]]:
        """(owner, name, replacement) for all that we change in the stock interpreter."""
        yield jaxpr_interpret.JaxprInterpreter, "interpret", _interpret
        yield thread_map, "_run_jaxpr", run_program
        yield gpu_callbacks, "copy_gmem_to_smem", _copy_gmem_to_smem
        yield gpu_callbacks, "copy_smem_to_gmem", _copy_smem_to_gmem
        yield gpu_callbacks, "_get", _get
        yield memory, "GPUSharedMemory", functools.partial(SharedMemory, failures=self.failures)
        yield memory, "Barrier", Barrier
        for name in ("check_read", "check_write"):
            yield (
                gpu_races.GPURaceDetectionState,
                name,
                _except_registers(getattr(gpu_races.GPURaceDetectionState, name)),
            )
        yield shared_races, "print", self.races.append  # it reports races by printing
        yield gpu_races, "print", self.races.append


@contextlib.contextmanager
def extended_interpreter(
    *, allow_races: bool = False, time_limit: float = 300, **options: Any
) -> Iterator[Interpreter]:
    """Pallas GPU kernels called inside run in the extended interpret mode. For one Python thread at a time.

    Args:
      allow_races: collect reports of races (in `races` of the yielded handle) without raising.
      time_limit: seconds after which a kernel that still runs fails with TimeoutError.
      options: of `plgpu.InterpretGPUParams`; races are detected unless told otherwise.

    Raises:
      RaceError: on exit, if a race was found.
      Exception: of a failed kernel, the first that any of its threads raised, as it was raised (what JAX
        raises inside the context may be another thread's complaint about it). All state is reset.
    """
    handle = Interpreter()
    stop = threading.Event()
    # Copies take turns at this many clock entries; two unordered copies at one entry may look ordered.
    defaults = {"detect_races": True, "num_tma_threads_per_device": 64}
    params = plgpu.InterpretGPUParams(**{**defaults, **options})
    with contextlib.ExitStack() as stack:
        for owner, name, new in handle.patches():
            stack.enter_context(mock.patch.object(owner, name, new, create=name == "print"))
        stack.enter_context(_EXTENDED(True))
        stack.enter_context(plgpu.force_gpu_interpret_mode(params))
        stack.callback(interpret_pallas_call.reset_gpu_interpret_mode_state)
        stack.callback(stop.set)
        threading.Thread(target=handle.watch, args=(stop, time_limit), daemon=True).start()
        try:
            yield handle
            jax.effects_barrier()
        except Exception as error:
            if handle.failures:
                raise handle.failures[0] from error
            raise
    if handle.races and not allow_races:
        raise RaceError("\n".join(handle.races))


@pytest.fixture
def gpu_interpreter() -> Iterator[Interpreter]:
    """The test's Pallas GPU kernels run in the extended interpret mode, and it fails if one of them races."""
    with extended_interpreter() as handle:
        yield handle
