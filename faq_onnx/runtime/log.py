"""What onnxruntime writes to stderr from C++, which Python's logging never sees."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
import threading
from collections.abc import Iterator

__all__ = ["CapturedLog", "captured_log"]

STDERR = 2
# The file descriptor belongs to the whole process: two captures at once would swap their texts.
_one_capture = threading.RLock()


@dataclasses.dataclass
class CapturedLog:
    """Text written to file descriptor 2; empty until the capture ends."""

    text: str = ""


@contextlib.contextmanager
def captured_log() -> Iterator[CapturedLog]:
    """Redirect file descriptor 2 into a temporary file for the time of the block.

    Whatever other threads write to stderr meanwhile lands in the text too. If stderr is closed
    it is closed again afterwards. The descriptor is restored also when the block raises.
    """
    log = CapturedLog()
    with _one_capture, tempfile.TemporaryFile() as file:
        _flush()
        try:
            saved = os.dup(STDERR)
        except OSError:  # a daemon without stderr
            saved = None
        os.dup2(file.fileno(), STDERR)
        try:
            yield log
        finally:
            _flush()
            if saved is None:
                os.close(STDERR)
            else:
                os.dup2(saved, STDERR)
                os.close(saved)
            file.seek(0)
            log.text = file.read().decode("utf-8", errors="replace")


def _flush() -> None:
    # sys.stderr is None under pythonw, closed in some test runners
    with contextlib.suppress(AttributeError, ValueError, OSError):
        sys.stderr.flush()
