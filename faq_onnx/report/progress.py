"""Progress on stderr: a live bar on a terminal, a few plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from faq_onnx.progress import Advance
from faq_onnx.report.tables import format_duration

__all__ = ["LineProgress", "RichProgress", "make_progress"]

LINE_INTERVAL_S = 15.0  # a CI log of a ten-minute run then has about forty lines


def make_progress(stream: TextIO) -> RichProgress | LineProgress:
    """The progress that suits the stream: bars for a terminal, lines for a file or pipe."""
    return RichProgress(stream) if stream.isatty() else LineProgress(stream)


class _StepsColumn(ProgressColumn):
    """Steps done, of how many, in the stage's unit."""

    def render(self, task: Task) -> Text:
        """Nothing where the number of steps is unknown."""
        if task.total is None:
            return Text("")
        done = _amount(min(task.completed, task.total))
        return Text(f"{done}/{_amount(task.total)} {task.fields['unit']}")


class RichProgress:
    """One live bar for each open stage, with elapsed and remaining time."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._bars: Progress | None = None

    @contextmanager
    def stage(self, title: str, total: float, unit: str) -> Iterator[Advance]:
        """Show a bar until the stage ends; `total` 0 means that the number of steps is unknown."""
        started = time.monotonic()
        with self._shown() as bars:
            task = bars.add_task(title, total=total or None, unit=unit)
            yield lambda steps: bars.advance(task, steps)
            bars.remove_task(task)
        self.note(f"{title}: done in {format_duration(time.monotonic() - started)}")

    def note(self, text: str) -> None:
        """Print one line above the bars."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _shown(self) -> Iterator[Progress]:
        """The bars; a stage inside a stage gets a line in the display that is there."""
        if self._bars is not None:
            yield self._bars
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            _StepsColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bars:
            self._bars = bars
            try:
                yield bars
            finally:
                self._bars = None


class LineProgress:
    """A line at the start and the end of a stage, and one now and then between."""

    def __init__(self, stream: TextIO, interval_s: float = LINE_INTERVAL_S) -> None:
        self._stream = stream
        self._interval_s = interval_s
        self._started = time.monotonic()

    @contextmanager
    def stage(self, title: str, total: float, unit: str) -> Iterator[Advance]:
        """Report a stage; `total` 0 means that the number of steps is unknown."""
        started = last = time.monotonic()
        done = 0.0
        self.note(f"{title} ({_amount(total)} {unit})" if total > 0 else title)

        def advance(steps: float) -> None:
            nonlocal done, last
            done += steps
            now = time.monotonic()
            if total > 0 and now - last >= self._interval_s and done < total:
                last = now
                self.note(_line(title, done / total, now - started))

        yield advance
        self.note(f"{title}: done in {format_duration(time.monotonic() - started)}")

    def note(self, text: str) -> None:
        """Write one line with the time since the start of the run."""
        elapsed = format_duration(time.monotonic() - self._started)
        self._stream.write(f"[{elapsed:>7}] {text}\n")
        self._stream.flush()


def _amount(steps: float) -> str:
    return f"{steps:.0f}" if steps >= 10 or steps == int(steps) else f"{steps:.2g}"


def _line(title: str, share: float, elapsed_s: float) -> str:
    if share <= 0:
        return f"{title}: 0 %"
    left = format_duration(elapsed_s * (1 / share - 1))
    return f"{title}: {share:.0%}, about {left} left"
