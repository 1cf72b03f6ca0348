"""Every way a constant weight can sit in a graph: converted right, or left alone with a reason.

All convertible weights lie on the grid of 4-bit codes (each block of 32 spans -8 to 7 times a
power of two), so rounding loses nothing: a converted graph must give the numbers of the float
graph up to the rounding of float32 sums, and a wrong layout, block or zero point shows at once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import common

K, N, VOCABULARY, SEQUENCE = 128, 64, 96, 5
STEP = 0.125
BATCH_REASON = "a batch of 4 different weights"
PIPELINE = (
    "matmul-to-nbits{bits=4,block_size=32,accuracy_level=0},"
    "quantize-embedding{bits=4,block_size=32}"
)

Array = npt.NDArray[Any]
Coverage = tuple[Path, list[str], dict[str, str]]


def exact(rows: int, columns: int, dtype: npt.DTypeLike = np.float32) -> Array:
    """Weights [rows, columns] that 4-bit codes in blocks of 32 along the columns hold exactly."""
    rng = np.random.default_rng([rows, columns])
    codes = rng.integers(-8, 8, size=(rows, columns))
    codes[:, 0::32], codes[:, 1::32] = -8, 7
    return (codes * STEP).astype(dtype)


@dataclasses.dataclass
class Builder:
    """A graph of one node per pattern; the output of each is named after it."""

    graph: ir.Graph
    x: ir.Value
    flat: ir.Value
    converted: list[str] = dataclasses.field(default_factory=list)
    left_alone: dict[str, str] = dataclasses.field(default_factory=dict)

    def weight(self, name: str, array: Array) -> ir.Value:
        """Register an initializer."""
        value = ir.val(f"{name}.weight", const_value=ir.tensor(array, name=f"{name}.weight"))
        self.graph.register_initializer(value)
        return value

    def op(self, op_type: str, name: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Append a node and return its output."""
        node = ir.node(op_type, list(inputs), attributes or None, name=name)
        node.outputs[0].name = f"{name}.output"
        self.graph.append(node)
        return node.outputs[0]

    def keep(self, value: ir.Value, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
        """Make a value an output of the graph."""
        value.dtype = dtype
        self.graph.outputs.append(value)

    def convertible(self, op_type: str, name: str, *inputs: ir.Value, **attributes: Any) -> None:
        """Append a node that must become low-bit."""
        self.keep(self.op(op_type, name, *inputs, **attributes))
        self.converted.append(name)

    def untouched(
        self, reason: str, op_type: str, name: str, *inputs: ir.Value, **attributes: Any
    ) -> None:
        """Append a node that must stay, with a word of the reason."""
        self.keep(self.op(op_type, name, *inputs, **attributes))
        self.left_alone[name] = reason


def build() -> tuple[ir.Model, list[str], dict[str, str]]:
    """The model, the nodes that must become low-bit, and those that stay, with reasons."""
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([1, "sequence", K]))
    ids = ir.val("ids", dtype=ir.DataType.INT64, shape=ir.Shape([1, "sequence"]))
    condition = ir.val("condition", dtype=ir.DataType.BOOL, shape=ir.Shape([]))
    graph = ir.Graph(
        [x, ids, condition], [], nodes=[], opset_imports={"": 21}, name="every weight"
    )
    b = Builder(graph, x, x)
    b.flat = b.op("Reshape", "flat", x, b.weight("flat", np.array([-1, K], np.int64)))
    _add_matmuls(b)
    _add_gemms(b)
    _add_shared(b, ids)
    _add_branches(b, condition)
    _add_left_alone(b)
    model = common.ShapeInferencePass()(ir.Model(graph, ir_version=10)).model
    return model, b.converted, b.left_alone


