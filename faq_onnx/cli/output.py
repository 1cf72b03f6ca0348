"""Where results, errors, progress and the log go: stdout has the result only."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from typing import TextIO

from faq_onnx.errors import FaqOnnxError
from faq_onnx.progress import SILENT, Progress

__all__ = [
    "log_to_stderr",
    "open_progress",
    "print_error",
    "print_json",
    "print_result",
    "print_text",
]


def print_text(text: str) -> None:
    """The result for people."""
    sys.stdout.write(f"{text}\n")


def print_json(value: object) -> None:
    """The result for programs."""
    print_text(json.dumps(value, indent=2))


def print_result(args: argparse.Namespace, value: object, text: str) -> None:
    """What a command found: `value` with --json, `text` without."""
    if args.json:
        print_json(value)
    else:
        print_text(text)


def print_error(error: FaqOnnxError, *, as_json: bool) -> None:
    """The message and its notes on stderr; with --json also an object on stdout."""
    notes = list(getattr(error, "__notes__", ()))
    sys.stderr.write(f"error: {error}\n")
    sys.stderr.writelines(f"  {note}\n" for note in notes)
    if as_json:
        kind, code = type(error).__name__, error.exit_code
        details = {"type": kind, "exit_code": code, "message": str(error), "notes": notes}
        print_json({"error": details})


def open_progress(args: argparse.Namespace) -> Progress:
    """Progress on stderr, unless --quiet."""
    if args.quiet:
        return SILENT
    from faq_onnx.report.progress import make_progress  # noqa: PLC0415 - rich costs start-up time

    return make_progress(sys.stderr)


class _StderrHandler(logging.Handler):
    """Writes to whatever sys.stderr is now: rich replaces it while a bar is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        stream: TextIO = sys.stderr
        stream.write(self.format(record) + "\n")


@contextlib.contextmanager
def log_to_stderr(*, verbose: bool) -> Iterator[None]:
    """Show the log of this package while a command runs."""
    logger = logging.getLogger("faq_onnx")
    before = logger.level
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
