"""Progress of long work, as a protocol: the library reports, the caller decides what to show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["SILENT", "Advance", "Progress", "Silent"]

Advance = Callable[[float], None]


class Progress(Protocol):
    """Receives stages and their steps."""

    def stage(self, title: str, total: float, unit: str) -> AbstractContextManager[Advance]:
        """Open a stage of `total` steps of `unit`; call the yielded function with each advance."""
        ...

    def note(self, text: str) -> None:
        """One line that the user should read."""
        ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def stage(self, title: str, total: float, unit: str) -> Iterator[Advance]:
        """Accept a stage without showing it."""
        del title, total, unit
        yield lambda _steps: None

    def note(self, text: str) -> None:
        """Drop a note."""


SILENT = Silent()
