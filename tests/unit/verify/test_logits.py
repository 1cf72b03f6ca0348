"""KL, top-1 and perplexity against plain float64 formulas."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.errors import NonFiniteError, VerificationError
from faq_onnx.quant import divergence
from faq_onnx.verify.logits import LogitComparison

Logits = npt.NDArray[np.float32]


def _pair(
    batch: int = 2, length: int = 9, vocabulary: int = 50, noise: float = 0.3
) -> tuple[npt.NDArray[np.int64], Logits, Logits]:
    rng = np.random.default_rng(0)
    reference = (rng.standard_normal((batch, length, vocabulary)) * 4).astype(np.float32)
    change = rng.standard_normal(reference.shape).astype(np.float32) * np.float32(noise)
    return rng.integers(0, vocabulary, (batch, length)), reference, reference + change


def _log_softmax(values: Logits) -> npt.NDArray[np.float64]:
    exact = values.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    return exact


def test_all_numbers_follow_their_definitions() -> None:
    ids, reference, quantized = _pair()
    comparison = LogitComparison()
    comparison.add(reference, quantized, ids)
    found = comparison.metrics()
    p, q = _log_softmax(reference), _log_softmax(quantized)
    following = ids[:, 1:, np.newaxis]
    # float32 exponentials of shifted logits: relative errors of a few 1e-7
    assert found.tokens == 18
    assert math.isclose(
        found.kl_nats, float((np.exp(p) * (p - q)).sum(axis=-1).mean()), rel_tol=1e-5
    )
    assert found.top1_agreement == float((p.argmax(-1) == q.argmax(-1)).mean())
    for mine, theirs in ((found.perplexity_float, p), (found.perplexity, q)):
        loss = -np.take_along_axis(theirs[:, :-1], following, axis=2).mean()
        assert math.isclose(mine, math.exp(loss), rel_tol=1e-5)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, reference, quantized = _pair()
    whole, pieces = LogitComparison(), LogitComparison()
    whole.add(reference, quantized, ids)
    monkeypatch.setattr(divergence, "PIECE_ELEMENTS", 4 * 50)
    for row in range(2):
        pieces.add(reference[row : row + 1], quantized[row : row + 1], ids[row : row + 1])
    first, second = whole.metrics(), pieces.metrics()
    assert first.tokens == second.tokens
    assert first.top1_agreement == second.top1_agreement
    assert math.isclose(first.kl_nats, second.kl_nats, rel_tol=1e-12)
    assert math.isclose(first.perplexity, second.perplexity, rel_tol=1e-12)


def test_equal_models_are_at_zero() -> None:
    ids, reference, _ = _pair()
    comparison = LogitComparison()
    comparison.add(reference, reference.copy(), ids)
    found = comparison.metrics()
    assert (found.kl_nats, found.top1_agreement) == (0, 1)
    assert found.perplexity == found.perplexity_float


def test_a_shift_of_all_logits_changes_nothing() -> None:
    ids, reference, _ = _pair()
    comparison = LogitComparison()
    comparison.add(reference, reference + np.float32(1000), ids)
    # adding 1000 rounds logits to 2^-14: KL is quadratic in that
    assert comparison.metrics().kl_nats < 2.0**-20


def test_small_divergences_are_resolved() -> None:
    ids, reference, quantized = _pair(vocabulary=2000, noise=1e-2)
    comparison = LogitComparison()
    comparison.add(reference, quantized, ids)
    p, q = _log_softmax(reference), _log_softmax(quantized)
    exact = float((np.exp(p) * (p - q)).sum(axis=-1).mean())
    assert exact < 1e-4
    # exp in float32 is off by an ulp, 2^-23, in the sums of either model
    assert abs(comparison.metrics().kl_nats - exact) <= 2 * 2.0**-23


def test_the_inputs_are_left_alone() -> None:
    ids, reference, quantized = _pair()
    before = reference.copy(), quantized.copy()
    LogitComparison().add(reference, quantized, ids)
    assert np.array_equal(reference, before[0])
    assert np.array_equal(quantized, before[1])


def test_float16_logits_are_accepted() -> None:
    ids, reference, quantized = _pair()
    comparison = LogitComparison()
    comparison.add(reference.astype(np.float16), quantized.astype(np.float16), ids)
    assert 0 < comparison.metrics().kl_nats < 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("whose", ["source", "quantized"])
def test_logits_that_are_not_finite_name_their_model(bad: float, whose: str) -> None:
    ids, reference, quantized = _pair()
    (reference if whose == "source" else quantized)[1, 3, 7] = bad
    with pytest.raises(NonFiniteError, match=f"the {whose} model"):
        LogitComparison().add(reference, quantized, ids)


def test_shapes_must_fit() -> None:
    ids, reference, quantized = _pair()
    with pytest.raises(VerificationError, match=r"do not belong to the same model"):
        LogitComparison().add(reference, quantized[..., :-1], ids)
    with pytest.raises(VerificationError, match=r"tokens \[2, 8\]"):
        LogitComparison().add(reference, quantized, ids[:, :-1])


def test_nothing_to_predict_is_an_error() -> None:
    ids, reference, quantized = _pair(length=1)
    comparison = LogitComparison()
    comparison.add(reference, quantized, ids)
    with pytest.raises(VerificationError, match="2 tokens or more"):
        comparison.metrics()
