"""Qualcomm's NPU: graphs of fixed lengths, compiled whole, run in the compiler's simulator."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

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
from faq_onnx.targets.qnn_activations import find_activations
from faq_onnx.targets.qnn_graphs import DECODE, PREFILL, Lengths, write_graphs
from faq_onnx.targets.qnn_limits import (
    ARCHITECTURES,
    activation_refusals,
    form_refusals,
    graph_refusals,
)
from faq_onnx.targets.qnn_runtime import (
    EXTRA,
    PROVIDER,
    Compiled,
    Compiler,
    QnnError,
    context_files,
    is_here,
)
from faq_onnx.targets.versions import installed_versions

__all__ = ["TARGET", "QnnOptions", "QnnTarget"]

MODEL_NAME = "model.onnx"
BUILD_NAME = "qnn.json"
GRAPHS = (PREFILL, DECODE)
# A product between 16-bit activations returns its rows at wrong places where it has 16 of them and
# an RMS norm stands above it (onnxruntime-qnn 2.7.0, all architectures; tests/e2e/test_qnn.py).
MISPLACED_TOKENS = 16
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
    activations: Literal["float16", "16-bit"] = "float16"
    """16-bit: products of weights with block scales of lpbq run on integers, with steps measured
    on text of the model; those that outliers would spoil stay in float16."""
    weights: Literal["separate", "shared"] = "separate"
    """shared: both graphs in one binary, which has the weights once. Qualcomm's simulator runs it
    where it was compiled, and does not load it again."""

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

    @field_validator("activations")
    @classmethod
    def _check_activations(cls, value: str, info: ValidationInfo) -> str:
        if value == "16-bit" and info.data.get("prompt_tokens") == MISPLACED_TOKENS:
            raise ValueError(
                f"not with prompt_tokens={MISPLACED_TOKENS}, where the compiler misplaces rows; "
                "allowed with any other number"
            )
        return value

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
        """Operators, inputs, and what activations ask of the weights as a whole."""
        scales = activation_refusals(outline) if self._chosen.activations == "16-bit" else ()
        return (*scales, *graph_refusals(outline))

    @property
    def _compiler(self) -> Compiler:
        return Compiler(self._chosen.arch, block_quantization=self._chosen.activations == "16-bit")

    def package(self, job: PackageJob) -> PackageFacts:
        """Write both graphs and compile them."""
        chosen = self._chosen
        lengths = Lengths(chosen.prompt_tokens, chosen.context)
        found = None
        if chosen.activations == "16-bit":
            starts = np.array(job.reference.prompt, np.int64)
            found = find_activations(job.folder / MODEL_NAME, starts, job.progress)
        graphs = write_graphs(job.folder, job.work, lengths, found.steps if found else {})
        notes, tables = ((found.note,), (found.table,)) if found else ((), ())
        if not is_here():
            note = f"not compiled: onnxruntime-qnn is not here ({EXTRA}, and package again)"
            return PackageFacts(notes=(*notes, note), tables=tables)
        compiled = self._compile(graphs, job.progress)
        build = _Build(graphs=compiled, versions=_versions())
        build.save(job.folder / BUILD_NAME)
        notes = (*notes, _device_note(graphs, compiled, chosen.arch))
        return PackageFacts(notes=notes, tables=(_table(build, lengths), *tables))

    def _compile(self, graphs: Mapping[str, Path], progress: Progress) -> dict[str, Compiled]:
        """Compile into the folder of the graphs."""
        arch, folder = self._chosen.arch, graphs[PREFILL].parent
        if self._chosen.weights == "shared":
            with progress.stage(f"compile both graphs for {arch}", 1, "binaries") as advance:
                together = self._compiler.compile_together(list(graphs.values()), folder)
                advance(1)
            return dict(zip(graphs, together, strict=True))
        compiled = {}
        for name, graph in graphs.items():
            with progress.stage(f"compile {name} for {arch}", 1, "graphs") as advance:
                compiled[name] = self._compiler.compile(graph)
                advance(1)
        return compiled

    def prove(self, folder: Path, reference: Reference, progress: Progress) -> TargetProof:
        """Run what was compiled without the CPU provider, and compare logits with its.

        What was compiled by another version of the compiler is compiled once more, to be looked
        at only. A binary that both graphs share is not loaded by the simulator: there they are
        compiled together again, and run before they leave memory.
        """
        logits = _TOGETHER if self._chosen.weights == "shared" else _LOGITS
        if not is_here() or not (folder / BUILD_NAME).is_file():
            why = f"not tried ({EXTRA})" if not is_here() else f"not tried: no {BUILD_NAME}"
            names = (*(_compile_check(name) for name in GRAPHS), logits)
            checks = [ProofCheck(name=name, passed=None, value=why) for name in names]
            return TargetProof(target=self.name, checks=tuple(checks), versions=_versions())
        build = _Build.load(folder / BUILD_NAME)
        if logits == _TOGETHER and not reference.problem:
            checks = self._run_together(folder, reference, progress)
        else:
            checks = [self._compiled(folder, name, build, progress) for name in GRAPHS]
            with progress.stage("run in Qualcomm's simulator (slow)", 1, "runs") as advance:
                checks.append(self._logits(folder, reference))
                advance(1)
        return TargetProof(target=self.name, checks=tuple(checks), versions=_versions())

    def _run_together(
        self, folder: Path, reference: Reference, progress: Progress
    ) -> list[ProofCheck]:
        """Compile and run both graphs in one process."""
        tokens = self._tokens(reference)
        prefill, decode = (folder / f"{name}.onnx" for name in GRAPHS)
        title = "compile again, and run in Qualcomm's simulator (slow)"
        try:
            with progress.stage(title, 1, "runs") as advance:
                compiled, found = self._compiler.compile_and_read(prefill, decode, tokens)
                advance(1)
        except QnnError as problem:
            return [ProofCheck(name=_TOGETHER, passed=False, value=str(problem))]
        checks = [_node_check(name, each) for name, each in zip(GRAPHS, compiled, strict=True)]
        return [*checks, _logit_check(_TOGETHER, folder, tokens, found)]

    def _tokens(self, reference: Reference) -> list[int]:
        return [*reference.prompt, *reference.tokens][: self._chosen.context]

    def _compiled(self, folder: Path, name: str, build: _Build, progress: Progress) -> ProofCheck:
        """How much of a graph the NPU takes."""
        found = build.graphs[name]
        if build.versions != _versions():
            try:
                with (
                    tempfile.TemporaryDirectory(prefix="faq-onnx-") as work,
                    progress.stage(f"compile {name} again", 1, "graphs") as advance,
                ):
                    found = self._compiler.compile(folder / f"{name}.onnx", Path(work))
                    advance(1)
            except QnnError as error:
                return ProofCheck(name=_compile_check(name), passed=False, value=str(error))
        return _node_check(name, found)

    def _logits(self, folder: Path, reference: Reference) -> ProofCheck:
        """What the binaries compute once they are loaded again."""
        if reference.problem:
            why = f"nothing to compare with: {reference.problem}"
            return ProofCheck(name=_LOGITS, passed=None, value=why)
        tokens = self._tokens(reference)
        contexts = [context_files(folder / f"{name}.onnx")[0] for name in GRAPHS]
        try:
            found = self._compiler.read(contexts[0], contexts[1], tokens)
        except QnnError as problem:
            return ProofCheck(name=_LOGITS, passed=False, value=str(problem))
        return _logit_check(_LOGITS, folder, tokens, found)


TARGET = QnnTarget

_LOGITS = "logits of the reloaded binaries"
_TOGETHER = "logits of the graphs in one binary"


def _compile_check(name: str) -> str:
    return f"{name} graph without the CPU"


def _node_check(name: str, compiled: Compiled) -> ProofCheck:
    on_npu, all_nodes = compiled.nodes.get(PROVIDER, 0), sum(compiled.nodes.values())
    value = f"{on_npu} of {all_nodes} nodes on {PROVIDER}"
    return ProofCheck(name=_compile_check(name), passed=0 < on_npu == all_nodes, value=value)


def _logit_check(
    name: str, folder: Path, tokens: Sequence[int], found: npt.NDArray[np.float32]
) -> ProofCheck:
    expected = _cpu_logits(folder / MODEL_NAME, tokens)
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    same = float((found.argmax(-1) == expected.argmax(-1)).mean())
    value = (
        f"{error:.1%} of their norm from the CPU's, same first choice at {same:.0%} of "
        f"{len(tokens)} tokens"
    )
    return ProofCheck(name=name, passed=bool(error <= MAX_ERROR), value=value)


def _cpu_logits(model: Path, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits float32 [tokens, vocabulary], with low-bit nodes in float32."""
    with exact_twin(model) as exact:
        session = open_session(exact)
    feeds = decoder_feeds(session.get_inputs(), np.array([tokens], np.int64))
    return np.asarray(run_session(session, feeds, ["logits"])["logits"][0], np.float32)


