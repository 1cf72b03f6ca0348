"""Embeddings in low bits give the dequantized rows, from a table of their own or the head's."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.plan import EmbeddingPlan, SitePlan
from faq_onnx.artifacts.sites import Tie
from faq_onnx.artifacts.weights import QuantizedWeight
from faq_onnx.errors import RewriteError
from faq_onnx.graph.weights import read_initializer, read_weight, transform_initializer
from faq_onnx.passes import MatMulToNBitsPass, QuantizeEmbeddingPass, run_passes
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.uniform import dequantize_weight, quantize_rtn
from faq_onnx.testing import (
    TinyLlama,
    assert_models_close,
    tiny_feeds,
    tiny_llama_census,
    tiny_llama_onnx,
)

FORMAT = block_format(4, 32, symmetric=False)


def own_table(spec: TinyLlama, code_bits: int, block_size: int) -> QuantizeEmbeddingPass:
    census, model = tiny_llama_census(spec), tiny_llama_onnx(spec)
    site = census.embeddings[0]
    fmt = block_format(code_bits, block_size, symmetric=False)
    table = read_initializer(model, site.weight).astype(np.float32)
    weight = quantize_rtn(table, fmt, np.dtype(spec.dtype))
    plan = EmbeddingPlan(embedding=site.name, format=fmt)
    return QuantizeEmbeddingPass(census.embeddings, {site.name: plan}, {site.name: weight})


def shared_table(spec: TinyLlama) -> QuantizeEmbeddingPass:
    site = tiny_llama_census(spec).embeddings[0]
    plan = EmbeddingPlan(embedding=site.name, format=None, shared_with=site.tied_site)
    return QuantizeEmbeddingPass((site,), {site.name: plan}, {})


def head_to_nbits(spec: TinyLlama) -> tuple[MatMulToNBitsPass, QuantizedWeight]:
    model, site = tiny_llama_onnx(spec), tiny_llama_census(spec).sites[-1]
    weight = quantize_rtn(read_weight(model, site), FORMAT, np.dtype(spec.dtype))
    plan = SitePlan(site=site.name, format=FORMAT, accuracy_level=0)
    return MatMulToNBitsPass((site,), {site.name: plan}, {site.name: weight}), weight


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("code_bits", [2, 3, 4, 8])
def test_rows_are_the_dequantized_ones(code_bits: int, dtype: str) -> None:
    spec = TinyLlama(dtype=dtype)
    rewrite, model, expected = (
        own_table(spec, code_bits, 16),
        tiny_llama_onnx(spec),
        tiny_llama_onnx(spec),
    )
    site = rewrite.embeddings[0]
    rows = dequantize_weight(rewrite.weights[site.name])
    transform_initializer(expected, site.weight, lambda _: rows)
    assert run_passes(model, [rewrite]).modified
    assert site.weight not in model.graph.initializers
    # both read the same values: one multiplication, rounded once
    assert_models_close(model, expected, tiny_feeds(spec), atol=0)


@pytest.mark.parametrize("tie", [Tie.SHARED, Tie.DUPLICATE])
def test_a_shared_table_is_stored_once(tie: Tie) -> None:
    spec = TinyLlama(tie=tie)
    to_nbits, weight = head_to_nbits(spec)
    model, expected = tiny_llama_onnx(spec), tiny_llama_onnx(spec)
    run_passes(model, [to_nbits, shared_table(spec)])
    tables = [v.name for v in model.graph.initializers.values() if v.shape and v.shape[0] == 288]
    assert len(tables) == 3  # packed, scales, zero points
    rows = dequantize_weight(weight)
    transform_initializer(expected, "model.embed_tokens.weight", lambda _: rows)
    if tie is Tie.DUPLICATE:
        transform_initializer(expected, to_nbits.sites[0].weight, lambda _: rows.T)
    # 64 terms of the head, each off by eps, of logits below 16
    bound = 64 * float(np.finfo(np.float32).eps) * 16
    assert_models_close(model, expected, tiny_feeds(spec), atol=bound)


def test_a_second_run_changes_nothing() -> None:
    spec = TinyLlama(tie=Tie.SHARED)
    model, passes = tiny_llama_onnx(spec), [head_to_nbits(spec)[0], shared_table(spec)]
    run_passes(model, passes)
    before = ir.to_proto(model).SerializeToString()
    assert not run_passes(model, passes).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_sharing_needs_a_low_bit_head() -> None:
    spec = TinyLlama(tie=Tie.SHARED)
    with pytest.raises(RewriteError, match="run matmul-to-nbits before") as caught:
        run_passes(tiny_llama_onnx(spec), [shared_table(spec)])
    assert caught.value.__notes__ == ["in pass quantize-embedding"]


def test_a_ragged_width_is_refused() -> None:
    spec = TinyLlama(hidden=48)
    with pytest.raises(RewriteError, match="width 48 is not a multiple of block_size=32"):
        run_passes(tiny_llama_onnx(spec), [own_table(spec, 4, 32)])


def test_another_operator_is_refused() -> None:
    spec = TinyLlama()
    rewrite = own_table(spec, 4, 32)
    site = rewrite.embeddings[0].model_copy(update={"output": "logits"})
    broken = QuantizeEmbeddingPass((site,), rewrite.plans, rewrite.weights)
    with pytest.raises(RewriteError, match="only a Gather on axis 0"):
        run_passes(tiny_llama_onnx(spec), [broken])