def _add_matmuls(b: Builder) -> None:
    b.convertible("MatMul", "plain", b.x, b.weight("plain", exact(N, K).T))
    b.convertible("MatMul", "leading_one", b.x, b.weight("leading_one", exact(N, K).T[None]))
    constant = ir.node("Constant", [], {"value": ir.tensor(exact(N, K).T)}, name="constant")
    constant.outputs[0].name = "constant.output"
    b.graph.append(constant)
    b.convertible("MatMul", "constant_node", b.x, constant.outputs[0])
    same = b.op("Identity", "same", b.weight("identity", exact(N, K).T))
    b.convertible("MatMul", "behind_identity", b.x, same)
    turned = b.op("Transpose", "turned", b.weight("transpose", exact(N, K)), perm=[1, 0])
    b.convertible("MatMul", "behind_transpose", b.x, turned)
    for columns in (100, 96):  # ragged; three blocks, so that zero points fill half a byte
        ends = [
            b.weight(f"{key}{columns}", np.array([n], np.int64))
            for key, n in (("start", 0), ("end", columns), ("axis", 2))
        ]
        part = b.op("Slice", f"slice{columns}", b.x, *ends)
        name = f"columns_{columns}"
        b.convertible("MatMul", name, part, b.weight(name, exact(N, columns).T))
    product = b.op("MatMul", "with_bias", b.x, b.weight("with_bias", exact(N, K).T))
    b.converted.append("with_bias")
    bias = b.weight("bias", np.arange(N, dtype=np.float32))
    b.keep(b.op("Add", "add_bias", product, bias))
    half = b.op("Cast", "half", b.x, to=ir.DataType.FLOAT16)
    weight = b.weight("float16", exact(N, K, np.float16).T)
    b.keep(b.op("MatMul", "float16", half, weight), ir.DataType.FLOAT16)
    b.converted.append("float16")


def _add_gemms(b: Builder) -> None:
    b.convertible("Gemm", "gemm", b.flat, b.weight("gemm", exact(N, K).T))
    b.convertible("Gemm", "gemm_turned", b.flat, b.weight("gemm_turned", exact(N, K)), transB=1)
    bias = b.weight("gemm.bias", np.arange(N, dtype=np.float32))
    weight = b.weight("gemm_biased", exact(N, K))
    b.convertible("Gemm", "gemm_biased", b.flat, weight, bias, transB=1)
    weight = b.weight("gemm_alpha", exact(N, K))
    b.untouched("alpha or beta", "Gemm", "gemm_alpha", b.flat, weight, transB=1, alpha=2.0)
    turned = b.op("Transpose", "flat_turned", b.flat, perm=[1, 0])
    weight = b.weight("gemm_trans_a", exact(N, K))
    b.untouched("transA=1", "Gemm", "gemm_trans_a", turned, weight, transA=1, transB=1)


def _add_shared(b: Builder, ids: ir.Value) -> None:
    weight = b.weight("shared", exact(N, K).T)
    b.convertible("MatMul", "shared_first", b.x, weight)
    b.convertible("MatMul", "shared_second", b.op("Neg", "negative", b.x), weight)
    table = b.weight("table", exact(VOCABULARY, K))
    b.keep(b.op("Gather", "embedding", table, ids))
    head = b.op("Transpose", "table_turned", table, perm=[1, 0])
    b.convertible("MatMul", "tied_head", b.x, head)


def _add_branches(b: Builder, condition: ir.Value) -> None:
    branches = {}
    for key in ("then", "else"):
        name = f"in_{key}"
        array = exact(N, K).T * np.float32(1 if key == "then" else -0.5)
        weight = ir.val(f"{name}.weight", const_value=ir.tensor(array, name=f"{name}.weight"))
        node = ir.node("MatMul", [b.x, weight], name=name)
        node.outputs[0].name = f"{name}.output"
        node.outputs[0].dtype = ir.DataType.FLOAT
        branches[f"{key}_branch"] = ir.Graph(
            [], node.outputs, nodes=[node], initializers=[weight], name=key
        )
        b.converted.append(name)
    b.keep(b.op("If", "if", condition, **branches))


def _add_left_alone(b: Builder) -> None:
    turned = b.op("Transpose", "x_turned", b.x, perm=[0, 2, 1])
    left = b.weight("left_operand", exact(N, K))
    b.untouched("left operand", "MatMul", "left_operand", left, turned)
    four = b.op("Expand", "four", b.x, b.weight("shape", np.array([4, 1, 1], np.int64)))
    weights = b.weight("batch", np.stack([exact(N, K).T] * 4))
    b.untouched(BATCH_REASON, "MatMul", "batch", four, weights)
    pixels = b.op("Unsqueeze", "pixels", turned, b.weight("axes", np.array([3], np.int64)))
    kernel = b.weight("convolution", exact(N, K)[:, :, None, None])
    b.untouched("convolution", "Conv", "convolution", pixels, kernel)
    double = b.op("Cast", "double", b.x, to=ir.DataType.DOUBLE)
    weight = b.weight("double_precision", exact(N, K, np.float64).T)
    b.keep(b.op("MatMul", "double_precision", double, weight), ir.DataType.DOUBLE)
    b.left_alone["double_precision"] = "weight type DOUBLE"
    cast = b.op("Cast", "cast", b.weight("cast", exact(N, K, np.float16).T), to=ir.DataType.FLOAT)
    b.keep(b.op("MatMul", "behind_cast", b.x, cast))
    b.left_alone["cast"] = "cast before use"
    narrow = b.op(
        "Slice",
        "narrow",
        b.x,
        *(b.weight(f"narrow{i}", np.array([n], np.int64)) for i, n in enumerate((0, 8, 2))),
    )
    weight = b.weight("eight_columns", exact(N * 4, 8).T)
    b.untouched("K=8", "MatMul", "eight_columns", narrow, weight)


