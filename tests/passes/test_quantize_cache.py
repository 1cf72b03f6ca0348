"""An int8 cache holds what the float one holds, to half a step of each channel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from faq_onnx.analysis import canonicalise, find_attention
from faq_onnx.artifacts.source import context_length
from faq_onnx.errors import RewriteError
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.passes import FuseAttentionPass, QuantizeCachePass, run_passes
from faq_onnx.runtime.feeds import cache_position, decoder_feeds
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.testing import TinyLlama, tiny_llama_onnx

Array = npt.NDArray[Any]
EXPORTERS = Path(__file__).parents[1] / "fixtures" / "exporters"
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
IDS = np.random.default_rng(0).integers(3, 60, (1, 12))


def fused(family: str) -> ir.Model:
    folder = EXPORTERS / f"optimum-{family}-untied-fp32"
    model = canonicalise(load_model(folder / "model.onnx"))
    config = json.loads((folder / "config.json").read_text())
    run_passes(model, [FuseAttentionPass(find_attention(model, context_length(config)).blocks)])
    return model


def run(model: ir.Model, path: Path) -> dict[str, Array]:
    """Outputs for a prompt and for one token behind it, the cache handed on."""
    save_model(model, path)
    session = open_session(path)
    first = run_session(session, decoder_feeds(session.get_inputs(), IDS[:, :-1]))
    presents = {cache_position(name): array for name, array in first.items() if name != "logits"}
    pasts = {
        value.name: presents[cache_position(value.name)]
        for value in session.get_inputs()
        if cache_position(value.name) is not None
    }
    return run_session(session, decoder_feeds(session.get_inputs(), IDS[:, -1:], pasts))


def scales_of(outputs: dict[str, Array]) -> dict[str, npt.NDArray[np.float32]]:
    return {
        name: (np.abs(array).max(axis=(0, 2)).reshape(-1) / 127 + 1e-6).astype(np.float32)
        for name, array in outputs.items()
        if name != "logits"
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_the_same_to_half_a_step(family: str, tmp_path: Path) -> None:
    model = fused(family)
    expected = run(model, tmp_path / "float.onnx")
    scales = scales_of(expected)
    assert run_passes(model, [QuantizeCachePass(scales)]).modified
    found = run(model, tmp_path / "int8.onnx")
    first = [name for name in scales if cache_position(name).layer_index == 0]  # type: ignore[union-attr]
    for name, scale in scales.items():
        assert found[name].dtype == np.int8
        assert found[name].shape == expected[name].shape
        heads, width = found[name].shape[1], found[name].shape[3]
        steps = scale.reshape(1, heads, 1, width)
        lost = np.abs(found[name] * steps - expected[name])
        if name in first:  # later layers read what the first made of its rounded cache
            assert (lost <= 0.5 * steps * (1 + 1e-3)).all(), name
    size = np.abs(expected["logits"]).max()
    assert 0 < np.abs(found["logits"] - expected["logits"]).max() < 0.05 * size


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    model = fused("llama")
    rewrite = QuantizeCachePass(scales_of(run(model, tmp_path / "float.onnx")))
    assert run_passes(model, [rewrite]).modified
    assert not run_passes(model, [rewrite]).modified


def test_a_cache_without_scales_is_refused() -> None:
    with pytest.raises(RewriteError, match=r"no scales were made for 'present\.0\.key'"):
        run_passes(fused("llama"), [QuantizeCachePass({})])


def test_a_cache_of_another_type_is_refused(tmp_path: Path) -> None:
    model = fused("llama")
    rewrite = QuantizeCachePass(scales_of(run(model, tmp_path / "float.onnx")))
    for value in (*model.graph.inputs, *model.graph.outputs):
        if cache_position(value.name or "") is not None:
            value.dtype = ir.DataType.BFLOAT16
    with pytest.raises(RewriteError, match="CPU kernel quantizes caches of float32 and float16"):
        run_passes(model, [rewrite])


def test_a_float16_cache_becomes_int8(tmp_path: Path) -> None:
    model = tiny_llama_onnx(TinyLlama(dtype="float16"))
    run_passes(model, [FuseAttentionPass(find_attention(model, 64).blocks)])
    expected = run(model, tmp_path / "float.onnx")
    assert expected["present.0.key"].dtype == np.float16
    run_passes(model, [QuantizeCachePass(scales_of(expected))])
    found = run(model, tmp_path / "int8.onnx")
    assert found["present.0.key"].dtype == np.int8
    size = np.abs(expected["logits"]).max()
    assert np.abs(found["logits"] - expected["logits"]).max() < 0.05 * size
