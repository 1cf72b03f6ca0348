"""What an error of one weight does to the logits, measured on the float model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.record import Record
from faq_onnx.errors import StatsMismatchError

__all__ = ["Perturbation", "Sensitivities", "Sensitivity"]


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """A coarser version of one weight.

    Attributes:
        weight: float32 [N, K] of a site, or [rows, width] of an embedding.
        error: Its output-error energy, in the unit in which candidates will be judged.
    """

    weight: npt.NDArray[np.float32]
    error: float


class Sensitivity(Record):
    """The measured effect of rounding one weight alone.

    Attributes:
        name: Of a linear site or an embedding.
        error: Output-error energy of the rounding.
        kl: KL(float || rounded) of the logits, nats per token.
    """

    name: str
    error: float
    kl: float

    @property
    def per_error(self) -> float:
        """KL per unit of output-error energy; 0 where the rounding changed nothing."""
        return self.kl / self.error if self.error > 0 else 0.0


class Sensitivities(Record):
    """Sensitivities of one model on one text.

    Attributes:
        model_fingerprint: Of the model.
        corpus_fingerprint: Of the token windows.
        perturbation: How weights were rounded, in words: another rounding is another measurement.
        tokens: Positions that KL was averaged over.
        entries: One per weight that could be perturbed, in the order of the model's parts.
    """

    schema_version: int = 1
    model_fingerprint: str
    corpus_fingerprint: str
    perturbation: str
    tokens: int
    entries: tuple[Sensitivity, ...]

    def per_error(self) -> dict[str, float]:
        """KL per unit of output-error energy, by name."""
        return {entry.name: entry.per_error for entry in self.entries}

    @classmethod
    def open(cls, path: Path, *, model_fingerprint: str) -> Sensitivities:
        """Read what `save` wrote.

        Raises:
            StatsMismatchError: Nothing there, or measured on another model.
        """
        if not path.is_file():
            msg = f"{path}: no such file; measure sensitivities with `faq-onnx calibrate --budget`"
            raise StatsMismatchError(msg)
        found = cls.load(path)
        if found.model_fingerprint != model_fingerprint:
            msg = f"{path}: measured on another model; calibrate this one"
            raise StatsMismatchError(msg)
        return found
