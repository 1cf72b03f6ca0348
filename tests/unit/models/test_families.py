"""The table of model families."""

from __future__ import annotations

import pkgutil

import faq_onnx.models
from faq_onnx.models import FAMILIES


def test_model_types_belong_to_one_family() -> None:
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))


def test_every_family_file_is_registered() -> None:
    files = {module.name for module in pkgutil.iter_modules(faq_onnx.models.__path__)}
    assert files - {"family"} == {family.name for family in FAMILIES}


def test_named_families_are_told_apart_by_features() -> None:
    features = [
        (family.qk_norm, family.qkv_bias, family.scaled_embedding, family.fused_projections)
        for family in FAMILIES
        if family.name not in {"mistral", "smollm3"}  # the same graph as llama
    ]
    assert len(features) == len(set(features))
