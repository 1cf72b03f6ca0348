"""Two model files on the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.errors import UnsupportedModelError
from faq_onnx.testing import TinyLlama, tiny_llama_onnx, write_tiny_llama
from faq_onnx.verify.compare import compare_models


def _windows() -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.random.default_rng(0).integers(0, TinyLlama().vocabulary, (3, 12))


def test_a_model_equals_itself(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path)
    found = compare_models(path, path, _windows())
    assert (found.tokens, found.kl_nats, found.top1_agreement) == (36, 0, 1)


def test_a_disturbed_model_is_worse(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "float")
    model = tiny_llama_onnx()
    weights = [
        value
        for name, value in model.graph.initializers.items()
        if name.startswith("onnx::MatMul") and value.const_value is not None
    ]
    assert weights
    rng = np.random.default_rng(0)
    for value in weights:
        assert value.const_value is not None
        array = value.const_value.numpy()
        noise = rng.standard_normal(array.shape) * 0.2 * array.std()
        value.const_value = ir.tensor((array + noise).astype(array.dtype), name=value.name)
    other = tmp_path / "other.onnx"
    ir.save(model, other)
    found = compare_models(path, other, _windows())
    assert found.kl_nats > 1e-4
    assert found.perplexity != found.perplexity_float


def test_both_models_need_logits(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path)
    model = ir.load(path)
    model.graph.outputs[0].name = "scores"
    other = tmp_path / "other.onnx"
    ir.save(model, other)
    with pytest.raises(UnsupportedModelError, match=r"other\.onnx: no output 'logits'"):
        compare_models(path, other, _windows())
