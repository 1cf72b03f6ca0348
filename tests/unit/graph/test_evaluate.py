"""Single values of a graph in numpy."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.graph.evaluate import CannotEvaluateError, evaluate

TEXT = """
<ir_version: 8, opset_import: ["" : 18]>
main (float[b,s] x, float[b,s] y) => (float[b,s] z)
<float[2] two = {2, 3}>
{
  sum = Add (x, two)
  shape = Shape (y)
  ones = Expand (two, shape)
  z = Mul (sum, ones)
}
"""


def values(model: ir.Model) -> dict[str | None, ir.Value]:
    return {value.name: value for node in model.graph for value in node.outputs}


def test_the_walk_stops_at_what_is_fed() -> None:
    model = ir.from_onnx_text(TEXT)
    x = np.array([[1, 2]], np.float32)
    (found,) = evaluate(model, [values(model)["sum"]], {"x": x})
    np.testing.assert_array_equal(found, [[3, 5]])


def test_of_a_value_of_known_shape_only_the_shape_is_needed() -> None:
    model = ir.from_onnx_text(TEXT)
    (found,) = evaluate(
        model, [values(model)["ones"]], {}, lambda value: (4, 2) if value.name == "y" else None
    )
    np.testing.assert_array_equal(found, [[2, 3]] * 4)


def test_what_is_missing_is_named() -> None:
    model = ir.from_onnx_text(TEXT)
    with pytest.raises(CannotEvaluateError, match="input 'y'"):
        evaluate(model, [values(model)["z"]], {"x": np.zeros((1, 2), np.float32)})


def test_what_does_not_fit_is_said() -> None:
    model = ir.from_onnx_text(TEXT)
    with pytest.raises(CannotEvaluateError, match="sum cannot be computed"):
        evaluate(model, [values(model)["sum"]], {"x": np.zeros((1, 3), np.float32)})
