"""Work on several cores: one weight or candidate per thread, one BLAS thread in each.

numpy lets go of the interpreter in its loops and products, so threads are enough. BLAS threads on
top of ours would fight for the same cores: two callers with two BLAS threads each were measured
four times slower than two with one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import numpy as np  # noqa: F401 - loads the BLAS that is looked for below
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

__all__ = ["map_in_threads", "one_blas_thread", "thread_count"]

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
    with one_blas_thread(), ThreadPoolExecutor(thread_count()) as pool:
        yield from pool.map(function, items)


def one_blas_thread() -> AbstractContextManager[object]:
    """Hold BLAS to one thread, which is also how its results do not depend on their number."""
    blas = _blas()
    if all(library["num_threads"] == 1 for library in blas.info()):
        return nullcontext()  # in one of our threads: nothing to set under the others' products
    limit: AbstractContextManager[object] = blas.limit(limits=1)
    return limit


@functools.cache
def _blas() -> ThreadpoolController:
    """Numpy's, found once: looking through all libraries takes milliseconds."""
    return ThreadpoolController().select(user_api="blas")