def _device_note(graphs: Mapping[str, Path], compiled: Mapping[str, Compiled], arch: str) -> str:
    """What to copy to a phone."""
    files = [file for name in GRAPHS for file in context_files(graphs[name]) if file.is_file()]
    size = sum(each.binary_bytes for each in compiled.values()) / 1e6
    seconds = sum(each.seconds for each in compiled.values())
    names = ", ".join(file.name for file in files)
    return f"for the device: {names} ({size:,.1f} MB, compiled for {arch} in {seconds:.0f} s)"


def _table(build: _Build, lengths: Lengths) -> FactTable:
    rows = tuple(
        (
            name,
            lengths.tokens(name),
            lengths.context - lengths.tokens(name),
            compiled.nodes.get(PROVIDER, 0),
            sum(compiled.nodes.values()) - compiled.nodes.get(PROVIDER, 0),
            round(compiled.seconds, 1),
            compiled.binary_bytes or "with prefill",
        )
        for name, compiled in build.graphs.items()
    )
    header = ("graph", "tokens", "cached", "on the NPU", "elsewhere", "compile s", "binary bytes")
    return FactTable(title="Compiled graphs", header=header, rows=rows)


def _versions() -> dict[str, str]:
    return installed_versions("onnxruntime", "onnxruntime-qnn")