@pytest.fixture(scope="module")
def coverage(tmp_path_factory: pytest.TempPathFactory) -> Coverage:
    model, converted, left_alone = build()
    path = tmp_path_factory.mktemp("coverage") / "model.onnx"
    ir.save(model, path)
    return path, converted, left_alone


def run(path: Path, *, condition: bool) -> dict[str, Array]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    feeds = {
        "x": rng.normal(size=(1, SEQUENCE, K)).astype(np.float32),
        "ids": rng.integers(0, VOCABULARY, (1, SEQUENCE)),
        "condition": np.array(condition),
    }
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def test_every_pattern_is_converted_right_or_left_as_it_was(
    cli: Any, coverage: Coverage, tmp_path: Path
) -> None:
    path, converted, left_alone = coverage
    out = tmp_path / "low.onnx"
    done = cli.run("opt", path, "-p", PIPELINE, "-o", out, "-q")
    assert done.code == 0, done.err
    nodes = {node.name: node.op_type for node in ir.load(out).graph.all_nodes()}
    low_bit = {name for name, op_type in nodes.items() if op_type == "MatMulNBits"}
    assert low_bit == {f"{name}_Q4" for name in converted}
    assert list(nodes.values()).count("GatherBlockQuantized") == 1
    assert set(left_alone) <= nodes.keys()
    for condition in (True, False):
        wanted, got = run(path, condition=condition), run(out, condition=condition)
        assert wanted.keys() == got.keys()
        for name, want in wanted.items():
            # Sums of 128 products, each at most 4 times 1: float32 rounds them to 128 * 4 * eps
            # at worst; float16 rounds the result, of at most 64, once.
            tolerance = 64 * 2**-11 if want.dtype == np.float16 else 128 * 4 * 2**-23
            assert got[name].dtype == want.dtype, name
            np.testing.assert_allclose(got[name], want, rtol=0, atol=tolerance, err_msg=name)


def test_what_is_left_alone_is_listed_with_its_reason(cli: Any, coverage: Coverage) -> None:
    path, converted, left_alone = coverage
    census = cli.run("inspect", path, "--json", "-q").json
    assert {site["name"] for site in census["sites"]} == set(converted)
    skipped = {weight["node"]: weight["reason"] for weight in census["skipped"]}
    assert skipped.keys() == left_alone.keys()
    for name, reason in left_alone.items():
        assert reason in skipped[name], name
    inside = {site["name"] for site in census["sites"] if site["in_subgraph"]}
    assert inside == {"in_then", "in_else"}
    (table,) = census["embeddings"]
    assert (table["name"], table["tied_site"], table["tie"]) == (
        "embedding",
        "tied_head",
        "shared",
    )


def test_embedding_shares_the_buffer_of_its_head(
    cli: Any, coverage: Coverage, tmp_path: Path
) -> None:
    path, _, _ = coverage
    out = tmp_path / "low.onnx"
    pipeline = "matmul-to-nbits{block_size=32,accuracy_level=0},quantize-embedding{shared=true}"
    assert cli.run("opt", path, "-p", pipeline, "-o", out, "-q").code == 0
    model = ir.load(out)
    assert "table.weight" not in model.graph.initializers
    wanted, got = run(path, condition=True), run(out, condition=True)
    np.testing.assert_array_equal(got["embedding.output"], wanted["embedding.output"])


def test_convert_says_that_this_is_no_decoder(
    cli: Any, coverage: Coverage, scratch: Path, tmp_path: Path
) -> None:
    path, _, _ = coverage
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.zeros(400, np.int64))
    words = ("--method", "rtn", "--calibration", tokens)
    done = cli.quick("convert", path, "-o", scratch / "out", *words)
    assert done.code == 3
    assert "not an input of a text decoder" in done.err
    assert "faq-onnx opt" in done.err
    assert list(scratch.iterdir()) == []
