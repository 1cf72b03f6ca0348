"""SmolLM3: a Llama graph where some layers have no rotary embedding."""

from __future__ import annotations

from faq_onnx.models.family import ModelFamily

__all__ = ["FAMILY"]

FAMILY = ModelFamily(name="smollm3", model_types=("smollm3",))
