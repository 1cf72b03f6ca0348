"""Llama 2 and 3, and what copied their architecture (SmolLM, SmolLM2, TinyLlama)."""

from __future__ import annotations

from faq_onnx.models.family import ModelFamily

__all__ = ["FAMILY"]

FAMILY = ModelFamily(name="llama", model_types=("llama",))
