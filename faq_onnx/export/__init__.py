"""Any source (ONNX, Hugging Face, GGUF) becomes an ONNX file with its companions."""

from __future__ import annotations

from faq_onnx.export.resolve import resolve_source

__all__ = ["resolve_source"]
