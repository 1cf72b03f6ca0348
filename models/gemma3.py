"""Gemma 3: (1 + w) norms, four per layer, scaled embeddings, normalised queries and keys."""

from __future__ import annotations

from faq_onnx.models.family import ModelFamily

__all__ = ["FAMILY"]

FAMILY = ModelFamily(
    name="gemma3",
    model_types=("gemma3", "gemma3_text"),
    qk_norm=True,
    scaled_embedding=True,
)
