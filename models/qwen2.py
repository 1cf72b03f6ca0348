"""Qwen 2 and 2.5: biases on q, k and v."""

from __future__ import annotations

from faq_onnx.models.family import ModelFamily

__all__ = ["FAMILY"]

FAMILY = ModelFamily(name="qwen2", model_types=("qwen2",), qkv_bias=True)
