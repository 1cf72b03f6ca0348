"""Work on several cores: one weight or candidate per thread, one BLAS thread in each.

numpy lets go of the interpreter in its loops and products, so threads are enough. BLAS threads on
top of ours would fight for the same cores: two callers with two BLAS threads each were measured
four times slower than two with one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

__all__ = ["map_in_threads", "thread_count"]

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_THREADS = 8  # each holds the temporaries of one weight


def thread_count() -> int:
    """Threads that work on weights at once: no more than cores that this process may use."""
    return min(_cores(), MOST_THREADS)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: taskset, containers pinned to some cores
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map(function, items)` on all cores, results in the order of `items`."""
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(thread_count()) as pool:
        yield from pool.map(function, items)
