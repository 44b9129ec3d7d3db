"""The memory that interpreted Pallas GPU kernels see: JAX's simulation, and what is in flight in it.

Installed by `mosaic_gpu_interpreter.extended_interpreter`. Race detection compares vector clocks, of which
each warpgroup has two: one orders what it does itself, the other what may be done through the async proxy (by
TMA and wgmma). We append two entries per warpgroup to every clock: its tensor core's, which ends wgmmas in
the order of issue, and its program order, known to both proxies.
"""

import collections
import contextlib
import dataclasses
from typing import Any

import numpy as np
from jax._src.pallas.mosaic.interpret.vector_clock import NpVectorClock
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as stock

Place = tuple[Any, Any]  # an allocation's key, and what is accessed of it
# What TMA copies to, or from, begins at a multiple of this many bytes in shared memory.
TMA_ALIGNMENT = 128


class DeadlockError(RuntimeError):
    """Every warpgroup that still runs waits for a barrier at which nobody is left to arrive."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A wgmma in flight: acc += a @ b, with an array for A in registers. `clock` is the time of its end."""

    acc: Place
    a: Place | np.ndarray
    b: Place
    clock: Any


class Barrier(stock.Barrier):
    """Notices deadlocks, and lets a thread leave the last phase of a barrier unobserved."""

    shared_memory: Any

    def wait(self, thread: Any, logging_info: Any = None) -> None:
        self.shared_memory.note_waiting(thread, self, logging_info)
        super().wait(thread, logging_info)

    def deallocate(self) -> None:
        """As stock, but the last phase may lack an observer: it is harmless if no barrier is used again."""
        with self.cv:
            if self.ref_count == 1:
                for thread, observed in self.last_observed_phase_by_thread.items():
                    if observed == self.phase - 1:
                        self.last_observed_phase_by_thread[thread] = self.phase
                        self.shared_memory.has_undrained_barriers = True
            super().deallocate()


