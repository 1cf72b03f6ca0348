"""Mistral 7B and its like: a Llama graph with a sliding window."""

from __future__ import annotations

from faq_onnx.models.family import ModelFamily

__all__ = ["FAMILY"]

FAMILY = ModelFamily(name="mistral", model_types=("mistral", "ministral"))
