"""Statistics as graph outputs: right, once, and beside what was there."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from faq_onnx.errors import RewriteError
from faq_onnx.passes import ActivationRequest, InsertActivationStatsPass, run_passes

K = 5
REQUEST = ActivationRequest("h", K, gram=True)


def _model(opset: int = 18, dtype: str = "float") -> ir.Model:
    return ir.from_onnx_text(
        f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g ({dtype}[2, n, {K}] x) => ({dtype}[2, n, {K}] y) {{ h = Neg (x) y = Abs (h) }}"""
    )


def _run(model: ir.Model, x: np.ndarray) -> dict[str, np.ndarray]:
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


@pytest.mark.parametrize(("opset", "dtype"), [(12, "float"), (13, "float"), (18, "float16")])
def test_sums_are_right(opset: int, dtype: str, rng: np.random.Generator) -> None:
    model = _model(opset, dtype)
    assert run_passes(model, [InsertActivationStatsPass((REQUEST,))]).modified
    x = rng.normal(size=(2, 4, K)).astype(np.float16 if dtype == "float16" else np.float32)
    found = _run(model, x)
    rows = x.reshape(-1, K).astype(np.float64)
    np.testing.assert_array_equal(found["y"], np.abs(x))
    # 8 terms in float32, also where the activation itself is float16
    bound = 8 * 2.0**-23
    sum_abs, gram = found[REQUEST.sum_abs_name], found[REQUEST.gram_name]
    assert sum_abs.dtype == gram.dtype == np.float32
    np.testing.assert_allclose(sum_abs, np.abs(rows).sum(axis=0), rtol=bound)
    sizes = np.abs(rows).T @ np.abs(rows)
    np.testing.assert_allclose(gram - rows.T @ rows, 0 * gram, rtol=0, atol=bound * sizes.max())


def test_a_second_run_adds_nothing() -> None:
    model = _model()
    run_passes(model, [InsertActivationStatsPass((REQUEST,))])
    before = ir.to_proto(model).SerializeToString()
    assert not run_passes(model, [InsertActivationStatsPass((REQUEST,))]).modified
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("sum_abs", [False, True])
def test_only_what_was_asked_for_is_added(sum_abs: bool, gram: bool) -> None:
    model = _model()
    request = dataclasses.replace(REQUEST, sum_abs=sum_abs, gram=gram)
    result = run_passes(model, [InsertActivationStatsPass((request,))])
    names = [value.name for value in model.graph.outputs]
    wanted = [request.sum_abs_name] * sum_abs + [request.gram_name] * gram
    assert names == ["y", *wanted]
    assert result.modified is bool(wanted)


def test_graph_inputs_have_statistics_too(rng: np.random.Generator) -> None:
    model = _model()
    run_passes(model, [InsertActivationStatsPass((ActivationRequest("x", K),))])
    x = rng.normal(size=(2, 3, K)).astype(np.float32)
    np.testing.assert_allclose(
        _run(model, x)["x/faq_sum_abs"], np.abs(x).sum(axis=(0, 1)), rtol=6 * 2.0**-23
    )


def test_an_unknown_value_is_named() -> None:
    with pytest.raises(RewriteError, match="no value named 'nothing'"):
        run_passes(_model(), [InsertActivationStatsPass((ActivationRequest("nothing", K),))])
