"""What is in a model: linear sites, roles, scale groups, embeddings, attention.

Reads graphs and changes none, but for `canonicalise`, which runs once after loading.
"""

from __future__ import annotations

from faq_onnx.analysis.attention_survey import AttentionSurvey, find_attention
from faq_onnx.analysis.canonical import canonicalise
from faq_onnx.analysis.census import take_census
from faq_onnx.analysis.finite import check_finite
from faq_onnx.analysis.rotation import find_rotation

__all__ = [
    "AttentionSurvey",
    "canonicalise",
    "check_finite",
    "find_attention",
    "find_rotation",
    "take_census",
]
