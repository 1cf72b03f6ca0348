"""What is proved to be causal attention, and the reason where it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.analysis import AttentionSurvey, canonicalise, find_attention
from faq_onnx.graph.io import load_model
from faq_onnx.testing import TinyLlama, tiny_llama_onnx

EXPORTERS = Path(__file__).parents[2] / "fixtures" / "exporters"


def survey(name: str) -> AttentionSurvey:
    return find_attention(canonicalise(load_model(EXPORTERS / name / "model.onnx")), 128)


def node(model: ir.Model, name: str) -> ir.Node:
    return next(each for each in model.graph if each.name == name)


def numbers(model: ir.Model, value: float) -> ir.Value:
    made = ir.Value(name=f"number_{value}", const_value=ir.tensor(np.array(value, np.float32)))
    model.graph.register_initializer(made)
    return made


def soft_cap(model: ir.Model) -> None:
    scores = node(model, "/model/layers.0/self_attn/Mul_8").outputs[0]
    capped = ir.node("Tanh", [scores], name="cap")
    capped.outputs[0].name = "capped"
    add = node(model, "/model/layers.0/self_attn/Add_2")
    model.graph.insert_before(add, capped)
    add.replace_input_with(0, capped.outputs[0])


def no_future_hidden(model: ir.Model) -> None:
    add = node(model, "/model/layers.0/self_attn/Add_2")
    add.replace_input_with(1, numbers(model, 0.0))


def keys_turned_by_sine_only(model: ir.Model) -> None:
    turned = node(model, "/model/layers.0/self_attn/k/Mul")
    sine = node(model, "/model/layers.0/self_attn/k/Mul_1").inputs[1]
    turned.replace_input_with(1, sine)


def heads_repeated_in_another_order(model: ir.Model) -> None:
    """[a, b] -> [a, b, a, b] in place of [a, a, b, b]."""
    unsqueeze = node(model, "/model/layers.0/self_attn/repeat_v/Unsqueeze")
    axes = ir.Value(name="other_axis", const_value=ir.tensor(np.array([1], np.int64)))
    model.graph.register_initializer(axes)
    unsqueeze.replace_input_with(1, axes)
    times = ir.Value(name="other_times", const_value=ir.tensor(np.array([1, 2, 1, 1, 1])))
    model.graph.register_initializer(times)
    expand = node(model, "/model/layers.0/self_attn/repeat_v/Expand")
    expand.replace_input_with(1, times)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (soft_cap, "Tanh 'cap'"),
        (no_future_hidden, "mask 'number_0.0' has shape"),
        (keys_turned_by_sine_only, "rotated differently"),
        (heads_repeated_in_another_order, "differs by"),
    ],
)
def test_other_attention_stays_and_the_reason_is_said(
    change: Callable[[ir.Model], None], reason: str
) -> None:
    model = tiny_llama_onnx()
    change(model)
    found = find_attention(model, 64)
    assert [block.name for block in found.blocks] == [
        "/model/layers.1/self_attn/GroupQueryAttention"
    ]
    assert len(found.declined) == 1
    assert reason in found.declined[0].reason


def test_a_sliding_window_is_measured() -> None:
    assert [b.window for b in survey("optimum-gemma3-untied-fp32").blocks] == [8, None]
    assert [b.window for b in survey("dynamo20-gemma3-untied-fp32").blocks] == [8, None]


def test_the_tables_of_two_bases_differ() -> None:
    first, second = survey("optimum-gemma3-untied-fp32").blocks
    assert first.rotary is not None
    assert second.rotary is not None
    angles = np.arange(128)[:, np.newaxis] / 10_000 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(first.rotary.cos.astype(float), np.cos(angles), atol=1e-5)
    assert not np.array_equal(first.rotary.cos, second.rotary.cos)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dynamo23-llama-tied-fp32", "Attention is fused in its own way"),
        ("mobius-qwen3-untied-fp32", "Attention is fused in its own way"),
        ("dynamo20-qwen2-untied-gemm-fp32", "has shape (1, 64)"),
    ],
)
def test_what_is_not_decomposed_is_declined(name: str, reason: str) -> None:
    found = survey(name)
    assert not found.blocks
    assert len(found.declined) == found.layers == 2
    assert all(reason in each.reason for each in found.declined)


def test_fused_attention_is_counted() -> None:
    found = survey("genai-qwen3-untied-fp32")
    assert (found.fused, found.layers, found.blocks) == (2, 2, ())


def test_heads_that_the_kernel_does_not_take_are_declined() -> None:
    found = find_attention(tiny_llama_onnx(TinyLlama(hidden=48)), 64)
    assert "multiple of 8, these have 12" in found.declined[0].reason


def test_partial_rotation_is_measured() -> None:
    block = find_attention(tiny_llama_onnx(TinyLlama(hidden=128, rotated=16)), 64).blocks[0]
    assert block.rotary is not None
    assert (block.head_dim, block.rotary.pairs, block.rotates_inside) == (32, 8, True)


def test_a_cache_that_changes_its_type_is_declined() -> None:
    found = survey("optimum-gemma3-untied-fp16")
    assert not found.blocks
    reasons = {each.reason for each in found.declined}
    assert all("comes out as FLOAT (present.1.key); export in float32" in one for one in reasons)


def test_types_of_rows_output_and_cache_are_told_apart() -> None:
    block = survey("optimum-qwen2-untied-fp16").blocks[0]
    assert block.dtype == block.query.dtype == ir.DataType.FLOAT16
    assert block.output_dtype == ir.DataType.FLOAT
