"""Units of work on all cores, by processes that end with the one that started them."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

_function: Callable[[Any], Any] | None = None  # one per worker process


def _start_worker(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)  # the parent was killed: nobody would ever end this process

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _work(number: int, unit: Any) -> tuple[int, Any]:
    assert _function is not None
    return number, _function(unit)


def run_units(
    function: Callable[[Any], Any], units: Sequence[tuple[int, Any]], workers: int | None = None
) -> Iterator[tuple[int, Any]]:
    """(number, function(unit)) of every (number, unit), as they get done, in no particular order.

    Args:
        function: picklable; sent once to every process.
        units: picklable.
        workers: processes (default: one per core); 1: this one.

    Raises:
        whatever a unit raises: the rest is then given up.
    """
    workers = min(workers or os.cpu_count() or 1, len(units))
    if workers <= 1:
        for number, unit in units:
            yield number, function(unit)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (function, os.getpid())) as pool:
        futures = [pool.submit(_work, number, unit) for number, unit in units]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_missing(
    function: Callable[[Any], Any],
    units: Sequence[Any],
    sizes: Sequence[int],
    found: Mapping[int, Any],
    workers: int | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[Any]:
    """The results of all units, in order: `function(unit)` of those whose number is not among the `found`.

    Args:
        function, workers: see `run_units`.
        units: picklable.
        sizes: of the units, in whatever progress is counted in.
        found: number -> result, of an earlier run.
        progress: called with (size done, in all, of what was found).
    """
    results = dict(found)
    done = kept = sum(sizes[number] for number in found)
    if progress:
        progress(done, sum(sizes), kept)
    todo = [(number, unit) for number, unit in enumerate(units) if number not in results]
    for number, result in run_units(function, todo, workers):
        results[number] = result
        done += sizes[number]
        if progress:
            progress(done, sum(sizes), kept)
    return [results[number] for number in range(len(units))]
