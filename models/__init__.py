"""Model families as data; nothing else in the package asks for a model type."""

from __future__ import annotations

from faq_onnx.models import gemma3, llama, mistral, phi3, qwen2, qwen3, smollm3
from faq_onnx.models.family import ModelFamily

__all__ = ["FAMILIES", "ModelFamily"]

# Where only the graph is known, the first family with its features is taken.
FAMILIES: tuple[ModelFamily, ...] = (
    llama.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma3.FAMILY,
    phi3.FAMILY,
    mistral.FAMILY,
    smollm3.FAMILY,
)
