"""Reading and transforming single weights."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.sites import LinearRole, LinearSite, WeightLayout
from faq_onnx.errors import RewriteError
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.graph.weights import (
    read_initializer,
    read_weight,
    replace_weight,
    transform_initializer,
)

VALUES = np.linspace(-3, 3, 24 * 16, dtype=np.float32).reshape(24, 16)


def _model(values: np.ndarray, folder: Path) -> ir.Model:
    text = '<ir_version: 8, opset_import: ["" : 18]> g (float[1] x) => (z) { z = Foo (x, w) }'
    model = ir.from_onnx_text(text, initializers=[ir.tensor(values, name="w")])
    path = folder / "source.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    return load_model(path)


def _site(layout: WeightLayout) -> LinearSite:
    return LinearSite(
        name="site",
        output="y",
        op_type="MatMul",
        input="x",
        weight="w",
        layout=layout,
        role=LinearRole.OTHER,
        layer_index=None,
        in_features=16,
        out_features=24,
        dtype="float32",
    )


@pytest.mark.parametrize(
    ("layout", "stored"),
    [
        (WeightLayout.N_K, VALUES),
        (WeightLayout.K_N, np.ascontiguousarray(VALUES.T)),
        (WeightLayout.ONE_K_N, np.ascontiguousarray(VALUES.T)[None]),
    ],
)
def test_weights_of_any_layout_come_as_n_by_k(
    tmp_path: Path, layout: WeightLayout, stored: np.ndarray
) -> None:
    model = _model(stored, tmp_path)
    weight = read_weight(model, _site(layout))
    np.testing.assert_array_equal(weight, VALUES)
    assert weight.flags.c_contiguous
    weight[:] = 0  # the caller's own
    np.testing.assert_array_equal(read_weight(model, _site(layout)), VALUES)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_comes_as_float32(tmp_path: Path, dtype: type) -> None:
    values = read_initializer(_model(VALUES.astype(dtype), tmp_path), "w")
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, VALUES.astype(dtype).astype(np.float32))


def test_transformations_add_up_and_round_once(tmp_path: Path) -> None:
    model = _model(VALUES.astype(np.float16), tmp_path)
    third = np.float32(1 / 3)
    transform_initializer(model, "w", lambda values: values * third)
    transform_initializer(model, "w", lambda values: values * np.float32(3))
    exact = VALUES.astype(np.float16).astype(np.float32) * third * np.float32(3)
    np.testing.assert_array_equal(read_initializer(model, "w"), exact.astype(np.float16))
    twice = (VALUES.astype(np.float16).astype(np.float32) * third).astype(np.float16)
    twice = (twice.astype(np.float32) * np.float32(3)).astype(np.float16)
    assert (twice != exact.astype(np.float16)).any()  # so the test can tell the difference
    save_model(model, tmp_path / "out.onnx")
    saved = load_model(tmp_path / "out.onnx")
    np.testing.assert_array_equal(read_initializer(saved, "w"), exact.astype(np.float16))


def test_transformation_must_keep_the_shape(tmp_path: Path) -> None:
    model = _model(VALUES, tmp_path)
    transform_initializer(model, "w", lambda values: values[:1])
    with pytest.raises(RewriteError, match="'w'"):
        read_initializer(model, "w")


def test_overflow_of_float16_is_an_error(tmp_path: Path) -> None:
    model = _model(VALUES.astype(np.float16), tmp_path)
    transform_initializer(model, "w", lambda values: values * np.float32(1e5))
    with pytest.raises(RewriteError, match="300000 does not fit FLOAT16"):
        read_initializer(model, "w")


def test_unknown_and_integer_initializers_are_refused(tmp_path: Path) -> None:
    model = _model(np.arange(512), tmp_path)
    with pytest.raises(RewriteError, match="no initializer 'v'"):
        read_initializer(model, "v")
    with pytest.raises(RewriteError, match="only floats"):
        transform_initializer(model, "w", lambda values: values)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", WeightLayout)
def test_a_weight_of_any_layout_is_replaced(
    tmp_path: Path, layout: WeightLayout, dtype: type
) -> None:
    stored = VALUES if layout is WeightLayout.N_K else np.ascontiguousarray(VALUES.T)
    stored = (stored[None] if layout is WeightLayout.ONE_K_N else stored).astype(dtype)
    model = _model(stored, tmp_path)
    weight = np.random.default_rng(0).normal(size=VALUES.shape).astype(np.float32)
    replace_weight(model, _site(layout), weight)
    expected = weight.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(read_weight(model, _site(layout)), expected)
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    assert (tensor.name, tensor.dtype) == ("w", ir.DataType.from_numpy(np.dtype(dtype)))
    assert tuple(tensor.shape.numpy()) == stored.shape
    save_model(model, tmp_path / "out.onnx")
    saved = load_model(tmp_path / "out.onnx")
    np.testing.assert_array_equal(read_weight(saved, _site(layout)), expected)


def test_a_weight_that_was_scaled_is_replaced_as_it_is_given(tmp_path: Path) -> None:
    """Not scaled again; and what was loaded stays on disk as it was."""
    model = _model(VALUES, tmp_path)
    transform_initializer(model, "w", lambda values: values * np.float32(2))
    replace_weight(model, _site(WeightLayout.N_K), VALUES + 1)
    np.testing.assert_array_equal(read_weight(model, _site(WeightLayout.N_K)), VALUES + 1)
    again = load_model(tmp_path / "source.onnx")
    np.testing.assert_array_equal(read_weight(again, _site(WeightLayout.N_K)), VALUES)


def test_replacing_what_is_not_there_is_refused(tmp_path: Path) -> None:
    site = _site(WeightLayout.N_K).model_copy(update={"weight": "v"})
    with pytest.raises(RewriteError, match="no initializer 'v'"):
        replace_weight(_model(VALUES, tmp_path), site, VALUES)
