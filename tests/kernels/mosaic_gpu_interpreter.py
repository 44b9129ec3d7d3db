"""JAX's GPU interpret mode, extended to what warp-specialised Hopper kernels use.

`extended_interpreter()` (or the fixture `gpu_interpreter`) makes every Pallas GPU kernel called inside it run
interpreted on the CPU, with race detection, and adds to the interpreter of jax 0.11:

- `pl.run_state(f)(plgpu.ACC.init(x))`, and stores to accumulators;
- `plgpu.wgmma` with A in registers, and asynchronous: the product is computed when `wgmma_wait` (or reading the
  accumulator) says so, so that a missing wait gives wrong numbers, as it may on the device. Operands in shared
  memory count as read from issue to wait, through the async proxy: a missing `commit_smem`, or a slot handed
  back before the wait, is reported as a race.
"""

import collections
import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src import callback, source_info_util
from jax._src import core as jax_core
from jax._src.pallas.mosaic.interpret import race_detection_state as shared_races
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives as gpu_primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret import params as gpu_params
from jax._src.pallas.mosaic_gpu.interpret import race_detection_state as gpu_races
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.state import discharge
from jax._src.state import types as state_types
from jax.experimental.pallas import mosaic_gpu as plgpu

# Part of every cache key of JAX, so that nothing compiled with the extensions is used without them or vice versa.
_EXTENDED = jax.make_user_context(False)
_REGISTERS = gpu_core.MemorySpace.REGS
_Outputs = tuple[jax.Array, Sequence[Any]]  # the token that orders callbacks, and an equation's results


@dataclasses.dataclass(frozen=True)
class _Product:
    """A wgmma in flight. Operands are (allocation key, access) in memory, or an array for A in registers."""

    acc: tuple[Any, Any]
    a: Any
    b: tuple[Any, Any]
    clock: memory.GpuClockBundle | None


class _SharedMemory(memory.GPUSharedMemory):
    """Adds to the simulated memory what is in flight: per warpgroup, the wgmmas issued and not awaited."""

    products: dict[memory.Warpgroup, collections.deque[_Product]]
    issued: collections.Counter[memory.Warpgroup]

    def __init__(
        self,
        *,
        num_devices: int,
        num_blocks_per_cluster: int,
        num_threads_per_block: int,
        num_tma_threads_per_device: int,
        **rest: Any,
    ):
        # One more entry in each vector clock per warpgroup: its tensor core, which works through a queue in order.
        tensor_cores = num_blocks_per_cluster * num_threads_per_block
        super().__init__(
            num_devices=num_devices,
            num_blocks_per_cluster=num_blocks_per_cluster,
            num_threads_per_block=num_threads_per_block,
            num_tma_threads_per_device=num_tma_threads_per_device + tensor_cores,
            **rest,
        )
        self.num_tma_threads -= num_devices * tensor_cores

    def reset_per_cluster_state(self) -> None:
        super().reset_per_cluster_state()
        with self.lock:
            self.products = collections.defaultdict(collections.deque)
            self.issued = collections.Counter()

    def issue(self, thread: memory.Warpgroup, acc: Any, a: Any, b: Any, source_info: Any) -> None:
        """Queues acc += a @ b and registers its reads of shared memory."""
        clock = None
        if self.detect_races:
            clock = self.incr_clock(thread)
            self.issued[thread] += 1
            block = thread.device_id * self.num_blocks_per_cluster + thread.block_id
            position = -1 - (block * self.num_pallas_threads_per_block + thread.warpgroup_id)
            for proxy in (clock.generic_clock, clock.async_smem_clock):
                proxy.clock[position] = self.issued[thread]
            for operand in (a, b):
                if isinstance(operand, tuple):
                    gpu_callbacks.get_races().check_read(
                        thread, clock.async_smem_clock.copy(), *operand, source_info=source_info
                    )
        self.products[thread].append(_Product(acc, a, b, clock))

    def wait_products(self, thread: memory.Warpgroup, at_most: int) -> None:
        """Finishes the oldest products until `at_most` are in flight."""
        while len(self.products[thread]) > at_most:
            product = self.products[thread].popleft()
            a = self._read(product.a) if isinstance(product.a, tuple) else product.a
            acc = self._read(product.acc)
            total = acc + np.matmul(a, self._read(product.b), dtype=acc.dtype)
            self.store_buffer_content(*product.acc, total, thread, increment_clock=False)
            if product.clock is not None:
                with self.lock:
                    self.clocks[thread].update(product.clock)

    def _read(self, place: tuple[Any, Any]) -> np.ndarray:
        value, _, _ = self.get_buffer_content(*place, None, increment_clock=False)
        if value is None or value.shape != place[1].shape:
            raise IndexError(f"wgmma reads {place[0]} out of bounds: {place[1]}")
        return value

    def kernel_thread_finished(self, thread: memory.Warpgroup) -> None:
        super().kernel_thread_finished(thread)
        if self.products[thread]:
            raise ValueError(f"{len(self.products[thread])} wgmmas of {thread} were never awaited")


