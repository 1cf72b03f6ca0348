"""ORT Mobile: one .ort file, and the list of operators that a reduced runtime has to have."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

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
from faq_onnx.errors import ModelError, PackageError, VerificationError
from faq_onnx.graph.io import load_model
from faq_onnx.progress import Progress
from faq_onnx.runtime.cache_width import named_cache_widths
from faq_onnx.runtime.reference import (
    FLOAT_ROUNDING,
    logit_distance,
    take_reference,
    token_agreement,
)
from faq_onnx.runtime.session import open_session
from faq_onnx.targets.phone import phone_notes, phone_table
from faq_onnx.targets.protocol import PackageJob, Target
from faq_onnx.targets.versions import installed_versions

__all__ = ["TARGET", "OrtMobileTarget", "ort_bytes"]

ONNX_NAME = "model.onnx"
ORT_NAME = "model.ort"
LARGEST_FILE = 2**31 - 1  # offsets of a flatbuffer are signed 32-bit numbers
# On another processor activations round to other int8 numbers: 3e-2 were measured on emulated
# arm64. Another function is above 0.1.
INT8_ROUNDING = 8e-2
_TIMEOUT_S = 3600


@dataclasses.dataclass(frozen=True)
class OrtMobileTarget(Target):
    """Phones, on their CPU."""

    name: ClassVar[str] = "ort-mobile"

    def model_refusals(self, outline: ModelOutline) -> tuple[Refusal, ...]:
        """Files that a flatbuffer cannot hold."""
        size = ort_bytes(outline)
        if size <= LARGEST_FILE:
            return ()
        too_large = Refusal(
            place="the model",
            found=f"about {size / 1e9:.2f} GB",
            allowed=f"{LARGEST_FILE / 1e9:.2f} GB, since an .ort file is one flatbuffer",
            way_out="fewer --bits, a larger --block-size, a smaller --budget, or --target genai, "
            "whose ONNX file may have its weights beside it",
        )
        return (too_large,)

    def package(self, job: PackageJob) -> PackageFacts:
        """Write model.ort and required_operators.config in place of model.onnx.

        Raises:
            PackageError: onnxruntime cannot convert it.
            VerificationError: The .ort file computes something else than the ONNX file.
        """
        source = job.folder / ONNX_NAME
        model = load_model(source)
        before = sum(path.stat().st_size for path in job.folder.glob(f"{ONNX_NAME}*"))
        with job.progress.stage("write model.ort", 1, "models") as advance:
            _convert(job.folder, model)
            reference = _compare(source, job.folder / ORT_NAME, job.reference)
            advance(1)
        for path in job.folder.glob(f"{ONNX_NAME}*"):
            path.unlink()
        notes = [*phone_notes(job.outline)]
        if _has_float16(model.graph):
            notes.append(
                "float16: where onnxruntime on this machine computes in float32, model.ort does "
                "so on every phone and has its weights in float32; prefer a float32 source"
            )
        size = (job.folder / ORT_NAME).stat().st_size
        tables = (_size_table(job.folder, before), phone_table(job.outline))
        return PackageFacts(
            notes=tuple(notes), tables=tables, model_bytes=size, reference=reference
        )

    def prove(self, folder: Path, reference: Reference, progress: Progress) -> TargetProof:
        """Greedy tokens and logits of the .ort file in onnxruntime on this machine."""
        with progress.stage("try model.ort", 1, "runs") as advance:
            checks = tuple(_check(folder / ORT_NAME, reference))
            advance(1)
        versions = installed_versions("onnxruntime")
        return TargetProof(target=self.name, checks=checks, versions=versions)


TARGET = OrtMobileTarget


def ort_bytes(outline: ModelOutline) -> int:
    """About the size of the .ort file: all inside, scales in 8 bits multiplied out."""
    return outline.model_bytes + sum(map(_growth, outline.weights))


def largest_constant(graph: ir.Graph) -> int:
    """Bytes that onnxruntime may compute ahead without storing a shared table twice; 0: any.

    Table and head have one buffer, which the table's Gather reads through a Reshape (or the head
    through a Transpose). Computed ahead, that would be a second buffer.
    """
    views, others = [0], [0]
    for node in graph:
        data = next(iter(node.inputs), None)
        tensor = None if data is None else data.const_value
        if data is not None and tensor is not None and node.op_type in {"Reshape", "Transpose"}:
            (views if len(data.uses()) > 1 else others).append(tensor.nbytes)
        elif node.op_type in {"Cast", "Mul"}:
            known = [v.const_value.nbytes for v in node.inputs if v and v.const_value]
            others += [4 * size for size in known]  # a byte becomes a float at most
    smallest = min((size for size in views if size), default=0)
    return smallest - 1 if smallest > max(others) else 0


def _has_float16(graph: ir.Graph) -> bool:
    return any(value.dtype == ir.DataType.FLOAT16 for value in graph.initializers.values())


def _growth(weight: PlannedWeight) -> int:
    if weight.format is None or weight.format.block_scales == "float":
        return 0
    scale_bytes = 2 if weight.dtype == "float16" else 4
    plain = weight.format.model_copy(update={"block_scales": "float"})
    small = weight.format.weight_bytes(weight.rows, weight.width, scale_bytes)
    return plain.weight_bytes(weight.rows, weight.width, scale_bytes) - small


def _convert(folder: Path, model: ir.Model) -> None:
    words = [str(folder), str(largest_constant(model.graph))]
    # The width of a cache may be a mere name, which an .ort file could no longer explain.
    words += [f"{name}={width}" for name, width in named_cache_widths(model).items()]
    command = [sys.executable, "-m", "faq_onnx.targets._ort_conversion", *words]
    try:
        done = subprocess.run(  # noqa: S603 - our own module, no shell
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        msg = f"{folder / ONNX_NAME}: conversion to .ort took more than {_TIMEOUT_S} s"
        raise PackageError(msg) from error
    if done.returncode != 0 or not (folder / ORT_NAME).is_file():
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        msg = f"{folder / ONNX_NAME}: onnxruntime cannot convert it to .ort: {lines[-1]}"
        raise PackageError(msg)


def _compare(onnx: Path, ort: Path, exact: Reference) -> Reference:
    """Run both files; the graphs and kernels are the same, so that even int8 rounds alike.

    Returns:
        What the ONNX file says with the kernels that are the default, as phones will run it.
    """
    steps = len(exact.tokens) or 1
    before, after = (take_reference(open_session(p), exact.prompt, steps) for p in (onnx, ort))
    if before.problem:  # no decoder
        return before
    distance = logit_distance(before, after)
    if not distance <= FLOAT_ROUNDING:
        msg = (
            f"{ort.name}: its logits differ from those of the ONNX file by {distance:.2g} of "
            "their size; please report the model, and use --target genai"
        )
        raise VerificationError(msg)
    return before


def _check(path: Path, reference: Reference) -> Iterator[ProofCheck]:
    try:
        session = open_session(path)
    except ModelError as error:
        yield ProofCheck(name="loads", passed=False, value=str(error))
        return
    yield ProofCheck(name="loads", passed=True, value=f"{path.name} in onnxruntime")
    if reference.problem:
        nothing = f"nothing to compare with: {reference.problem}"
        yield ProofCheck(name="logits", passed=None, value=nothing)
        return
    found = take_reference(session, reference.prompt, len(reference.tokens))
    if found.problem:
        yield ProofCheck(name="logits", passed=False, value=found.problem)
        return
    distance = logit_distance(reference, found)
    value = f"differ from the ONNX file's by {distance:.1g} of their size"
    yield ProofCheck(name="logits", passed=distance <= INT8_ROUNDING, value=value)
    rounding = max(FLOAT_ROUNDING, min(distance, INT8_ROUNDING))
    agreement = token_agreement(reference, found.tokens, rounding)
    yield ProofCheck(name="greedy tokens", passed=agreement.passed, value=agreement.text)


def _size_table(folder: Path, onnx_bytes: int) -> FactTable:
    sizes: Mapping[str, int] = {path.name: path.stat().st_size for path in folder.iterdir()}
    rows = [(ONNX_NAME, onnx_bytes, "not in the package")]
    rows += [(name, size, "") for name, size in sorted(sizes.items(), key=lambda item: -item[1])]
    rows.append(("together", sum(sizes.values()), ""))
    return FactTable(title="sizes in bytes", header=("file", "bytes", ""), rows=tuple(rows))
