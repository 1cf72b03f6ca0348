"""Passes for compilers of fixed shapes: in onnxruntime, models compute what they did before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.errors import RewriteError
from faq_onnx.graph.io import load_model
from faq_onnx.opt import optimize
from faq_onnx.passes import FuseNormsPass, LiftMatMulNBitsPass, StaticShapesPass, run_passes
from faq_onnx.testing import TinyLlama, assert_models_close, tiny_feeds, tiny_llama_onnx

EXPORTERS = Path(__file__).parents[1] / "fixtures" / "exporters"
# Norm, product and softmax in another order: some roundings of float32 in each of two layers.
CLOSE = 2e-5
NORMS = {"llama": 5, "qwen2": 5, "qwen3": 9, "gemma3": 13}  # gemma3: four a layer, q and k norms


def _kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fused_norms_compute_the_same(dtype: str) -> None:
    spec = TinyLlama(dtype=dtype)
    model = tiny_llama_onnx(spec)
    assert run_passes(model, [FuseNormsPass()]).modified
    assert _kinds(model).count("SimplifiedLayerNormalization") == 2 * spec.layers + 1
    assert not {"Pow", "ReduceMean", "Sqrt"} & set(_kinds(model))
    assert not run_passes(model, [FuseNormsPass()]).modified
    # onnxruntime fuses the same norms when it loads the model as it came
    atol = CLOSE if dtype == "float32" else 2.0**-7
    assert_models_close(model, tiny_llama_onnx(spec), tiny_feeds(spec), atol=atol)


@pytest.mark.parametrize(
    "folder",
    sorted(
        folder
        for exporter in ("optimum", "dynamo20")
        for folder in EXPORTERS.glob(f"{exporter}-*-fp32")
    ),
    ids=lambda folder: folder.name,
)
def test_norms_of_exporters_are_found(folder: Path) -> None:
    model = load_model(folder / "model.onnx")
    run_passes(model, [FuseNormsPass()])
    family = folder.name.split("-")[1]
    assert _kinds(model).count("SimplifiedLayerNormalization") == NORMS[family]
    assert "ReduceMean" not in _kinds(model)


def test_narrow_norms_stay() -> None:
    model = load_model(EXPORTERS / "optimum-qwen3-untied-fp32" / "model.onnx")
    run_passes(model, [FuseNormsPass(min_width=64)])
    assert _kinds(model).count("SimplifiedLayerNormalization") == 5
    assert _kinds(model).count("ReduceMean") == 4  # of 16 channels: queries and keys


def _static(batch: int, length: int, past: int) -> dict[str, tuple[int, ...]]:
    plain = dict.fromkeys(("input_ids", "position_ids"), (batch, length))
    cache = {
        f"past_key_values.{layer}.{part}": (batch, 2, past, 16)
        for layer in range(2)
        for part in ("key", "value")
    }
    return {**plain, "attention_mask": (batch, past + length), **cache}


def test_static_shapes_compute_the_same() -> None:
    model = tiny_llama_onnx()
    shapes = StaticShapesPass(_static(2, 16, 0))
    assert run_passes(model, [shapes]).modified
    assert not run_passes(model, [shapes]).modified
    assert_models_close(model, tiny_llama_onnx(), tiny_feeds(), atol=CLOSE)


def test_every_input_needs_a_shape() -> None:
    shapes = _static(1, 4, 4)
    del shapes["attention_mask"]
    with pytest.raises(RewriteError, match=r"input attention_mask: its shape .* has symbols"):
        run_passes(tiny_llama_onnx(), [StaticShapesPass(shapes)])


def test_shapes_of_unknown_values_and_other_numbers_are_refused() -> None:
    shapes = _static(1, 4, 4)
    with pytest.raises(RewriteError, match="no input or output 'token_ids'"):
        run_passes(tiny_llama_onnx(), [StaticShapesPass({**shapes, "token_ids": (1, 4)})])
    wrong = {**shapes, "past_key_values.0.key": (1, 3, 4, 16)}
    with pytest.raises(RewriteError, match=r"cannot become \[1, 3, 4, 16\]"):
        run_passes(tiny_llama_onnx(), [StaticShapesPass(wrong)])


def test_lifted_products_compute_the_same() -> None:
    def gemm() -> ir.Model:
        weight = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
        model = ir.from_onnx_text(
            """<ir_version: 8, opset_import: ["" : 18]>
            g (float[rows,64] x, float[32,64] w) => (float[rows,32] y) {
              y = Gemm <transB: int = 1> (x, w)
            }"""
        )
        value = model.graph.inputs.pop()
        value.const_value = ir.tensor(weight, name="w")
        model.graph.register_initializer(value)
        return optimize(model, "matmul-to-nbits{accuracy_level=0}").model

    model = gemm()
    assert run_passes(model, [LiftMatMulNBitsPass()]).modified
    assert not run_passes(model, [LiftMatMulNBitsPass()]).modified
    assert _kinds(model) == ["Reshape", "MatMulNBits", "Reshape"]
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    assert_models_close(model, gemm(), {"x": x}, atol=0)
