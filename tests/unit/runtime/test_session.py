"""Opening and running sessions, and what is said when that fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.errors import CorruptModelError, UnsupportedModelError
from faq_onnx.runtime.session import open_session, run_session


def _model(
    op_type: str = "Neg", *, opset: int = 17, ir_version: int = 8, external: str | None = None
) -> ir.Model:
    """Y = op(X) + w over 4 floats."""
    float_type = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="X", shape=ir.Shape([4]), type=float_type)
    y = ir.Value(name="Y", shape=ir.Shape([4]), type=float_type)
    tensor: ir.TensorProtocol = ir.tensor(np.arange(4, dtype=np.float32), name="w")
    if external is not None:
        tensor = ir.ExternalTensor(
            external, 0, 16, ir.DataType.FLOAT, shape=ir.Shape([4]), name="w", base_dir=""
        )
    w = ir.Value(name="w", const_value=tensor, shape=ir.Shape([4]), type=float_type)
    first = ir.Node("", op_type, [x], name="first")
    first.outputs[0].name = "T"
    second = ir.Node("", "Add", [first.outputs[0], w], outputs=[y], name="second")
    graph = ir.Graph(
        [x],
        [y],
        nodes=[first, second],
        initializers=[w],
        opset_imports={"": opset},
        name="g",
    )
    return ir.Model(graph, ir_version=ir_version)


def _bytes(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString())


def test_outputs_come_by_name() -> None:
    session = open_session(_bytes(_model()), threads=1, prepack=False)
    outputs = run_session(session, {"X": np.ones(4, np.float32)})
    assert outputs["Y"].tolist() == [-1, 0, 1, 2]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nothing.onnx"
    with pytest.raises(CorruptModelError, match=r"nothing\.onnx.*missing or damaged"):
        open_session(path)


def test_a_truncated_file_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(_bytes(_model())[:-7])
    with pytest.raises(CorruptModelError, match=r"cut\.onnx"):
        open_session(path)


@pytest.mark.parametrize("location", ["gone.data", "short.data"])
def test_external_data_that_is_missing_or_short_is_corrupt(tmp_path: Path, location: str) -> None:
    (tmp_path / "short.data").write_bytes(b"1234567")
    path = tmp_path / "model.onnx"
    path.write_bytes(_bytes(_model(external=location)))
    with pytest.raises(CorruptModelError, match="external data"):
        open_session(path)


def test_an_unknown_operator_is_unsupported() -> None:
    with pytest.raises(UnsupportedModelError, match="NoSuchOperator"):
        open_session(_bytes(_model("NoSuchOperator")))


@pytest.mark.parametrize(("opset", "ir_version"), [(99, 8), (17, 99)])
def test_a_model_that_is_too_new_gets_the_way_out(opset: int, ir_version: int) -> None:
    with pytest.raises(UnsupportedModelError, match=r"onnxruntime 1\..*lower opset"):
        open_session(_bytes(_model(opset=opset, ir_version=ir_version)))


def test_a_run_that_fails_shows_what_was_fed() -> None:
    session = open_session(_bytes(_model()))
    with pytest.raises(UnsupportedModelError, match=r"X float32\[5\]"):
        run_session(session, {"X": np.ones(5, np.float32)})
    with pytest.raises(UnsupportedModelError, match="Required inputs"):
        run_session(session, {})
