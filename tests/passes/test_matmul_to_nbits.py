"""The rewritten model computes with the dequantized weights, exactly as planned and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest

from faq_onnx.artifacts.plan import BlockFormat, SitePlan
from faq_onnx.artifacts.sites import LinearRole, LinearSite, ModelCensus, Tie, WeightLayout
from faq_onnx.artifacts.weights import QuantizedWeight
from faq_onnx.config import BlockScales
from faq_onnx.errors import RewriteError
from faq_onnx.graph.io import save_model
from faq_onnx.graph.weights import read_weight, transform_initializer
from faq_onnx.passes import MatMulToNBitsPass, run_passes
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.uniform import dequantize_weight, quantize_rtn, unpack_weight
from faq_onnx.testing import (
    TinyLlama,
    assert_models_close,
    tiny_feeds,
    tiny_llama_census,
    tiny_llama_onnx,
)
from faq_onnx.verify.nodes import low_bit_nodes

SPEC = TinyLlama()
CENSUS = tiny_llama_census(SPEC)
FORMAT = block_format(4, 32, symmetric=False)
LEVEL = 0  # float32 arithmetic, so that only the weights' rounding is in the result


def quantized(
    model: ir.Model, census: ModelCensus, fmt: BlockFormat
) -> dict[str, QuantizedWeight]:
    return {
        site.name: quantize_rtn(read_weight(model, site), fmt, np.dtype(site.dtype))
        for site in census.sites
    }


def plans(census: ModelCensus, fmt: BlockFormat | None) -> dict[str, SitePlan]:
    return {
        site.name: SitePlan(site=site.name, format=fmt, accuracy_level=LEVEL)
        for site in census.sites
    }


def to_nbits(model: ir.Model, census: ModelCensus, fmt: BlockFormat) -> MatMulToNBitsPass:
    return MatMulToNBitsPass(census.sites, plans(census, fmt), quantized(model, census, fmt))


def always(
    array: npt.NDArray[np.float32],
) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    return lambda _: array


@dataclasses.dataclass(frozen=True)
class Case:
    """A decoder and a format."""

    spec: TinyLlama
    code_bits: int
    block_size: int
    symmetric: bool
    block_scales: BlockScales = "float"


CASES = [
    Case(SPEC, 4, 32, symmetric=False),
    Case(SPEC, 8, 16, symmetric=True),
    Case(TinyLlama(tie=Tie.DUPLICATE, qkv_bias=True), 2, 64, symmetric=False),
    Case(TinyLlama(hidden=80, intermediate=112), 4, 64, symmetric=False),  # padded last blocks
    Case(TinyLlama(hidden=80, intermediate=112), 3, 32, symmetric=True),
    Case(SPEC, 4, 16, symmetric=False, block_scales="8-bit"),
    Case(SPEC, 4, 32, symmetric=True, block_scales="8-bit"),
    Case(SPEC, 4, 16, symmetric=True, block_scales="lpbq"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_with_the_dequantized_weights(case: Case) -> None:
    fmt = block_format(case.code_bits, case.block_size, case.symmetric, case.block_scales)
    census, model = tiny_llama_census(case.spec), tiny_llama_onnx(case.spec)
    rewrite, expected = to_nbits(model, census, fmt), tiny_llama_onnx(case.spec)
    for site in census.sites:
        weight = dequantize_weight(rewrite.weights[site.name])
        transform_initializer(expected, site.weight, always(weight.T))
    assert run_passes(model, [rewrite]).modified
    # five dot products per layer at most 112..128 terms long, each off by eps per term
    bound = 5 * case.spec.layers * 128 * float(np.finfo(np.float32).eps) * 20.0
    assert_models_close(model, expected, tiny_feeds(case.spec), atol=bound)


def test_float16_keeps_float16_scales() -> None:
    spec = TinyLlama(dtype="float16")
    census, model = tiny_llama_census(spec), tiny_llama_onnx(spec)
    run_passes(model, [to_nbits(model, census, FORMAT)])
    scales = model.graph.initializers["onnx::MatMul_701_scales"]
    assert scales.dtype == ir.DataType.FLOAT16
    assert_models_close(model, model, tiny_feeds(spec), atol=0)  # runs, finite


def test_names_types_and_shapes_stay() -> None:
    model, source = tiny_llama_onnx(SPEC), tiny_llama_onnx(SPEC)
    run_passes(model, [to_nbits(model, CENSUS, FORMAT)])
    was = {
        value.name: (value.dtype, str(value.shape))
        for node in source.graph
        for value in node.outputs
    }
    now = {
        value.name: (value.dtype, str(value.shape))
        for node in model.graph
        for value in node.outputs
    }
    assert now == was
    assert model.opset_imports == {"": 18, "com.microsoft": 1}
    assert model.ir_version == 8
    node = model.graph.node("/model/layers.0/self_attn/q_proj/MatMul_Q4")
    assert [value.name for value in node.inputs if value is not None][1:] == [
        "onnx::MatMul_701_Q4",
        "onnx::MatMul_701_scales",
        "onnx::MatMul_701_zero_points",
    ]
    assert "onnx::MatMul_701" not in model.graph.initializers


def test_a_shared_table_stays_for_the_embedding() -> None:
    spec = TinyLlama(tie=Tie.SHARED)
    census, model = tiny_llama_census(spec), tiny_llama_onnx(spec)
    run_passes(model, [to_nbits(model, census, FORMAT)])
    assert "model.embed_tokens.weight" in model.graph.initializers
    assert all(node.name != "Transpose_1" for node in model.graph)
    assert_models_close(model, model, tiny_feeds(spec), atol=0)


def test_a_second_run_changes_nothing() -> None:
    model = tiny_llama_onnx(SPEC)
    rewrite = to_nbits(model, CENSUS, FORMAT)
    assert run_passes(model, [rewrite]).modified
    before = ir.to_proto(model).SerializeToString()
    assert not run_passes(model, [rewrite]).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_sites_without_a_format_stay() -> None:
    model = tiny_llama_onnx(SPEC)
    rewrite = MatMulToNBitsPass(CENSUS.sites, plans(CENSUS, None), {})
    assert not run_passes(model, [rewrite]).modified
    assert model.opset_imports == {"": 18}


class Counted(Mapping[str, QuantizedWeight]):
    """Counts how often each weight is made."""

    def __init__(self, weights: Mapping[str, QuantizedWeight]) -> None:
        self.weights = weights
        self.reads: list[str] = []

    def __getitem__(self, name: str) -> QuantizedWeight:
        self.reads.append(name)
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_each_weight_is_made_once_and_only_for_writing() -> None:
    model = tiny_llama_onnx(SPEC)
    counted = Counted(quantized(model, CENSUS, FORMAT))
    run_passes(model, [MatMulToNBitsPass(CENSUS.sites, plans(CENSUS, FORMAT), counted)])
    assert counted.reads == []
    ir.to_proto(model)
    assert counted.reads == [site.name for site in CENSUS.sites]


IF_BODIES = """<ir_version: 8, opset_import: ["" : 18]>
main (float[b,s,32] x, bool c) => (float[b,s,2] y)
<float[32,2] w = {%s}>
{
  y = If (c) <
    then_branch = then () => (float[b,s,2] p) { [inside] p = MatMul (x, w) },
    else_branch = other () => (float[b,s,2] q) { z = Neg (x) [second] q = MatMul (z, w) }
  >
}"""


def in_body(name: str, output: str, source: str) -> LinearSite:
    return LinearSite(
        name=name,
        output=output,
        op_type="MatMul",
        input=source,
        weight="w",
        layout=WeightLayout.K_N,
        role=LinearRole.OTHER,
        layer_index=None,
        in_features=32,
        out_features=2,
        dtype="float32",
        in_subgraph=True,
    )


@pytest.mark.parametrize("condition", [True, False])
def test_bodies_of_an_if_share_a_weight_of_the_main_graph(
    condition: bool, rng: np.random.Generator
) -> None:
    numbers = ",".join(str(number) for number in range(-32, 32))
    model, expected = (ir.from_onnx_text(IF_BODIES % numbers) for _ in range(2))
    sites = (in_body("inside", "p", "x"), in_body("second", "q", "z"))
    fmt = block_format(8, 32, symmetric=False)
    weight = quantize_rtn(read_weight(model, sites[0]), fmt, np.dtype(np.float32))
    site_plans = {s.name: SitePlan(site=s.name, format=fmt, accuracy_level=0) for s in sites}
    rewrite = MatMulToNBitsPass(sites, site_plans, {site.name: weight for site in sites})
    run_passes(model, [rewrite])
    assert sorted(model.graph.initializers) == ["w_Q8", "w_scales", "w_zero_points"]
    feeds = {"x": rng.normal(size=(1, 3, 32)).astype(np.float32), "c": np.array(condition)}
    dequantized = dequantize_weight(weight).T
    transform_initializer(expected, "w", lambda _: dequantized)
    # 32 terms of size at most 32 * 4
    bound = 32 * float(np.finfo(np.float32).eps) * 32 * 32 * 4
    assert_models_close(model, expected, feeds, atol=bound)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A change of the site's record that no longer fits the graph, and what the error says."""

    change: dict[str, object]
    message: str


