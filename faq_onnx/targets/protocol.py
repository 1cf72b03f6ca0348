"""What every target does: know its limits, fill a folder, and prove that it runs."""

from __future__ import annotations

import abc
import dataclasses
import importlib.resources
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict

from faq_onnx.artifacts.source import SourceModel
from faq_onnx.artifacts.target import (
    ModelOutline,
    PackageFacts,
    PlannedWeight,
    Reference,
    Refusal,
    TargetProof,
)
from faq_onnx.progress import Progress
from faq_onnx.quant.formats import Provider
from faq_onnx.targets.limits import provider_refusals

__all__ = ["PackageJob", "Target", "TargetOptions"]


class TargetOptions(BaseModel):
    """What a target can be told with --target-option; docstrings of fields are shown to users."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@dataclasses.dataclass(frozen=True)
class PackageJob:
    """What a target makes a package of.

    Attributes:
        source: Where the model came from, with its companions.
        folder: Holds `model.onnx` and the companions. The target adds what its runtime needs, and
            may replace the model by another form.
        work: For what is not to be kept.
        outline: Of `model.onnx`.
        reference: What plain onnxruntime makes of the source, low-bit products in float32.
        progress: Receives stages and notes.
    """

    source: SourceModel
    folder: Path
    work: Path
    outline: ModelOutline
    reference: Reference
    progress: Progress


@dataclasses.dataclass(frozen=True)
class Target(abc.ABC):
    """A runtime that packages are made for; each has a module of its own, listed in `TARGETS`.

    Attributes:
        name: As the user writes it.
        options_type: Its options.
        provider: Of onnxruntime: the table of formats that it runs.
        fuses_attention: Runs GroupQueryAttention, so that attention may be fused.
        must_pass: A failed proof is an error, unless --force.
        options: What the user said.
    """

    name: ClassVar[str]
    options_type: ClassVar[type[TargetOptions]] = TargetOptions
    provider: ClassVar[Provider] = Provider.CPU
    fuses_attention: ClassVar[bool] = True
    must_pass: ClassVar[bool] = True

    options: TargetOptions

    @property
    def usage(self) -> str:
        """How to run the folder, from inside it: Markdown, for whoever gets it."""
        folder = importlib.resources.files("faq_onnx.targets").joinpath("usage")
        return folder.joinpath(f"{self.name}.md").read_text(encoding="utf-8").strip()

    def check_source(self, source: SourceModel, model: ir.Model) -> None:  # noqa: B027 - optional
        """Refuse before the work what packaging would fail on at its end.

        Args:
            source: Its companions.
            model: Its graph.

        Raises:
            PackageError: Something that the package needs is not here.
            UnsupportedModelError: The target cannot run such a graph.
        """

    def refusals(self, outline: ModelOutline) -> tuple[Refusal, ...]:
        """What would not run there, known before the work."""
        found = (refusal for each in outline.weights for refusal in self.weight_refusals(each))
        return (*found, *self.model_refusals(outline))

    def weight_refusals(self, weight: PlannedWeight) -> tuple[Refusal, ...]:
        """What of one weight would not run there, whatever the rest of the model is.

        Of the formats that compete under a budget, those with a refusal are left out.
        """
        return provider_refusals(weight, self.provider)

    def model_refusals(self, outline: ModelOutline) -> tuple[Refusal, ...]:  # noqa: ARG002
        """What of the model as a whole would not run there: its size, inputs and operators."""
        return ()

    @abc.abstractmethod
    def package(self, job: PackageJob) -> PackageFacts:
        """Fill the folder."""

    @abc.abstractmethod
    def prove(self, folder: Path, reference: Reference, progress: Progress) -> TargetProof:
        """Run a package in the real runtime, at its making and again on the user's machine.

        Args:
            folder: The package.
            reference: What plain onnxruntime made of the source, or what `package` gave.
            progress: Receives stages.
        """
