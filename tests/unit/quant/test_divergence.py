"""KL divergence: what it says of logits that are not finite, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.errors import NonFiniteError
from faq_onnx.quant import divergence
from faq_onnx.quant.divergence import ShiftedLogits, pieces


def _shifted(logits: npt.NDArray[np.floating]) -> ShiftedLogits:
    return ShiftedLogits.of(logits, whose="logits of q_proj", way_out="give up")


def _logits() -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((6, 11)).astype(np.float32)


def test_logits_are_shifted_by_their_largest() -> None:
    logits = _logits()
    before = logits.copy()
    found = _shifted(logits)
    assert np.array_equal(logits, before)
    assert found.best.tolist() == logits.argmax(axis=1).tolist()
    assert (found.values.max(axis=1) == 0).all()
    np.testing.assert_allclose(found.log_sums, np.log(np.exp(found.values).sum(axis=1)), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_named(bad: float) -> None:
    logits = _logits()
    logits[1, 2] = logits[4, 0] = bad
    wanted = "logits of q_proj are not finite at 2 of 6 positions; give up"
    with pytest.raises(NonFiniteError, match=wanted):
        _shifted(logits)


def test_a_token_that_cannot_come_is_no_error() -> None:
    logits = _logits()
    logits[1, 2] = -np.inf
    assert _shifted(logits).exponentials[1, 2] == 0


def test_the_reference_serves_again() -> None:
    reference = _shifted(_logits())
    first = reference.kl(_shifted(_logits()[::-1]))
    assert np.array_equal(reference.kl(_shifted(_logits()[::-1])), first)


def test_pieces_cover_every_position_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "PIECE_ELEMENTS", 25)
    found = list(pieces(6, 11))
    assert [len(np.arange(6)[piece]) for piece in found] == [2, 2, 2]
    assert len(list(pieces(3, 100))) == 3  # one row at least
    reference, other = _shifted(_logits()), _logits()[::-1]
    whole = reference.kl(_shifted(other))
    parts = [reference.rows(piece).kl(_shifted(other[piece])) for piece in found]
    assert np.array_equal(np.concatenate(parts), whole)
