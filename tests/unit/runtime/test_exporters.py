"""Decoders as four exporters write them: they are fed right, and their caches continue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.generate import generate_greedy
from faq_onnx.runtime.session import open_session, run_session

FOLDER = Path(__file__).parents[2] / "fixtures" / "exporters"
MODELS = sorted(path.parent.name for path in FOLDER.glob("*/model.onnx"))
PROMPT = np.array([1, 5, 7])


def _recompute(session: ort.InferenceSession, steps: int) -> Iterator[int]:
    ids = PROMPT[np.newaxis]
    for _ in range(steps):
        logits = run_session(session, decoder_feeds(session.get_inputs(), ids), ["logits"])
        token = int(logits["logits"][0, -1].argmax())
        yield token
        ids = np.hstack([ids, [[token]]])


def test_the_fixtures_are_there() -> None:
    assert {name.split("-")[0] for name in MODELS} >= {"optimum", "dynamo20", "genai", "mobius"}


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_continues_the_text(name: str) -> None:
    session = open_session(FOLDER / name / "model.onnx", threads=1)
    assert list(generate_greedy(session, PROMPT, 5)) == list(_recompute(session, 5))


def test_the_same_weights_write_the_same_text_whoever_exported_them() -> None:
    texts = {
        name: tuple(generate_greedy(open_session(FOLDER / name / "model.onnx"), PROMPT, 5))
        for name in MODELS
        if "llama-untied-fp32" in name
    }
    assert len(texts) >= 4
    assert len(set(texts.values())) == 1, texts


def test_a_cache_width_that_is_only_a_name_is_found_in_the_attention_node() -> None:
    path = FOLDER / "genai-llama-untied-fp32" / "model.onnx"
    caches = [x for x in open_session(path).get_inputs() if x.name.startswith("past")]
    assert caches
    assert all(cache.shape[1:2] + cache.shape[3:] == [2, 16] for cache in caches)
