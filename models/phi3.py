"""Phi 3 and 4 mini: fused qkv and gate_up projections."""

from __future__ import annotations

from faq_onnx.models.family import ModelFamily

__all__ = ["FAMILY"]

FAMILY = ModelFamily(name="phi3", model_types=("phi3",), fused_projections=True)
