"""Every error that faq-onnx raises on purpose, and the exit code that each becomes.

    FaqOnnxError                 1   base; says what, where, found, allowed, the way out
    |- UsageError                2   a wrong call
    |  |- ConfigError                an option or combination of options
    |  `- RecipeError                a recipe file; all unknown keys at once
    |- ModelError                3   the model that came in
    |  |- ExportError                the source could not be turned into ONNX
    |  |- UnsupportedModelError      a graph that this version cannot work on
    |  `- CorruptModelError          truncated, damaged or unsafe files
    |- CalibrationError          4   calibration data or what the model made of it
    |  |- CorpusError                text, tokens or tokenizer
    |  |- StatsMismatchError         statistics of another model or another corpus
    |  `- NonFiniteError             NaN or infinity in weights or activations
    |- PlanError                 5   what was asked cannot be planned
    |  `- UnsupportedFormatError     bits, block size or provider
    |- RewriteError              6   a pass met a graph that it cannot rewrite
    |- VerificationError         7   the result is not what it should be
    `- PackageError              8   writing or reading the output folder

Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "CalibrationError",
    "ConfigError",
    "CorpusError",
    "CorruptModelError",
    "ExportError",
    "FaqOnnxError",
    "ModelError",
    "NonFiniteError",
    "PackageError",
    "PlanError",
    "RecipeError",
    "RewriteError",
    "StatsMismatchError",
    "UnsupportedFormatError",
    "UnsupportedModelError",
    "UsageError",
    "VerificationError",
]


class FaqOnnxError(Exception):
    """Base of all deliberate errors; the message is written for the user."""

    exit_code: ClassVar[int] = 1


class UsageError(FaqOnnxError):
    """The call itself is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """An option has a value that is not allowed, or two options contradict each other."""


class RecipeError(UsageError):
    """A recipe file that does not parse or has unknown or wrong keys (all are listed)."""


class ModelError(FaqOnnxError):
    """The incoming model cannot be used."""

    exit_code = 3


class ExportError(ModelError):
    """A checkpoint could not be exported to ONNX."""


class UnsupportedModelError(ModelError):
    """A valid ONNX graph that cannot be converted."""


class CorruptModelError(ModelError):
    """Model files that are truncated, damaged, missing or point outside their folder."""


class CalibrationError(FaqOnnxError):
    """Calibration could not be done."""

    exit_code = 4


class CorpusError(CalibrationError):
    """Calibration text, token arrays or tokenizer do not fit."""


class StatsMismatchError(CalibrationError):
    """Statistics were collected on another model, corpus or version."""


class NonFiniteError(CalibrationError):
    """NaN or infinity in weights or activations."""


class PlanError(FaqOnnxError):
    """The wished quantization cannot be planned."""

    exit_code = 5


class UnsupportedFormatError(PlanError):
    """No kernel stores this combination of bits, block size and provider."""


class RewriteError(FaqOnnxError):
    """A pass met a graph that it cannot rewrite; carries the pass and node in its text."""

    exit_code = 6


class VerificationError(FaqOnnxError):
    """The written model is not good enough or not equal to what was computed."""

    exit_code = 7


class PackageError(FaqOnnxError):
    """The output folder could not be written or read."""

    exit_code = 8