REFUSALS = [
    Refusal({"output": "nowhere"}, "no node produces the value 'nowhere'"),
    Refusal({"output": "/model/layers.0/Add_output_0"}, "comes from ::Add"),
    Refusal({"weight": "onnx::MatMul_702"}, "the census says 'onnx::MatMul_702'"),
    Refusal({"dtype": "bfloat16"}, "not bfloat16; keep the site float"),
    Refusal({"name": "unknown"}, "no quantized weight was made"),
]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.message)
def test_what_does_not_fit_the_census_is_refused(case: Refusal) -> None:
    model = tiny_llama_onnx(SPEC)
    weights = quantized(model, CENSUS, FORMAT)
    site = CENSUS.sites[0].model_copy(update=case.change)
    rewrite = MatMulToNBitsPass(
        (site,), {site.name: SitePlan(site=site.name, format=FORMAT)}, weights
    )
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(RewriteError, match=case.message) as caught:
        run_passes(model, [rewrite])
    assert caught.value.__notes__ == ["in pass matmul-to-nbits"]
    assert ir.to_proto(model).SerializeToString() == before


def test_a_weight_of_another_format_is_refused_when_it_is_written() -> None:
    model = tiny_llama_onnx(SPEC)
    weights = quantized(model, CENSUS, block_format(8, 32, symmetric=False))
    run_passes(model, [MatMulToNBitsPass(CENSUS.sites, plans(CENSUS, FORMAT), weights)])
    with pytest.raises(RewriteError, match="planned was"):
        model.graph.initializers["onnx::MatMul_701_Q4"].const_value.numpy()  # type: ignore[union-attr]


