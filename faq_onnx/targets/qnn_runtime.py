"""onnxruntime-qnn in a process of its own: compile a graph, run what was compiled."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
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

__all__ = ["PROVIDER", "Compiled", "Compiler", "QnnError", "context_files", "is_here"]

Floats = npt.NDArray[np.float32]

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
        binary_bytes: Size of what the NPU loads; 0 where it is in the binary of another graph.
    """

    nodes: dict[str, int]
    seconds: float
    binary_bytes: int


@dataclasses.dataclass(frozen=True)
class Compiler:
    """Qualcomm's compiler and simulator with their settings.

    Attributes:
        arch: Such as "v75".
        block_quantization: Weights of products between 16-bit activations become LPBQ.
    """

    arch: str
    block_quantization: bool = False

    def compile(self, graph: Path, folder: Path | None = None) -> Compiled:
        """Compile a graph of fixed lengths whole: no node may be left to the CPU.

        Args:
            graph: An ONNX file.
            folder: Where the result is written; None writes it beside the graph.

        Raises:
            QnnError: Names the nodes that the NPU does not take, or what the compiler said.
        """
        return self._compile([graph], folder or graph.parent, {"tokens": []})[0]

    def compile_together(self, graphs: Sequence[Path], folder: Path) -> list[Compiled]:
        """Compile graphs of one model into one binary, which has their weights once.

        The binary has the name of the first graph's. The simulator does not load it.

        Raises:
            QnnError: As `compile`.
        """
        return self._compile(graphs, folder, {"tokens": []})

    def compile_and_read(
        self, prefill: Path, decode: Path, tokens: Sequence[int]
    ) -> tuple[list[Compiled], Floats]:
        """Compile both graphs into one binary, and run them before it leaves memory.

        Returns:
            What was compiled, and logits as `read` returns them.

        Raises:
            QnnError: They do not compile or run.
        """
        with tempfile.TemporaryDirectory(prefix="faq-onnx-") as folder:
            logits = Path(folder) / "logits.npy"
            wish = {"tokens": list(tokens), "logits": str(logits)}
            compiled = self._compile([prefill, decode], Path(folder), wish)
            return compiled, np.load(logits)

    def read(self, prefill: Path, decode: Path, tokens: Sequence[int]) -> Floats:
        """Load compiled graphs in the simulator, without the CPU, and read tokens.

        All but the last go through the prefill graph, in as many pieces as it takes, the last
        one through the decode graph.

        Returns:
            Logits, float32 [tokens, vocabulary].

        Raises:
            QnnError: They do not load or run.
        """
        with tempfile.TemporaryDirectory(prefix="faq-onnx-") as folder:
            path = Path(folder) / "logits.npy"
            request = {"kind": "read", "prefill": str(prefill), "decode": str(decode)}
            rest = {"tokens": list(tokens), "logits": str(path), "options": self._options}
            _ask({**request, **rest}, prefill.parent)
            logits: Floats = np.load(path)
            return logits

    def _compile(
        self, graphs: Sequence[Path], folder: Path, wish: Mapping[str, Any]
    ) -> list[Compiled]:
        files = [context_files(folder / graph.name) for graph in graphs]
        for file in itertools.chain.from_iterable(files):
            file.unlink(missing_ok=True)  # onnxruntime does not replace them
        wanted = {
            graph.stem: {"model": str(graph), "context": str(context)}
            for graph, (context, _) in zip(graphs, files, strict=True)
        }
        request = {"kind": "compile", "graphs": wanted, "options": self._options, **wish}
        answer = _ask(request, graphs[0])
        if not files[0][1].is_file():
            raise QnnError(f"{graphs[0]}: the compiler wrote no {files[0][1].name}")
        sizes = [binary.stat().st_size if binary.is_file() else 0 for _, binary in files]
        return [
            Compiled(answer[graph.stem]["nodes"], answer[graph.stem]["seconds"], size)
            for graph, size in zip(graphs, sizes, strict=True)
        ]

    @property
    def _options(self) -> Mapping[str, str]:
        return {
            "backend_type": "htp",
            "htp_arch": self.arch.removeprefix("v"),
            "soc_model": ARCHITECTURES[self.arch],
            "enable_block_quant_weight_optimization": str(int(self.block_quantization)),
        }


def is_here() -> bool:
    """Whether onnxruntime-qnn is installed."""
    return importlib.util.find_spec("onnxruntime_qnn") is not None


def context_files(graph: Path) -> tuple[Path, Path]:
    """The compiled graph (ONNX with one EPContext node) and its binary, beside the graph."""
    context = graph.with_name(f"{graph.stem}_ctx.onnx")
    return context, context.with_name(f"{context.stem}_qnn.bin")


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
