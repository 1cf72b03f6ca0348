"""16-bit activations change a product by their rounding, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.graph.io import save_model
from faq_onnx.passes import ProductSteps, QuantizeActivationsPass, run_passes
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.uniform import dequantize_weight, quantize_rtn
from faq_onnx.runtime.session import open_session, run_session

K, N, ROWS = 64, 48, 5
RNG = np.random.default_rng(0)
WEIGHT = quantize_rtn(
    RNG.standard_normal((N, K)).astype(np.float32), block_format(4, 32, symmetric=True)
)
X = RNG.standard_normal((1, ROWS, K)).astype(np.float32)
STEPS = ProductSteps(before=1 / 64, behind=1 / 8)


def _model(opset: int) -> ir.Model:
    product = f"com.microsoft.MatMulNBits <K = {K}, N = {N}, bits = 4, block_size = 32> (x, B, S)"
    model = ir.from_onnx_text(
        f"""<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>
        g (float[1,{ROWS},{K}] x, uint8[{N},2,16] B, float[{N},2] S)
        => (float[1,{ROWS},{N}] y, float[1,{ROWS},{N}] z) {{
          [one] y = {product}
          [two] m = {product}
          [sum] z = Add (m, y)
        }}"""
    )
    for value, array in zip(model.graph.inputs[1:], (WEIGHT.packed, WEIGHT.scales), strict=True):
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    del model.graph.inputs[1:]
    return model


def _run(model: ir.Model, path: Path) -> dict[str, npt.NDArray[Any]]:
    save_model(model, path)
    return run_session(open_session(path), {"x": X}, ["y", "z"])


def _rounded(values: npt.NDArray[np.float32], step: float) -> npt.NDArray[np.float32]:
    rounded: npt.NDArray[np.float32] = (np.rint(values / step) * step).astype(np.float32)
    return rounded


def test_products_are_those_of_rounded_activations(tmp_path: Path) -> None:
    model = _model(18)
    assert run_passes(model, [QuantizeActivationsPass({"one": STEPS})]).modified
    found = _run(model, tmp_path / "m.onnx")
    weight = dequantize_weight(WEIGHT)
    y = _rounded(_rounded(X, STEPS.before) @ weight.T, STEPS.behind)
    # float32 sums may round to the next step where they lie in the middle of two
    assert np.isclose(found["y"], y, atol=1e-4).mean() > 0.99
    np.testing.assert_allclose(found["z"], found["y"] + X @ weight.T, atol=1e-4)


def test_values_beyond_the_range_are_the_largest_code(tmp_path: Path) -> None:
    model = _model(18)
    step = ProductSteps(before=1 / 64, behind=1e-6)
    run_passes(model, [QuantizeActivationsPass({"one": step})])
    found = _run(model, tmp_path / "m.onnx")["y"]
    assert found.max() == np.float32(32767 * 1e-6)


def test_products_of_one_activation_share_its_pair() -> None:
    model = _model(21)
    rewrite = QuantizeActivationsPass({"one": STEPS, "two": STEPS})
    assert run_passes(model, [rewrite]).modified
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 3
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert not run_passes(model, [rewrite]).modified


def test_products_without_steps_stay() -> None:
    model = _model(18)
    assert not run_passes(model, [QuantizeActivationsPass({"three": STEPS})]).modified
