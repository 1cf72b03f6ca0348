"""Qualcomm's NPU: graphs of fixed lengths, compiled whole, run in the compiler's simulator."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationInfo, field_validator

from faq_onnx.artifacts.record import Record
from faq_onnx.artifacts.target import (
    FactTable,
    ModelOutline,
    PackageFacts,
    PlannedWeight,
    ProofCheck,
    Reference,
    Refusal,
    TargetProof,
)
from faq_onnx.graph.exact import exact_twin
from faq_onnx.progress import Progress
from faq_onnx.quant.formats import Provider
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.targets.protocol import PackageJob, Target, TargetOptions
from faq_onnx.targets.qnn_graphs import DECODE, PREFILL, Lengths, write_graphs
from faq_onnx.targets.qnn_limits import ARCHITECTURES, form_refusals, graph_refusals
from faq_onnx.targets.qnn_runtime import (
    EXTRA,
    PROVIDER,
    Compiled,
    QnnError,
    compile_graph,
    context_files,
    is_here,
    read,
)
from faq_onnx.targets.versions import installed_versions

__all__ = ["TARGET", "QnnOptions", "QnnTarget"]

MODEL_NAME = "model.onnx"
BUILD_NAME = "qnn.json"
GRAPHS = (PREFILL, DECODE)
# The NPU computes in float16. Roundings move the logits of our decoders by 0.6 to 3 % of their
# norm; an overflow, or a cache that is not where the graph looks, by more than half of it.
MAX_ERROR = 0.1


class QnnOptions(TargetOptions):
    """Options of the target qnn."""

    arch: str = "v75"
    """Architecture of the NPU: v69 (Snapdragon 8 Gen 1), v73 (8 Gen 2, X Elite), v75 (8 Gen 3),
    v79 (8 Elite), v81 (8 Elite Gen 5)."""
    prompt_tokens: Annotated[int, Field(ge=2)] = 64
    """Tokens that the prefill graph reads at once; longer prompts go through it in pieces."""
    context: Annotated[int, Field(ge=3)] = 512
    """Cached and new tokens together."""

    @field_validator("arch")
    @classmethod
    def _check_arch(cls, value: str) -> str:
        known = value if value.startswith("v") else f"v{value}"
        if known == "v68":
            raise ValueError(
                "v68 (Snapdragon 888) has no convolution over weights in blocks, which is what "
                f"MatMulNBits becomes; allowed {', '.join(ARCHITECTURES)}"
            )
        if known not in ARCHITECTURES:
            raise ValueError(f"allowed {', '.join(ARCHITECTURES)}")
        return known

    @field_validator("context")
    @classmethod
    def _check_context(cls, value: int, info: ValidationInfo) -> int:
        prompt = info.data.get("prompt_tokens")
        if prompt is not None and value <= prompt:
            raise ValueError(f"must be more than prompt_tokens, which is {prompt}")
        return value


class _Build(Record):
    """qnn.json: what was compiled, with what.

    Attributes:
        graphs: By name.
        versions: Of onnxruntime and of the compiler.
    """

    graphs: dict[str, Compiled]
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class QnnTarget(Target):
    """Two graphs and their binaries for onnxruntime's QNN provider."""

    name: ClassVar[str] = "qnn"
    options_type: ClassVar[type[TargetOptions]] = QnnOptions
    provider: ClassVar[Provider] = Provider.QNN
    fuses_attention: ClassVar[bool] = False

    @property
    def _chosen(self) -> QnnOptions:
        assert isinstance(self.options, QnnOptions)
        return self.options

    def weight_refusals(self, weight: PlannedWeight) -> tuple[Refusal, ...]:
        """Formats, and forms of nodes."""
        return (*super().weight_refusals(weight), *form_refusals(weight))

    def model_refusals(self, outline: ModelOutline) -> tuple[Refusal, ...]:
        """Operators, and inputs."""
        return tuple(graph_refusals(outline))

    def package(self, job: PackageJob) -> PackageFacts:
        """Write both graphs and compile them."""
        chosen = self._chosen
        lengths = Lengths(chosen.prompt_tokens, chosen.context)
        graphs = write_graphs(job.folder, job.work, lengths)
        if not is_here():
            note = f"not compiled: onnxruntime-qnn is not installed here ({EXTRA})"
            return PackageFacts(notes=(note,))
        compiled: dict[str, Compiled] = {}
        for name, graph in graphs.items():
            with job.progress.stage(f"compile {name} for {chosen.arch}", 1, "graphs") as advance:
                compiled[name] = compile_graph(graph, chosen.arch)
                advance(1)
        build = _Build(graphs=compiled, versions=_versions())
        build.save(job.folder / BUILD_NAME)
        return PackageFacts(tables=(_table(build, lengths),))

    def prove(self, folder: Path, reference: Reference, progress: Progress) -> TargetProof:
        """Load the binaries without the CPU provider, and compare logits with its.

        What was compiled by another version of the compiler is compiled once more, to be looked
        at only.
        """
        if not is_here() or not (folder / BUILD_NAME).is_file():
            why = f"not tried ({EXTRA})" if not is_here() else f"not tried: no {BUILD_NAME}"
            names = (*(_compile_check(name) for name in GRAPHS), _LOGITS)
            checks = [ProofCheck(name=name, passed=None, value=why) for name in names]
            return TargetProof(target=self.name, checks=tuple(checks), versions=_versions())
        build = _Build.load(folder / BUILD_NAME)
        checks = [self._compiled(folder, name, build, progress) for name in GRAPHS]
        with progress.stage("run in Qualcomm's simulator (slow)", 1, "runs") as advance:
            checks.append(self._logits(folder, reference))
            advance(1)
        return TargetProof(target=self.name, checks=tuple(checks), versions=_versions())

    def _compiled(self, folder: Path, name: str, build: _Build, progress: Progress) -> ProofCheck:
        """How much of a graph the NPU takes."""
        check, found = _compile_check(name), build.graphs[name]
        if build.versions != _versions():
            try:
                with (
                    tempfile.TemporaryDirectory(prefix="faq-onnx-") as work,
                    progress.stage(f"compile {name} again", 1, "graphs") as advance,
                ):
                    graph = folder / f"{name}.onnx"
                    found = compile_graph(graph, self._chosen.arch, Path(work))
                    advance(1)
            except QnnError as error:
                return ProofCheck(name=check, passed=False, value=str(error))
        on_npu, all_nodes = found.nodes.get(PROVIDER, 0), sum(found.nodes.values())
        value = f"{on_npu} of {all_nodes} nodes on {PROVIDER}"
        return ProofCheck(name=check, passed=0 < on_npu == all_nodes, value=value)

    def _logits(self, folder: Path, reference: Reference) -> ProofCheck:
        if reference.problem:
            why = f"nothing to compare with: {reference.problem}"
            return ProofCheck(name=_LOGITS, passed=None, value=why)
        chosen = self._chosen
        tokens = [*reference.prompt, *reference.tokens][: chosen.context]
        contexts = [context_files(folder / f"{name}.onnx")[0] for name in GRAPHS]
        try:
            found = read(contexts[0], contexts[1], tokens, chosen.arch)
        except QnnError as problem:
            return ProofCheck(name=_LOGITS, passed=False, value=str(problem))
        expected = _cpu_logits(folder / MODEL_NAME, tokens)
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        same = float((found.argmax(-1) == expected.argmax(-1)).mean())
        value = (
            f"{error:.1%} of their norm from the CPU's, same first choice at {same:.0%} of "
            f"{len(tokens)} tokens"
        )
        return ProofCheck(name=_LOGITS, passed=bool(error <= MAX_ERROR), value=value)


TARGET = QnnTarget

_LOGITS = "logits of the reloaded binaries"


def _compile_check(name: str) -> str:
    return f"{name} graph without the CPU"


def _cpu_logits(model: Path, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Logits float32 [tokens, vocabulary], with low-bit nodes in float32."""
    with exact_twin(model) as exact:
        session = open_session(exact)
    feeds = decoder_feeds(session.get_inputs(), np.array([tokens], np.int64))
    return np.asarray(run_session(session, feeds, ["logits"])["logits"][0], np.float32)


def _table(build: _Build, lengths: Lengths) -> FactTable:
    rows = tuple(
        (
            name,
            lengths.tokens(name),
            lengths.context - lengths.tokens(name),
            compiled.nodes.get(PROVIDER, 0),
            sum(compiled.nodes.values()) - compiled.nodes.get(PROVIDER, 0),
            round(compiled.seconds, 1),
            compiled.binary_bytes,
        )
        for name, compiled in build.graphs.items()
    )
    header = ("graph", "tokens", "cached", "on the NPU", "elsewhere", "compile s", "binary bytes")
    return FactTable(title="Compiled graphs", header=header, rows=rows)


def _versions() -> dict[str, str]:
    return installed_versions("onnxruntime", "onnxruntime-qnn")
