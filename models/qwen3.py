"""Qwen 3: queries and keys are normalised per head."""

from __future__ import annotations

from faq_onnx.models.family import ModelFamily

__all__ = ["FAMILY"]

FAMILY = ModelFamily(name="qwen3", model_types=("qwen3",), qk_norm=True)
