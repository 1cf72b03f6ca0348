"""Laws of the KL divergence over logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faq_onnx.quant.divergence import ShiftedLogits

pytestmark = pytest.mark.property
EPS = 2.0**-23

DRAWS = st.tuples(
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),  # positions
    st.integers(1, 300),  # vocabulary
    st.sampled_from([0.1, 3.0, 30.0]),  # spread of the logits
    st.sampled_from([0.0, 1e-4, 0.1, 10.0]),  # spread of the difference
)
Floats = npt.NDArray[np.float32]
Draw = tuple[int, int, int, float, float]


def _pair(draw: Draw) -> tuple[Floats, Floats]:
    seed, positions, vocabulary, spread, difference = draw
    rng = np.random.default_rng(seed)
    reference = spread * rng.standard_normal((positions, vocabulary))
    other = reference + difference * rng.standard_normal(reference.shape)
    return reference.astype(np.float32), other.astype(np.float32)


def _kl(reference: Floats, other: Floats) -> list[float]:
    shifted = [ShiftedLogits.of(x, whose="logits", way_out="") for x in (reference, other)]
    return [float(kl) for kl in shifted[0].kl(shifted[1])]


def _direct(reference: Floats, other: Floats) -> list[float]:
    """Sum of p (log p - log q), all in float64."""
    log_p, log_q = (
        x - np.log(np.exp(x).sum(axis=1, keepdims=True))
        for x in (logits.astype(np.float64) for logits in (reference, other))
    )
    return [float(kl) for kl in (np.exp(log_p) * (log_p - log_q)).sum(axis=1)]


def _tolerance(reference: Floats, other: Floats) -> float:
    """Of float32: each shifted logit is off by half an ulp of the widest range.

    That moves a difference by two of them, log Z by one each (and by exp's own ulp), and the
    product with p by an ulp of the difference: fewer than 8 ulp of the widest range together.
    """
    widest = max(float(np.ptp(logits, axis=1).max()) for logits in (reference, other))
    return 8 * EPS * max(widest, 1.0)


@settings(deadline=None)
@given(DRAWS)
def test_it_is_the_definition_and_never_negative(draw: Draw) -> None:
    reference, other = _pair(draw)
    found = _kl(reference, other)
    tolerance = _tolerance(reference, other)
    assert found == pytest.approx(_direct(reference, other), rel=0, abs=tolerance)
    assert min(found) >= -tolerance


@settings(deadline=None)
@given(DRAWS)
def test_equal_logits_are_at_exactly_zero(draw: Draw) -> None:
    reference, _ = _pair(draw)
    assert set(_kl(reference, reference.copy())) == {0.0}


@settings(deadline=None)
@given(DRAWS, st.integers(-8, 8))
def test_a_constant_on_a_row_changes_nothing(draw: Draw, shift: int) -> None:
    # whole quarters: adding such a shift is exact
    reference, other = (np.rint(4 * x) * np.float32(0.25) for x in _pair(draw))
    assert _kl(reference, other + np.float32(shift)) == _kl(reference, other)
