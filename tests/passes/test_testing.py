"""The tiny models are what they say, and the assertions can fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from faq_onnx.analysis import canonicalise, take_census
from faq_onnx.artifacts.sites import Tie
from faq_onnx.graph.weights import transform_initializer
from faq_onnx.runtime.session import open_session
from faq_onnx.testing import (
    TinyLlama,
    assert_golden,
    assert_models_close,
    tiny_feeds,
    tiny_llama_census,
    tiny_llama_config,
    tiny_llama_onnx,
    write_tiny_llama,
)

VARIANTS = [
    TinyLlama(),
    TinyLlama(layers=1, dtype="float16", tie=Tie.DUPLICATE),
    TinyLlama(layers=3, kv_heads=4, qkv_bias=True),
]


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_the_census_by_hand_is_the_census_by_machine(spec: TinyLlama) -> None:
    found = take_census(canonicalise(tiny_llama_onnx(spec)), tiny_llama_config(spec))
    expected = tiny_llama_census(spec)
    assert found.sites == expected.sites
    assert found.groups == expected.groups
    assert found.embeddings == expected.embeddings
    assert found.family == expected.family


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_the_cache_continues_what_a_prefill_computes(spec: TinyLlama) -> None:
    session = open_session(ir.to_proto(tiny_llama_onnx(spec)).SerializeToString())
    names = [value.name for value in session.get_outputs()]
    feeds = tiny_feeds(spec, length=8)
    whole = np.asarray(session.run(["logits"], feeds)[0])
    text = ("input_ids", "attention_mask", "position_ids")
    first = session.run(names, feeds | {name: feeds[name][:, :5] for name in text})
    cache = dict(zip([n.replace("present", "past_key_values") for n in names], first, strict=True))
    del cache["logits"]
    rest = {name: feeds[name][:, 5:] for name in ("input_ids", "position_ids")}
    logits = session.run(["logits"], rest | {"attention_mask": feeds["attention_mask"]} | cache)
    # the same products, summed in blocks of another shape: some roundings of logits below 16
    spacing = float(np.spacing(np.array(8, spec.dtype)))
    np.testing.assert_allclose(np.asarray(logits[0]), whole[:, 5:], rtol=0, atol=8 * spacing)


def test_a_folder_holds_what_it_should(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(path.with_name("tokenizer.json")))
    config = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
    text = "the man in Ütopia"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() <= config["vocab_size"]
    assert tokenizer.token_to_id("</s>") == config["eos_token_id"]
    assert_models_close(path, tiny_llama_onnx(), tiny_feeds(), atol=0)


def test_models_that_differ_are_not_close() -> None:
    model = tiny_llama_onnx()
    transform_initializer(model, "model.norm.weight", lambda gain: gain * np.float32(1.01))
    with pytest.raises(AssertionError, match=r"logits\[.*within atol=0\.001"):
        assert_models_close(model, tiny_llama_onnx(), tiny_feeds(), atol=1e-3)


def test_a_missing_output_is_named() -> None:
    model = tiny_llama_onnx()
    del model.graph.outputs[0]
    with pytest.raises(AssertionError, match="output 'logits' is missing"):
        assert_models_close(model, tiny_llama_onnx(), tiny_feeds(), atol=0)


def test_a_golden_file_needs_one_pipeline(tmp_path: Path) -> None:
    path = tmp_path / "case.onnxtxt"
    path.write_text("// nothing\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="needs one line"):
        assert_golden(path, lambda model, _: model)