def _locate(key_array: Any, transforms: tuple[Any, ...]) -> tuple[Any, Any]:
    """(allocation key, access) of a reference handed to a callback."""
    key = gpu_callbacks.HostAllocationKey.from_array(key_array)
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    return key, gpu_callbacks._get_shared_memory().access(key, transforms)


@gpu_callbacks.fail_on_exception
def _wgmma(*, token, thread, acc, a, b, a_in_registers: bool, source_info):
    gpu_callbacks._get_shared_memory().issue(
        thread, _locate(*acc), np.asarray(a[0]) if a_in_registers else _locate(*a), _locate(*b), source_info
    )
    return token


@gpu_callbacks.fail_on_exception
def _wgmma_wait(*, token, thread, at_most: int):
    gpu_callbacks._get_shared_memory().wait_products(thread, at_most)
    return token


@gpu_callbacks.fail_on_exception
def _store_accumulator(*, token, thread, acc, value):
    shared_memory = gpu_callbacks._get_shared_memory()
    key, access = _locate(acc, ())
    if any(product.acc[0] == key for product in shared_memory.products[thread]):
        raise ValueError("store to an accumulator while a wgmma into it is in flight")
    shared_memory.store_buffer_content(key, access, np.array(value), thread, increment_clock=False)
    return token


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
}
_stock_interpret = jaxpr_interpret.JaxprInterpreter.interpret


def _interpret(self, jaxpr, token, *args) -> _Outputs:
    """`JaxprInterpreter.interpret` with our rules first; each other equation goes to the stock one by itself."""
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


class RaceError(AssertionError):
    """Race detection found something; the message holds its reports."""


@dataclasses.dataclass
class Interpreter:
    """Handle on an active extended interpreter: `races` holds the reports so far, of all kernels."""

    races: list[str] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def extended_interpreter(*, allow_races: bool = False, **options: Any) -> Iterator[Interpreter]:
    """Pallas GPU kernels called inside run in the extended interpret mode. Not for two threads at once.

    `options` go to `plgpu.InterpretGPUParams`; races are detected unless told otherwise. Raises `RaceError` on
    exit if a race was found, unless `allow_races`: then look at `races` of the yielded handle. State left by a
    failed kernel is reset.
    """
    handle = Interpreter()
    params = plgpu.InterpretGPUParams(**{"detect_races": True, **options})
    with contextlib.ExitStack() as stack:
        for owner, name, new in (
            (jaxpr_interpret.JaxprInterpreter, "interpret", _interpret),
            (memory, "GPUSharedMemory", _SharedMemory),
            (shared_races, "print", handle.races.append),
            (gpu_races, "print", handle.races.append),
        ):
            stack.enter_context(mock.patch.object(owner, name, new, create=name == "print"))
        stack.enter_context(_EXTENDED(True))
        stack.enter_context(gpu_params.force_gpu_interpret_mode(params))
        try:
            yield handle
            jax.effects_barrier()
        finally:
            interpret_pallas_call.reset_gpu_interpret_mode_state()
    if handle.races and not allow_races:
        raise RaceError("\n".join(handle.races))
