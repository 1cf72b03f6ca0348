"""Ctrl-C, kept: an extension module that runs Python code may lose the KeyboardInterrupt.

numpy does (2.4, `ndarray.tofile` and so `np.save`): the handler runs inside its `isinstance(file,
os.PathLike)`, numpy reads the error as "yes" and raises a TypeError of its own. Whoever pressed
Ctrl-C would be shown a bug. So the signal is written down before it is raised.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["answered", "kept"]

_pending = threading.Event()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Whatever fails within it behind Ctrl-C fails as KeyboardInterrupt.

    Does nothing outside the main thread, or where the caller or the shell (a background job) has
    put another handler in place.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    _pending.clear()
    if ours:
        signal.signal(signal.SIGINT, _remember)
    try:
        yield
    except Exception as error:
        if _pending.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def answered() -> None:
    """The interrupt has done what it was for, and the command goes on (the prompt of `chat`)."""
    _pending.clear()


def _remember(signum: int, frame: FrameType | None) -> None:
    _pending.set()
    signal.default_int_handler(signum, frame)
