"""A reference is what a plain loop generates, and tells models apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from faq_onnx.artifacts.target import Reference
from faq_onnx.runtime.generate import generate_greedy
from faq_onnx.runtime.reference import (
    TOP_LOGITS,
    logit_distance,
    take_reference,
    token_agreement,
)
from faq_onnx.runtime.session import open_session
from faq_onnx.testing import TinyLlama, write_tiny_llama

PROMPT = [5, 6, 7, 8]


def _reference(folder: Path, seed: int = 0) -> Reference:
    session = open_session(write_tiny_llama(folder, TinyLlama(seed=seed)))
    return take_reference(session, PROMPT, 12)


def test_it_is_the_greedy_loop(tmp_path: Path) -> None:
    reference = _reference(tmp_path)
    session = open_session(tmp_path / "model.onnx")
    assert list(reference.tokens) == list(generate_greedy(session, np.array(PROMPT), 12))
    assert len(reference.logits) == TOP_LOGITS
    assert reference.logits[0][0] == reference.tokens[0]
    values = [value for _, value in reference.logits]
    assert values == sorted(values, reverse=True)
    assert not reference.problem


def test_distance(tmp_path: Path) -> None:
    reference, other = _reference(tmp_path / "a"), _reference(tmp_path / "b", seed=1)
    assert logit_distance(reference, reference) == 0
    assert logit_distance(reference, other) > 0.1
    best, value = reference.logits[0]
    moved = ((best, value * 1.01), *reference.logits[1:])
    near = reference.model_copy(update={"logits": moved})
    largest = max(abs(value) for _, value in reference.logits)
    assert logit_distance(reference, near) == pytest.approx(0.01 * abs(value) / largest)


def test_what_cannot_be_fed_says_why(tmp_path: Path) -> None:
    session = open_session(write_tiny_llama(tmp_path))
    reference = take_reference(session, [10**6], 3)  # no such token
    assert reference.tokens == ()
    assert "could not run" in reference.problem
    assert logit_distance(reference, reference) == float("inf")


def test_tokens_agree_up_to_a_tie() -> None:
    margins = (0.5, 0.01, 0.5)
    reference = Reference(prompt=(1,), tokens=(7, 8, 9), margins=margins)
    assert token_agreement(reference, [7, 8, 9], 0).passed
    assert token_agreement(reference, [7, 8], 0).text == "2 of 2 equal onnxruntime's"
    assert not token_agreement(reference, [7, 5, 9], 1e-3).passed
    tie = token_agreement(reference, [7, 5, 4], 1e-2)
    assert tie.passed
    assert tie.text == "1 of 3 equal onnxruntime's, then a tie (0.01 of the logits' size)"
    assert not token_agreement(reference, [5, 8, 9], 1e-2).passed
    assert not token_agreement(reference, [], 1).passed
