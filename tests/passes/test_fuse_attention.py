"""Fused attention gives the numbers of the decomposed one, on every exporter's decoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest

from faq_onnx.analysis import canonicalise, find_attention
from faq_onnx.artifacts.source import context_length
from faq_onnx.errors import RewriteError, UnsupportedModelError
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.opt import optimize
from faq_onnx.passes import FuseAttentionPass, run_passes
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.generate import generate_greedy
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.testing import TinyLlama, tiny_llama_config, tiny_llama_onnx

Array = npt.NDArray[Any]
Outputs = dict[str, Array]

EXPORTERS = Path(__file__).parents[1] / "fixtures" / "exporters"
FUSED = (
    *("optimum-llama-tied-fp32", "optimum-llama-untied-fp32", "optimum-qwen2-untied-fp32"),
    *("optimum-qwen3-untied-fp32", "optimum-gemma3-untied-fp32"),
    "../sliced/optimum-phi3-untied-fp32",  # one qkv_proj, rotated channels joined with no others
    "optimum-qwen2-untied-fp16",  # softmax and o_proj in float32
    *("dynamo20-llama-untied-fp32", "dynamo20-qwen2-untied-fp32", "dynamo20-gemma3-untied-fp32"),
)
# Both graphs sum the same products in another order: a few epsilon per sum, two layers of
# perhaps ten sums each, carried through norms of about one. The largest seen is 1.5e-6.
TOLERANCE = {"float32": 64 * 2.0**-23, "float16": 4 * 2.0**-10}


def sessions(
    model: ir.Model, folder: Path, positions: int
) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    """The model as it is and fused."""
    save_model(model, folder / "plain.onnx")
    survey = find_attention(model, positions)
    assert not survey.declined
    assert run_passes(model, [FuseAttentionPass(survey.blocks)]).modified
    save_model(model, folder / "fused.onnx")
    return open_session(folder / "plain.onnx"), open_session(folder / "fused.onnx")


def exported(name: str, folder: Path) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    model = canonicalise(load_model(EXPORTERS / name / "model.onnx"))
    config = json.loads((EXPORTERS / name / "config.json").read_text())
    return sessions(model, folder, context_length(config))


def run(
    session: ort.InferenceSession,
    ids: Array,
    past: Outputs | None = None,
    mask: Array | None = None,
) -> Outputs:
    cache = {
        name.replace("present", "past_key_values"): array
        for name, array in (past or {}).items()
        if name != "logits"
    }
    feeds = decoder_feeds(session.get_inputs(), ids, cache or None)
    if mask is not None:
        feeds["attention_mask"] = mask
        if "position_ids" in feeds:
            feeds["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
    return run_session(session, feeds)


def assert_close(fused: Array, plain: Array) -> None:
    tolerance = TOLERANCE[str(plain.dtype)] * float(np.abs(plain).max())
    np.testing.assert_allclose(
        fused.astype(np.float64), plain.astype(np.float64), rtol=0, atol=tolerance
    )


def tokens(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(3, 160, shape)


def assert_same_decoder(
    plain: ort.InferenceSession, fused: ort.InferenceSession, rng: np.random.Generator
) -> None:
    """Logits and cache: a prompt of two texts, single tokens, several tokens behind a cache."""
    old: Outputs | None = None
    new: Outputs | None = None
    for shape in ((2, 20), (2, 1), (2, 1)):
        ids = tokens(rng, *shape)
        old, new = run(plain, ids, old), run(fused, ids, new)
        assert old.keys() == new.keys()
        for name, array in old.items():
            assert_close(new[name], array)
    assert old is not None
    assert new is not None
    ids = tokens(rng, 1, 4)
    first = [{name: array[:1] for name, array in each.items()} for each in (old, new)]
    assert_close(run(fused, ids, first[1])["logits"], run(plain, ids, first[0])["logits"])


@pytest.mark.parametrize("name", FUSED)
def test_an_exported_decoder_computes_the_same(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    plain, fused = exported(name, tmp_path)
    assert_same_decoder(plain, fused, rng)
    prompt = tokens(rng, 7)
    assert [*generate_greedy(fused, prompt, 12)] == [*generate_greedy(plain, prompt, 12)]


@pytest.mark.parametrize(
    "spec", [TinyLlama(), TinyLlama(dtype="float16"), TinyLlama(qkv_bias=True)], ids=str
)
def test_a_tiny_decoder_computes_the_same(
    spec: TinyLlama, tmp_path: Path, rng: np.random.Generator
) -> None:
    assert_same_decoder(*sessions(tiny_llama_onnx(spec), tmp_path, 64), rng)


WIDTHS = {  # channels of a head, rotated ones, and whether the kernel rotates them itself
    "8": (TinyLlama(hidden=32), False),
    "24": (TinyLlama(hidden=96), False),
    "24 in float16": (TinyLlama(hidden=96, dtype="float16"), False),
    "16 of 32": (TinyLlama(hidden=128, rotated=16), True),
    "8 of 32": (TinyLlama(hidden=128, rotated=8), False),
    "10 of 24": (TinyLlama(hidden=96, rotated=10), False),
}


@pytest.mark.parametrize("width", WIDTHS)
def test_heads_of_any_width_and_partial_rotation(
    width: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    spec, inside = WIDTHS[width]
    plain, fused = sessions(tiny_llama_onnx(spec), tmp_path, 64)
    assert_same_decoder(plain, fused, rng)
    ids, mask = tokens(rng, 2, 6), np.ones((2, 6), np.int64)
    mask[1, 4:] = 0  # positions behind padding count text alone
    old, new = run(plain, ids, mask=mask), run(fused, ids, mask=mask)
    ids, mask = tokens(rng, 2, 1), np.hstack([mask, np.ones((2, 1), np.int64)])
    assert_close(run(fused, ids, new, mask)["logits"], run(plain, ids, old, mask)["logits"])
    kinds = [node.op_type for node in load_model(tmp_path / "fused.onnx").graph]
    assert kinds.count("RotaryEmbedding") == (0 if inside else 2 * spec.layers)


def test_text_beyond_the_tables_is_refused_where_rotation_stands_outside(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    _, fused = sessions(tiny_llama_onnx(TinyLlama(hidden=96)), tmp_path, 16)
    run(fused, tokens(rng, 1, 16))
    with pytest.raises(UnsupportedModelError, match="RotaryEmbedding"):
        run(fused, tokens(rng, 1, 17))


def with_a_float32_cache(model: ir.Model) -> ir.Model:
    """As converters write it that keep types of inputs and outputs: casts stand at the end."""
    for value in list(model.graph.inputs):
        if value.dtype == ir.DataType.FLOAT16:
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16}, name=f"{value.name}_cast")
            cast.outputs[0].name = f"{value.name}_float16"
            value.replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, value)
            value.dtype = ir.DataType.FLOAT
            model.graph.append(cast)
    for index, value in enumerate(list(model.graph.outputs)):
        name, shape = value.name, value.shape
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}_cast")
        value.name = f"{name}_float16"
        wide = cast.outputs[0]
        wide.name, wide.shape, wide.dtype = name, shape, ir.DataType.FLOAT
        model.graph.append(cast)
        model.graph.outputs[index] = wide
    return model


def test_a_float16_decoder_with_a_float32_cache(tmp_path: Path, rng: np.random.Generator) -> None:
    model = with_a_float32_cache(tiny_llama_onnx(TinyLlama(dtype="float16")))
    ir.save(model, tmp_path / "unsorted.onnx")
    plain, fused = sessions(load_model(tmp_path / "unsorted.onnx"), tmp_path, 64)
    ids = tokens(rng, 2, 12)
    old, new = run(plain, ids), run(fused, ids)
    assert old["present.0.key"].dtype == new["present.0.key"].dtype == np.float32
    size = float(np.abs(old["logits"]).max())
    np.testing.assert_allclose(new["logits"], old["logits"], atol=TOLERANCE["float16"] * size)
    prompt = tokens(rng, 7)
    assert [*generate_greedy(fused, prompt, 12)] == [*generate_greedy(plain, prompt, 12)]


@pytest.mark.parametrize("name", ["optimum-qwen3-untied-fp32", "optimum-gemma3-untied-fp32"])
def test_a_low_bit_decoder_computes_the_same(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    # accuracy_level 0: with int8 activations a difference of one epsilon may move a rounding
    model = load_model(EXPORTERS / name / "model.onnx")
    optimize(model, "matmul-to-nbits{accuracy_level=0},quantize-embedding")
    assert_same_decoder(*sessions(model, tmp_path, 128), rng)


@pytest.mark.parametrize("name", FUSED)
def test_rows_may_be_padded_behind_their_text(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    plain, fused = exported(name, tmp_path)
    ids, mask = tokens(rng, 2, 6), np.ones((2, 6), np.int64)
    mask[1, 4:] = 0
    old, new = run(plain, ids, mask=mask), run(fused, ids, mask=mask)
    assert_close(new["logits"][0], old["logits"][0])
    assert_close(new["logits"][1, :4], old["logits"][1, :4])
    if "position_ids" not in {value.name for value in plain.get_inputs()}:
        return  # that graph counts padding as text, so its next position is another one
    ids, mask = tokens(rng, 2, 1), np.hstack([mask, np.ones((2, 1), np.int64)])
    assert_close(run(fused, ids, new, mask)["logits"], run(plain, ids, old, mask)["logits"])


def test_padding_in_front_fails_instead_of_being_attended_to(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    _, fused = exported("optimum-llama-untied-fp32", tmp_path)
    mask = np.ones((2, 6), np.int64)
    mask[1, :2] = 0
    with pytest.raises(UnsupportedModelError, match="seqlens_k"):
        run(fused, tokens(rng, 2, 6), mask=mask)


def test_names_stay_and_what_only_the_old_attention_needed_goes(tmp_path: Path) -> None:
    plain, fused = exported("optimum-llama-untied-fp32", tmp_path)
    before, after = ([v.name for v in each.get_inputs()] for each in (plain, fused))
    assert before == after
    assert [v.name for v in plain.get_outputs()] == [v.name for v in fused.get_outputs()]
    kinds = [node.op_type for node in load_model(tmp_path / "fused.onnx").graph]
    assert kinds.count("GroupQueryAttention") == 2
    assert not {"Softmax", "Where", "Expand", "Range", "Cos"} & set(kinds)
    tables = [n for n in load_model(tmp_path / "fused.onnx").graph.initializers if "cos" in n]
    assert tables == ["cos_cache"]


def test_a_second_run_changes_nothing() -> None:
    model = tiny_llama_onnx()
    each = FuseAttentionPass(find_attention(model, 64).blocks)
    assert run_passes(model, [each]).modified
    text = ir.to_onnx_text(model)
    assert not run_passes(model, [each]).modified
    assert ir.to_onnx_text(model) == text
    assert find_attention(model, 64).fused == 2


def test_blocks_of_another_model_are_refused_before_anything_is_edited() -> None:
    blocks = find_attention(tiny_llama_onnx(TinyLlama(layers=2)), 64).blocks
    model = tiny_llama_onnx(TinyLlama(layers=1))
    text = ir.to_onnx_text(model)
    with pytest.raises(RewriteError, match=r"layers\.1"):
        run_passes(model, [FuseAttentionPass(blocks)])
    assert ir.to_onnx_text(model) == text


def test_a_text_pipeline_takes_positions_from_the_config() -> None:
    model = tiny_llama_onnx()
    optimize(model, "fuse-attention", config=tiny_llama_config())
    tensor = model.graph.initializers["cos_cache"].const_value
    assert tensor is not None
    assert tuple(tensor.shape) == (512, 8)
