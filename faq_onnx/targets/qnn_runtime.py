"""onnxruntime-qnn in a process of its own: compile a graph, run what was compiled."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from faq_onnx.errors import PackageError
from faq_onnx.targets.qnn_limits import ARCHITECTURES

__all__ = ["PROVIDER", "Compiled", "QnnError", "compile_graph", "context_files", "is_here", "read"]

PROVIDER = "QNNExecutionProvider"
EXTRA = "pip install 'faq-onnx[qnn]'"
_UNSUPPORTED = re.compile(r"\{ name: ([^,}]*), type: (\w+) \}")
_SHOWN = 3


class QnnError(PackageError):
    """Qualcomm's compiler or simulator refused, failed, or crashed."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A graph that went through Qualcomm's compiler.

    Attributes:
        nodes: By execution provider.
        seconds: That it took.
        binary_bytes: Size of what the NPU loads.
    """

    nodes: dict[str, int]
    seconds: float
    binary_bytes: int


def is_here() -> bool:
    """Whether onnxruntime-qnn is installed."""
    return importlib.util.find_spec("onnxruntime_qnn") is not None


def context_files(graph: Path) -> tuple[Path, Path]:
    """The compiled graph (ONNX with one EPContext node) and its binary, beside the graph."""
    context = graph.with_name(f"{graph.stem}_ctx.onnx")
    return context, context.with_name(f"{context.stem}_qnn.bin")


def compile_graph(graph: Path, arch: str, folder: Path | None = None) -> Compiled:
    """Compile a graph of fixed lengths whole: no node may be left to the CPU.

    Args:
        graph: An ONNX file.
        arch: Such as "v75".
        folder: Where the result is written; None writes it beside the graph.

    Raises:
        QnnError: Names the nodes that the NPU does not take, or what the compiler said.
    """
    context, binary = context_files(graph if folder is None else folder / graph.name)
    context.unlink(missing_ok=True)  # onnxruntime does not replace it
    request = {"kind": "compile", "model": str(graph), "context": str(context)}
    answer = _ask({**request, "options": _options(arch)}, graph)
    if not binary.is_file():
        raise QnnError(f"{graph}: the compiler wrote no {binary.name}")
    return Compiled(answer["nodes"], answer["seconds"], binary.stat().st_size)


def read(prefill: Path, decode: Path, tokens: Sequence[int], arch: str) -> npt.NDArray[np.float32]:
    """Load compiled graphs in the simulator, without the CPU, and read tokens.

    All but the last go through the prefill graph, in as many pieces as it takes, the last one
    through the decode graph.

    Returns:
        Logits, float32 [tokens, vocabulary].

    Raises:
        QnnError: They do not load or run.
    """
    with tempfile.TemporaryDirectory(prefix="faq-onnx-") as folder:
        path = Path(folder) / "logits.npy"
        request = {"kind": "read", "prefill": str(prefill), "decode": str(decode)}
        rest = {"tokens": list(tokens), "logits": str(path), "options": _options(arch)}
        _ask({**request, **rest}, prefill.parent)
        logits: npt.NDArray[np.float32] = np.load(path)
        return logits


def _options(arch: str) -> Mapping[str, str]:
    return {
        "backend_type": "htp",
        "htp_arch": arch.removeprefix("v"),
        "soc_model": ARCHITECTURES[arch],
    }


def _ask(request: Mapping[str, Any], place: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "faq_onnx.targets._qnn_trial"]
    done = subprocess.run(  # noqa: S603 - our own module, no shell
        command,
        input=json.dumps(request),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise QnnError(f"{place}: {_reason(done)}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """What went wrong, in one line."""
    nodes = dict(_UNSUPPORTED.findall(done.stderr))
    if nodes:
        shown = ", ".join(f"{name} ({kind})" for name, kind in list(nodes.items())[:_SHOWN])
        more = f" and {len(nodes) - _SHOWN} more" if len(nodes) > _SHOWN else ""
        return f"QNN does not take {shown}{more}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        lines.append(f"the process died of signal {-done.returncode}")
    return lines[-1] if lines else f"the process ended with code {done.returncode}"