GEMM = """<ir_version: 8, opset_import: ["" : 18]>
main (float[s,16] x) => (float[s,2] y)
<float[2,16] w = {%s}, float[2] c = {1,2}>
{ [proj] y = Gemm <transB: int = 1, %s> (x, w, c) }"""


def test_a_gemm_with_a_factor_is_refused() -> None:
    numbers = ",".join(str(number) for number in range(32))
    model = ir.from_onnx_text(GEMM % (numbers, "alpha: float = 2.0"))
    update = {"op_type": "Gemm", "layout": WeightLayout.N_K, "in_features": 16}
    site = in_body("proj", "y", "x").model_copy(update=update)
    fmt = block_format(4, 16, symmetric=False)
    weight = quantize_rtn(read_weight(model, site), fmt, np.dtype(np.float32))
    plan = {site.name: SitePlan(site=site.name, format=fmt)}
    with pytest.raises(RewriteError, match=r"alpha=2\.0"):
        run_passes(model, [MatMulToNBitsPass((site,), plan, {site.name: weight})])


ONE_K_N = """<ir_version: 8, opset_import: ["" : 18]>
main (float[%s] x) => (float[%s] y)
<float[1,16,2] w = {%s}>
{ [proj] y = MatMul (x, w) }"""


def one_k_n(shape: str, result: str) -> tuple[ir.Model, MatMulToNBitsPass]:
    numbers = ",".join(str(number) for number in range(32))
    model = ir.from_onnx_text(ONE_K_N % (shape, result, numbers))
    update = {"layout": WeightLayout.ONE_K_N, "in_features": 16}
    site = in_body("proj", "y", "x").model_copy(update=update)
    fmt = block_format(8, 16, symmetric=False)
    weight = quantize_rtn(read_weight(model, site), fmt, np.dtype(np.float32))
    plan = {site.name: SitePlan(site=site.name, format=fmt, accuracy_level=0)}
    return model, MatMulToNBitsPass((site,), plan, {site.name: weight})


def test_a_weight_with_a_leading_one_needs_rank_three() -> None:
    model, rewrite = one_k_n("s,16", "1,s,2")
    with pytest.raises(RewriteError, match="lose its leading 1"):
        run_passes(model, [rewrite])
    model, rewrite = one_k_n("b,s,16", "b,s,2")
    assert run_passes(model, [rewrite]).modified
    weight = dequantize_weight(rewrite.weights["proj"])
    expected, _ = one_k_n("b,s,16", "b,s,2")
    transform_initializer(expected, "w", lambda _: weight.T[None])
    feeds = {"x": np.eye(16, dtype=np.float32)[None]}  # picks single weights: no sums, no error
    assert_models_close(model, expected, feeds, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_onnxruntime_folds_scales_of_8_bits(dtype: str, symmetric: bool, tmp_path: Path) -> None:
    """Into initializers: its int8 kernels are wrong where scales are no constants (1.31).

    In float16 models it casts scales of some nodes, all float ones too, and folds that only at the
    level that is the default.
    """
    spec = TinyLlama(dtype=dtype, tie=Tie.SHARED)
    census, model = tiny_llama_census(spec), tiny_llama_onnx(spec)
    fmt = block_format(4, 16, symmetric, "8-bit")
    weights = quantized(model, census, fmt)
    run_passes(model, [MatMulToNBitsPass(census.sites, plans(census, fmt), weights)])
    save_model(model, tmp_path / "model.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns about files that were optimized for this machine
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_BASIC if dtype == "float32" else levels.ORT_ENABLE_ALL
    )
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    nodes = {node.name: node for node in low_bit_nodes(ir.load(tmp_path / "folded.onnx"))}
    for site in census.sites:
        node, weight = nodes[f"{site.name}_Q4"], weights[site.name]
        found = node.scales(slice(None))  # of the initializer, or there would be none
        np.testing.assert_array_equal(found, unpack_weight(weight)[1].scale)