class SharedMemory(stock.GPUSharedMemory):
    """Adds wgmmas and TMA store groups in flight, waiting threads, and the first exception of each kernel."""

    def __init__(
        self,
        *,
        failures: list[Exception],
        num_devices: int,
        num_blocks_per_cluster: int,
        num_threads_per_block: int,
        num_tma_threads_per_device: int,
        **rest: Any,
    ):
        extra = 2 * num_blocks_per_cluster * num_threads_per_block
        super().__init__(
            num_devices=num_devices,
            num_blocks_per_cluster=num_blocks_per_cluster,
            num_threads_per_block=num_threads_per_block,
            num_tma_threads_per_device=num_tma_threads_per_device + extra,
            **rest,
        )
        self.num_tma_threads -= extra * num_devices
        self.failures = failures
        # The position of the first of its two extra entries.
        warpgroups = (t for t in self.all_concurrent_threads if isinstance(t, stock.Warpgroup))
        self.extra = {
            thread: len(self.all_concurrent_threads) + self.num_tma_threads + 2 * i
            for i, thread in enumerate(warpgroups)
        }

    def reset_per_cluster_state(self) -> None:
        super().reset_per_cluster_state()
        with self.lock:
            self.products: dict[Any, collections.deque[Product]] = collections.defaultdict(collections.deque)
            self.issued: collections.Counter[Any] = collections.Counter()
            self.open_groups: dict[Any, list[tuple[Any, Any]]] = collections.defaultdict(list)
            self.waiting: dict[Any, tuple[Barrier, int, Any]] = {}
            self.finished: set[Any] = set()
            self.has_undrained_barriers = False

    def set_failed(self, exception: Exception, *args: Any, **kwargs: Any) -> None:
        self.failures.append(exception)
        super().set_failed(exception, *args, **kwargs)

    # Order of events.

    def incr_clock(self, thread: Any, take_lock: bool = True) -> Any:
        with self.lock if take_lock else contextlib.nullcontext():
            if thread in self.extra:
                for proxy in _proxies(self.clocks[thread]):
                    proxy[self.extra[thread] + 1] += 1
            return super().incr_clock(thread, take_lock=False)

    def note_read(self, thread: Any, key: Any) -> None:
        """A value that has arrived in registers cannot change: later async writes need no proxy fence.

        So the thread's newest read counts as ordered before whatever follows it in either proxy.
        """
        if not self.detect_races or thread not in self.extra:
            return
        races, position = gpu_callbacks.get_races(), self.extra[thread] + 1
        clock = NpVectorClock(self.vector_clock_size)
        clock.clock[position] = self.clocks[thread].generic_clock.clock[position]
        with races.lock:
            reads = races.reads[key]
            newest = next(i for i in reversed(range(len(reads))) if reads[i][0] == thread)
            reads[newest] = (thread, clock, *reads[newest][2:])

    # wgmma.

    def issue(self, thread: Any, acc: Place, a: Place | np.ndarray, b: Place, source_info: Any) -> None:
        """Queues acc += a @ b and registers its reads of shared memory, through the async proxy."""
        clock = None
        if self.detect_races:
            clock = self.incr_clock(thread)
            self.issued[thread] += 1
            for proxy in _proxies(clock):
                proxy[self.extra[thread]] = self.issued[thread]
            for key, access in (operand for operand in (a, b) if isinstance(operand, tuple)):
                now = clock.async_smem_clock.copy()
                gpu_callbacks.get_races().check_read(thread, now, key, access, source_info=source_info)
        self.products[thread].append(Product(acc, a, b, clock))

    def finish_products(self, thread: Any, at_most: int) -> None:
        """Computes the oldest products until `at_most` are in flight."""
        while len(self.products[thread]) > at_most:
            product = self.products[thread].popleft()
            acc, b = self._operand(product.acc), self._operand(product.b)
            total = acc + np.matmul(self._operand(product.a), b, dtype=acc.dtype)
            self.store_buffer_content(*product.acc, total, thread, increment_clock=False)
            if product.clock is not None:
                with self.lock:
                    self.clocks[thread].update(product.clock)

    def store_accumulator(self, thread: Any, acc: Place, value: np.ndarray) -> None:
        """Replaces an accumulator's content. Raises ValueError if a wgmma into it is in flight."""
        if any(product.acc[0] == acc[0] for product in self.products[thread]):
            raise ValueError("store to an accumulator while a wgmma into it is in flight")
        self.store_buffer_content(*acc, value, thread, increment_clock=False)

    def _operand(self, operand: Place | np.ndarray) -> np.ndarray:
        if not isinstance(operand, tuple):
            return operand
        key, access = operand
        if key not in self.mem:
            raise ValueError(f"{key} went out of scope while a wgmma on it was in flight")
        value, _, _ = self.get_buffer_content(key, access, None, increment_clock=False)
        if value is None or value.shape != access.shape:
            raise IndexError(f"wgmma reads {key} out of bounds: {access}")
        return value

    # Copies by TMA.

    def check_alignment(self, place: Place) -> None:
        """Raises ValueError if TMA cannot copy to or from this place in shared memory.

        Allocations themselves are aligned, and tiled ones are sliced in whole tiles: their rows count here
        as if they lay one after the other.
        """
        key, access = place
        buffer = self.buffer_shape_and_dtype(key)
        begins = [index if isinstance(index, int) else index.start for index in access.range]
        strides = np.cumprod([1, *buffer.shape[:0:-1]])[::-1]
        offset = int(np.dot(begins, strides)) * np.dtype(buffer.dtype).itemsize
        if offset % TMA_ALIGNMENT:
            raise ValueError(
                f"TMA copies at {access.range} of an array {buffer.dtype}{list(buffer.shape)} in shared"
                f" memory: byte {offset} is no multiple of {TMA_ALIGNMENT}"
            )

    def add_copy_smem_to_gmem_clocks(self, thread: Any, read_clock: Any, write_clock: Any) -> None:
        with self.lock:
            self.open_groups[thread].append((read_clock, write_clock))

    def commit_stores(self, thread: Any) -> None:
        """Closes the thread's group of TMA stores, so that `wait_smem_to_gmem` counts it, even if empty."""
        if not self.detect_races:
            return
        merged = [self.VectorClock(self.vector_clock_size) for _ in range(2)]
        for clocks in self.open_groups.pop(thread, []):
            for total, clock in zip(merged, clocks, strict=True):
                total.update(clock)
        super().add_copy_smem_to_gmem_clocks(thread, *merged)

    # Barriers, and the end.

    def allocate_barrier(self, key: Any, *args: Any, **kwargs: Any) -> None:
        if self.has_undrained_barriers:
            raise ValueError(
                "a scope with barriers begins after one that ended with a phase unobserved: the device may "
                "reuse its barriers, in the wrong phase. Wait for every arrival before the scope ends."
            )
        super().allocate_barrier(key, *args, **kwargs)

    def note_waiting(self, thread: Any, barrier: Barrier, logging_info: Any) -> None:
        """Registers that a thread begins to wait. Raises DeadlockError if nobody is left to wake it."""
        with self.lock:
            seen = barrier.last_observed_phase_by_thread.get(thread, 0)
            self.waiting[thread] = (barrier, seen, logging_info)
            self._check_deadlock()

    def kernel_thread_finished(self, thread: Any) -> None:
        """As stock. Raises ValueError if the thread leaves something in flight."""
        if self.products[thread]:
            raise ValueError(f"{len(self.products[thread])} wgmmas of {thread} were never awaited")
        if self.open_groups[thread]:
            raise ValueError(f"copies from SMEM to GMEM of {thread} were never committed")
        super().kernel_thread_finished(thread)
        with self.lock:
            self.finished.add(thread)
            self._check_deadlock()

    def _check_deadlock(self) -> None:
        # Copies arrive as soon as they are issued, so only running threads can end a phase. An entry of
        # `waiting` outlives the wait, but then the barrier's phase has moved on.
        running: list[Any] = [thread for thread in self.extra if thread not in self.finished]
        lines = []
        for thread in running:
            barrier, seen, logging_info = self.waiting.get(thread, (None, 0, None))
            if barrier is None or barrier.phase != seen:
                return
            where = logging_info.get_source_info_str() if logging_info else "?"
            lines.append(f"warpgroup {thread.warpgroup_id}: phase {seen} of {barrier}, {where}")
        if running:
            raise DeadlockError("all running threads wait:\n" + "\n".join(lines))


def _proxies(clock: Any) -> tuple[np.ndarray, np.ndarray]:
    return clock.generic_clock.clock, clock.async_smem_clock.clock
