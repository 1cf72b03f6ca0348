"""Export a checkpoint in a process of its own, so that torch's memory goes away with it."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from faq_onnx.artifacts.source import SourceModel
from faq_onnx.errors import ExportError
from faq_onnx.progress import Progress

__all__ = ["export_checkpoint"]

_LOGGER = logging.getLogger(__name__)
_NEEDED = ("torch", "transformers", "optimum.exporters.onnx", "onnxruntime")
_NEEDED_FOR_GGUF = ("gguf",)
_STEPS = 3  # lines "step: ..." that the worker writes
_LOG_LINES = 15


def export_checkpoint(
    given: str, checkpoint: str, output: Path, progress: Progress, *, online: bool = False
) -> SourceModel:
    """Export with optimum-onnx as text-generation-with-past, float32.

    Args:
        given: SOURCE as the user wrote it, for messages and the record.
        checkpoint: Hugging Face folder, .gguf file or hub id.
        output: Folder to make; removed again when the export fails.
        progress: Three steps: load, export, tokenizer.
        online: Allow downloads; only for hub ids.

    Raises:
        ExportError: The extra is not installed, or the exporter failed (with its last lines).
    """
    _require_extra(given, gguf=checkpoint.lower().endswith(".gguf"))
    output.mkdir(parents=True, exist_ok=True)
    try:
        _run_worker(given, checkpoint, output, progress, online=online)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    model = output / "model.onnx"
    if not model.is_file():
        raise ExportError(f"SOURCE {given!r}: the exporter ended without writing model.onnx")
    return SourceModel(given=given, onnx_path=model, folder=output, exported=True)


def _require_extra(given: str, *, gguf: bool) -> None:
    needed = _NEEDED + (_NEEDED_FOR_GGUF if gguf else ())
    missing = [name for name in needed if not _is_installed(name)]
    if missing:
        raise ExportError(
            f"SOURCE {given!r} is a checkpoint that must be exported first, and that needs "
            f'{", ".join(missing)}: pip install "faq-onnx[export]"; or give an .onnx file'
        )


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _run_worker(
    given: str, checkpoint: str, output: Path, progress: Progress, *, online: bool
) -> None:
    command = [sys.executable, "-m", "faq_onnx.export._worker", checkpoint, str(output)]
    environment = dict(os.environ, PYTHONUNBUFFERED="1", TOKENIZERS_PARALLELISM="false")
    if not online:
        environment["HF_HUB_OFFLINE"] = "1"
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        progress.stage(f"export {Path(given).name}", _STEPS, "step") as advance,
        subprocess.Popen(  # noqa: S603 - our own module, no shell
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            errors="replace",
        ) as process,
    ):
        try:
            _follow(process.stdout, advance)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        if code != 0:
            raise ExportError(f"SOURCE {given!r}: the export failed ({_cause(code)}){_tail(log)}")


def _follow(lines: IO[str] | None, advance: Callable[[float], None]) -> None:
    assert lines is not None
    for line in lines:
        if line.startswith("step:"):
            _LOGGER.info("export: %s", line.removeprefix("step:").strip())
            advance(1)


def _cause(code: int) -> str:
    if code == -9:
        return "killed, most likely for want of memory"
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _tail(log: IO[str]) -> str:
    """What went wrong (the last line of a traceback), and the lines that led to it."""
    log.seek(0)
    lines = [line.rstrip() for line in log if line.strip()]
    if not lines:
        return ", and it said nothing"
    context = "".join(f"\n  | {line}" for line in lines[-_LOG_LINES:-1])
    return f": {lines[-1].strip()}{context}"
