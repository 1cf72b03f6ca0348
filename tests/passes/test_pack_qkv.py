"""One product for query, key and value gives the numbers of three, bit by bit where it can."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from faq_onnx.analysis import canonicalise, find_attention, take_census
from faq_onnx.artifacts.source import context_length
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.opt import optimize
from faq_onnx.passes import (
    FuseAttentionPass,
    PackQkvPass,
    QuantizeCachePass,
    attention_nodes,
    is_packed,
    run_passes,
)
from faq_onnx.runtime.feeds import cache_position, decoder_feeds
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.testing import TinyLlama, tiny_llama_onnx

Outputs = dict[str, npt.NDArray[Any]]
EXPORTERS = Path(__file__).parents[1] / "fixtures" / "exporters"
LOW_BIT = "matmul-to-nbits{accuracy_level=0},quantize-embedding"


def fused(spec: TinyLlama, pipeline: str = "") -> ir.Model:
    model = tiny_llama_onnx(spec)
    if pipeline:
        optimize(model, pipeline)
    run_passes(model, [FuseAttentionPass(find_attention(model, 64).blocks)])
    return model


def exported(family: str, pipeline: str = "") -> ir.Model:
    folder = EXPORTERS / f"optimum-{family}-untied-fp32"
    model = canonicalise(load_model(folder / "model.onnx"))
    config = json.loads((folder / "config.json").read_text())
    if pipeline:
        optimize(model, pipeline, config=config)
    run_passes(model, [FuseAttentionPass(find_attention(model, context_length(config)).blocks)])
    return model


def run(model: ir.Model, path: Path) -> list[Outputs]:
    """Outputs for a prompt of two texts, and for single tokens behind it."""
    save_model(model, path)
    session = open_session(path)
    rng = np.random.default_rng(0)
    found: list[Outputs] = []
    pasts: Outputs | None = None
    for length in (12, 1, 1):
        ids = rng.integers(3, 60, (2, length))
        outputs = run_session(session, decoder_feeds(session.get_inputs(), ids, pasts))
        presents = {cache_position(name): name for name in outputs if name != "logits"}
        pasts = {
            value.name: outputs[presents[cache_position(value.name)]]
            for value in session.get_inputs()
            if cache_position(value.name) is not None
        }
        found.append(outputs)
    return found


def assert_same(packed: list[Outputs], plain: list[Outputs], roundings: float) -> None:
    """Equal, or within so many roundings of the largest number."""
    for one, other in zip(packed, plain, strict=True):
        assert one.keys() == other.keys()
        for name, array in other.items():
            if not roundings:
                np.testing.assert_array_equal(one[name], array)
                continue
            atol = roundings * float(np.finfo(array.dtype).eps * np.abs(array).max())
            np.testing.assert_allclose(one[name], array, rtol=0, atol=atol)


@dataclasses.dataclass(frozen=True)
class Case:
    """A decoder, made low-bit by a pipeline."""

    spec: TinyLlama
    pipeline: str = ""

    def __str__(self) -> str:
        return f"{self.spec}-{self.pipeline}"


@pytest.mark.parametrize(
    "case",
    [
        Case(TinyLlama()),
        Case(TinyLlama(dtype="float16")),
        Case(TinyLlama(), LOW_BIT),
        Case(TinyLlama(qkv_bias=True), "matmul-to-nbits{symmetric=true}"),
        Case(TinyLlama(qkv_bias=True), "matmul-to-nbits{bits=8,block_size=16}"),
        Case(TinyLlama(dtype="float16"), LOW_BIT),
    ],
    ids=str,
)
def test_a_tiny_decoder_computes_the_same(case: Case, tmp_path: Path) -> None:
    model = fused(case.spec, case.pipeline)
    plain = run(model, tmp_path / "plain.onnx")
    assert run_passes(model, [PackQkvPass()]).modified
    assert all(map(is_packed, attention_nodes(model)))
    # a row of the weight meets the same activation; only float kernels may sum it in other order
    low_bit = bool(case.pipeline) and case.spec.dtype == "float32"
    assert_same(run(model, tmp_path / "packed.onnx"), plain, 0 if low_bit else 64)


def test_rows_are_those_of_the_three(tmp_path: Path) -> None:
    model = fused(TinyLlama(layers=1), LOW_BIT)
    products = {n.outputs[0].name: n for n in model.graph if n.op_type == "MatMulNBits"}
    (attention,) = attention_nodes(model)
    three = [products[value.name] for value in attention.inputs[:3] if value is not None]
    columns = list(zip(*(node.inputs[1:] for node in three), strict=True))
    expected = [np.concatenate([array(value) for value in column]) for column in columns]
    assert len(expected) == 3  # codes, scales, zero points
    run_passes(model, [PackQkvPass()])
    save_model(model, tmp_path / "packed.onnx")
    (node,) = [n for n in load_model(tmp_path / "packed.onnx").graph if "q_proj" in str(n.name)]
    assert node.name == "/model/layers.0/self_attn/q_proj+k_proj+v_proj/MatMul_Q4"
    for value, rows in zip(node.inputs[1:], expected, strict=True):
        assert np.array_equal(array(value), rows)
    left = sum(n.op_type == "MatMulNBits" for n in model.graph)
    assert left == len(products) - 2
    assert not any("k_proj" in name and "+" not in name for name in model.graph.initializers)


def array(value: ir.Value | None) -> npt.NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def test_a_packed_float_model_is_understood() -> None:
    model = fused(TinyLlama(layers=1))
    plain = take_census(model, None)
    run_passes(model, [PackQkvPass()])
    census = take_census(model, None)
    assert [site.role for site in census.sites][:2] == ["qkv_proj", "o_proj"]
    assert len(census.sites) == len(plain.sites) - 2
    assert [group.name for group in census.groups] == [group.name for group in plain.groups]
    assert census.warnings == plain.warnings


def test_an_int8_cache_works_on_packed_nodes(tmp_path: Path) -> None:
    model = fused(TinyLlama(), LOW_BIT)
    scales = {
        str(value.name): np.full(32, 0.05, np.float32)
        for value in model.graph.outputs
        if value.name != "logits"
    }
    run_passes(model, [QuantizeCachePass(scales)])
    plain = run(model, tmp_path / "plain.onnx")
    run_passes(model, [PackQkvPass()])
    assert all(map(is_packed, attention_nodes(model)))
    assert_same(run(model, tmp_path / "packed.onnx"), plain, 0)
    again = fused(TinyLlama(), LOW_BIT)
    run_passes(again, [PackQkvPass(), QuantizeCachePass(scales)])
    assert_same(run(again, tmp_path / "again.onnx"), plain, 0)


@pytest.mark.parametrize("low_bit", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_an_exported_decoder_computes_the_same(family: str, low_bit: bool, tmp_path: Path) -> None:
    model = exported(family, LOW_BIT if low_bit else "")
    plain = run(model, tmp_path / "plain.onnx")
    assert not any(map(is_packed, attention_nodes(model)))
    assert run_passes(model, [PackQkvPass()]).modified
    assert all(map(is_packed, attention_nodes(model)))
    # norms of query and key read their part of the product
    has_norms = family in {"qwen3", "gemma3"}
    splits = [node for node in model.graph if node.op_type == "Split"]
    assert len(splits) == (len(attention_nodes(model)) if has_norms else 0)
    assert_same(run(model, tmp_path / "packed.onnx"), plain, 0 if low_bit else 64)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_second_run_changes_nothing(family: str) -> None:
    model = exported(family)
    assert run_passes(model, [PackQkvPass()]).modified
    text = ir.to_onnx_text(model)
    assert not run_passes(model, [PackQkvPass()]).modified
    assert ir.to_onnx_text(model) == text


def test_what_others_read_as_well_keeps_its_name(tmp_path: Path) -> None:
    model = fused(TinyLlama())
    keys = [str(node.inputs[1].name) for node in attention_nodes(model) if node.inputs[1]]
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in keys)
    plain = run(model, tmp_path / "plain.onnx")
    assert run_passes(model, [PackQkvPass()]).modified
    assert keys == [value.name for value in model.graph.outputs][-len(keys) :]
    assert_same(run(model, tmp_path / "packed.onnx"), plain, 64)


@pytest.mark.parametrize("what", ["shared weight", "another input", "bias of one", "small bias"])
def test_what_does_not_fit_stays(what: str) -> None:
    model = fused(TinyLlama(layers=1))
    (attention,) = attention_nodes(model)
    values = [value for value in attention.inputs[:3] if value is not None]
    products = [node for node in (value.producer() for value in values) if node is not None]
    if what == "shared weight":
        products[1].replace_input_with(1, products[2].inputs[1])
    elif what == "another input":
        products[1].replace_input_with(0, model.graph.node(0).outputs[0])
    else:
        sizes = [1, 1, 1] if what == "small bias" else [64]
        for product, size in zip(products, sizes, strict=False):
            _add_bias(model.graph, product, size)
    assert not run_passes(model, [PackQkvPass()]).modified


def _add_bias(graph: ir.Graph, product: ir.Node, size: int) -> None:
    tensor = ir.tensor(np.ones(size, np.float32), name=f"{product.name}_b")
    bias = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), const_value=tensor)
    bias.shape = ir.Shape([size])
    graph.register_initializer(bias)
    old = product.outputs[0]
    node = ir.node("Add", [old, bias])
    old.replace_all_uses_with(node.outputs[0])
    node.replace_input_with(0, old)
    graph.insert_after(product, node)
