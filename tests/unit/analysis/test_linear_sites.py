"""Every way in which a constant weight can sit in a graph: taken, or listed with the reason."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.analysis import canonicalise, take_census
from faq_onnx.artifacts.sites import LinearSite, ModelCensus, WeightLayout
from faq_onnx.errors import UnsupportedModelError
from faq_onnx.graph.weights import read_weight

HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'


def _random(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    return rng.normal(size=shape).astype(np.float32)


def _model(body: str, signature: str, **weights: np.ndarray) -> ir.Model:
    tensors = [ir.tensor(value, name=name) for name, value in weights.items()]
    return canonicalise(
        ir.from_onnx_text(f"{HEADER} g ({signature}) => (y) {{ {body} }}", initializers=tensors)
    )


def _census(
    body: str, signature: str = "float[1, 5, 128] x", **weights: np.ndarray
) -> ModelCensus:
    return take_census(_model(body, signature, **weights), None)


def _only_site(census: ModelCensus) -> LinearSite:
    assert len(census.sites) == 1
    assert census.skipped == ()
    return census.sites[0]


@dataclasses.dataclass(frozen=True)
class Taken:
    """A weight that is quantized."""

    body: str
    weights: dict[str, np.ndarray]
    layout: WeightLayout
    signature: str = "float[1, 5, 128] x"
    bias: str | None = None


TAKEN = {
    "matmul": Taken("y = MatMul (x, w)", {"w": _random(128, 64)}, WeightLayout.K_N),
    "matmul_bias": Taken(
        "h = MatMul (x, w) y = Add (b, h)",
        {"w": _random(128, 64), "b": _random(64)},
        WeightLayout.K_N,
        bias="b",
    ),
    "leading_one": Taken("y = MatMul (x, w)", {"w": _random(1, 128, 64)}, WeightLayout.ONE_K_N),
    "transposed": Taken(
        "t = Transpose <perm = [1, 0]> (w) i = Identity (t) y = MatMul (x, i)",
        {"w": _random(64, 128)},
        WeightLayout.N_K,
    ),
    "transposed_by_default": Taken(
        "t = Transpose (w) y = MatMul (x, t)", {"w": _random(64, 128)}, WeightLayout.N_K
    ),
    "gemm": Taken("y = Gemm (x, w)", {"w": _random(128, 64)}, WeightLayout.K_N, "float[5, 128] x"),
    "gemm_transposed_bias": Taken(
        "y = Gemm <transB = 1> (x, w, b)",
        {"w": _random(64, 128), "b": _random(64)},
        WeightLayout.N_K,
        "float[5, 128] x",
        bias="b",
    ),
    "gemm_of_transposed": Taken(
        "t = Transpose <perm = [1, 0]> (w) y = Gemm <transB = 1> (x, t)",
        {"w": _random(128, 64)},
        WeightLayout.K_N,
        "float[5, 128] x",
    ),
    "ragged_k": Taken(
        "y = MatMul (x, w)", {"w": _random(100, 64)}, WeightLayout.K_N, "float[1, 5, 100] x"
    ),
    "odd_blocks": Taken(
        "y = MatMul (x, w)", {"w": _random(96, 31)}, WeightLayout.K_N, "float[1, 5, 96] x"
    ),
    "float16": Taken(
        "y = MatMul (x, w)",
        {"w": _random(128, 64).astype(np.float16)},
        WeightLayout.K_N,
        "float16[1, 5, 128] x",
    ),
}


@pytest.mark.parametrize("case", TAKEN.values(), ids=TAKEN)
def test_linear_layers_are_found(case: Taken) -> None:
    model = _model(case.body, case.signature, **case.weights)
    site = _only_site(take_census(model, None))
    stored = case.weights["w"]
    expected = stored if case.layout is WeightLayout.N_K else stored.reshape(stored.shape[-2:]).T
    assert (site.layout, site.bias) == (case.layout, case.bias)
    assert (site.out_features, site.in_features) == expected.shape
    assert site.dtype == stored.dtype.name
    np.testing.assert_array_equal(read_weight(model, site), expected.astype(np.float32))


@dataclasses.dataclass(frozen=True)
class Left:
    """A weight that is left alone."""

    body: str
    weights: dict[str, np.ndarray]
    reason: str
    signature: str = "float[1, 5, 128] x"


LEFT = {
    "constant_a": Left(
        "y = MatMul (w, x)", {"w": _random(32, 64)}, "left operand", "float[1, 64, 128] x"
    ),
    "batch_of_weights": Left("y = MatMul (x, w)", {"w": _random(4, 128, 64)}, "batch of 4"),
    "both_constant": Left(
        "y = MatMul (v, w)", {"v": _random(9, 128), "w": _random(128, 64)}, "both"
    ),
    "gemm_alpha": Left(
        "y = Gemm <alpha = 2.0> (x, w)", {"w": _random(128, 64)}, "alpha", "float[5, 128] x"
    ),
    "gemm_trans_a": Left(
        "y = Gemm <transA = 1> (x, w)", {"w": _random(128, 64)}, "transA", "float[128, 5] x"
    ),
    "gemm_dynamic_c": Left(
        "y = Gemm (x, w, c)",
        {"w": _random(128, 64)},
        "not a constant",
        "float[5, 128] x, float[64] c",
    ),
    "small_k": Left("y = MatMul (x, w)", {"w": _random(8, 128)}, "K=8", "float[1, 5, 8] x"),
    "vector_input": Left(
        "y = MatMul (x, w)", {"w": _random(1, 128, 64)}, "rank 2", "float[5, 128] x"
    ),
    "convolution": Left(
        "y = Conv (x, w)", {"w": _random(64, 128, 1, 1)}, "convolution", "float[1, 128, 4, 4] x"
    ),
    "cast_weight": Left(
        "c = Cast <to = 1> (w) y = MatMul (x, c)",
        {"w": _random(128, 64).astype(np.float16)},
        "cast before use",
    ),
    "double": Left(
        "y = MatMul (x, w)",
        {"w": _random(128, 64).astype(np.float64)},
        "DOUBLE",
        "double[5, 128] x",
    ),
    "other_table": Left(
        "y = Gather <axis = 1> (w, ids)", {"w": _random(128, 64)}, "axis 0", "int64[3] ids"
    ),
}


@pytest.mark.parametrize("case", LEFT.values(), ids=LEFT)
def test_everything_else_is_listed_with_the_reason(case: Left) -> None:
    linear = "z = MatMul (x2, good)"
    body = f"{case.body} {linear}"
    signature = f"{case.signature}, float[1, 5, 32] x2"
    census = _census(body, signature, good=_random(32, 32), **case.weights)
    assert [site.weight for site in census.sites] == ["good"]
    assert any(
        weight.weight in case.weights and case.reason in weight.reason for weight in census.skipped
    ), census.skipped


def test_constant_nodes_and_branches_become_initializers() -> None:
    model = ir.from_onnx_text(
        f"""{HEADER} g (float[1, 5, 32] x, bool c) => (y) {{
            y = If (c) <
                then_branch = t () => (o) {{ o = MatMul (x, w) }},
                else_branch = e () => (o) {{ o = MatMul (x, w) }}
            >
            z = MatMul (x, k)
        }}"""
    )
    for graph in model.graphs():
        for node in list(graph):
            if node.op_type != "MatMul":
                continue
            values = _random(32, 16)
            if graph is model.graph:
                constant = ir.node("Constant", [], {"value": ir.tensor(values)}, name="constant")
                graph.insert_before(node, constant)
                node.replace_input_with(1, constant.outputs[0])
                constant.outputs[0].name = "k"
            else:
                weight = ir.Value(name="w", const_value=ir.tensor(values, name="w"))
                graph.register_initializer(weight)
                node.replace_input_with(1, weight)
    census = take_census(canonicalise(model), None)
    assert [site.in_subgraph for site in census.sites] == [True, True, False]
    assert len({site.weight for site in census.sites}) == 3
    assert len({site.output for site in census.sites}) == 3
    assert all(site.weight in model.graph.initializers for site in census.sites)
    scalable = {group.sites[0]: group.scalable for group in census.groups}
    assert [scalable[site.name] for site in census.sites] == [False, False, True]


@pytest.mark.parametrize(
    "body",
    [
        "y = com.microsoft.MatMulNBits <K = 128, N = 64, bits = 4, block_size = 32> (x, w, s)",
        "d = DequantizeLinear <axis = 0, block_size = 32> (w, s) y = MatMul (x, d)",
        "y = MatMulInteger (x, w)",
    ],
)
def test_quantized_models_are_refused(body: str) -> None:
    weights = {"w": np.zeros((128, 64), np.uint8), "s": _random(4, 64)}
    used = {
        name: value for name, value in weights.items() if f"{name})" in body or f"{name}," in body
    }
    with pytest.raises(UnsupportedModelError, match=r"already quantized: [A-Z]"):
        take_census(_model(body, "float[1, 5, 128] x", **used), None)


def test_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no linear layer.*convolution"):
        _census("y = Conv (x, w)", "float[1, 128, 4, 4] x", w=_random(64, 128, 1, 1))
