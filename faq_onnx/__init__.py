"""Future-Aware Quantization of ONNX language models.

    import faq_onnx

    report = faq_onnx.convert("model/", Path("out"), faq_onnx.QuantizeConfig(bits=4))

The names below are public and loaded at first use, so that `import faq_onnx` itself costs
nothing. The graph edits are `onnx_ir` passes in `faq_onnx.passes`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from faq_onnx.artifacts.run import RunReport
    from faq_onnx.artifacts.sites import ModelCensus
    from faq_onnx.artifacts.verification import VerificationReport
    from faq_onnx.config import (
        CalibrationConfig,
        FaqConfig,
        Method,
        QuantizeConfig,
        ScaleConfig,
        VerifyConfig,
    )
    from faq_onnx.errors import (
        CalibrationError,
        ConfigError,
        CorpusError,
        CorruptModelError,
        ExportError,
        FaqOnnxError,
        ModelError,
        NonFiniteError,
        PackageError,
        PlanError,
        RecipeError,
        RewriteError,
        StatsMismatchError,
        UnsupportedFormatError,
        UnsupportedModelError,
        UsageError,
        VerificationError,
    )
    from faq_onnx.pipeline import convert, inspect, preview
    from faq_onnx.progress import Progress
    from faq_onnx.recipes import load_recipe

__version__ = "0.1.0"

__all__ = [
    "CalibrationConfig",
    "CalibrationError",
    "ConfigError",
    "CorpusError",
    "CorruptModelError",
    "ExportError",
    "FaqConfig",
    "FaqOnnxError",
    "Method",
    "ModelCensus",
    "ModelError",
    "NonFiniteError",
    "PackageError",
    "PlanError",
    "Progress",
    "QuantizeConfig",
    "RecipeError",
    "RewriteError",
    "RunReport",
    "ScaleConfig",
    "StatsMismatchError",
    "UnsupportedFormatError",
    "UnsupportedModelError",
    "UsageError",
    "VerificationError",
    "VerificationReport",
    "VerifyConfig",
    "__version__",
    "convert",
    "inspect",
    "load_recipe",
    "preview",
]

_HOMES = {
    "CalibrationConfig": "faq_onnx.config",
    "FaqConfig": "faq_onnx.config",
    "Method": "faq_onnx.config",
    "ModelCensus": "faq_onnx.artifacts.sites",
    "Progress": "faq_onnx.progress",
    "QuantizeConfig": "faq_onnx.config",
    "RunReport": "faq_onnx.artifacts.run",
    "ScaleConfig": "faq_onnx.config",
    "VerificationReport": "faq_onnx.artifacts.verification",
    "VerifyConfig": "faq_onnx.config",
    "convert": "faq_onnx.pipeline",
    "inspect": "faq_onnx.pipeline",
    "load_recipe": "faq_onnx.recipes",
    "preview": "faq_onnx.pipeline",
}

if not TYPE_CHECKING:  # a typed __getattr__ would hide misspelt names from type checkers

    def __getattr__(name: str) -> object:
        """Load a public name from its home at first use."""
        if name not in __all__:
            raise AttributeError(f"module 'faq_onnx' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES.get(name, "faq_onnx.errors")), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """Public names, also those not loaded yet."""
        return sorted({*globals(), *__all__})
