"""What holds of shifted targets whatever the activations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faq_onnx.quant.shift import Miss, damped_correction

pytestmark = pytest.mark.property
EPS = 2.0**-23


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 40),
    channels=st.integers(1, 12),
    noise=st.sampled_from([0.0, 0.01, 0.3, 3.0]),
    ridge=st.sampled_from([1e-3, 0.1, 1.0, 10.0]),
    strengths=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_a_shift_never_costs_output_error(  # noqa: PLR0913, PLR0917 - drawn values
    seed: int, tokens: int, channels: int, noise: float, ridge: float, strengths: list[float]
) -> None:
    """E|x_q V^T - y|^2 falls as the strength grows from 0 to 1.

    With D = M (G + rI)^-1 it is what it was minus 2 s tr(D M^T) - s^2 tr(D G D^T), and
    tr(D G D^T) <= tr(D M^T): the slope stays negative up to s = 1.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, channels)) * np.exp2(rng.normal(scale=2, size=channels))
    low = x + noise * rng.normal(size=x.shape)
    weight = rng.normal(size=(3, channels)).astype(np.float32)
    wanted = x @ weight.T
    gram = (low.T @ low / tokens).astype(np.float32)
    missing = ((wanted - low @ weight.T).T @ low / tokens).astype(np.float32)

    def cost(strength: float) -> float:
        target = weight + np.float32(strength) * damped_correction(Miss(gram, missing), ridge)
        return float(np.square(low @ target.T.astype(np.float64) - wanted).sum())

    nothing, less, more = cost(0.0), cost(strengths[0]), cost(strengths[1])
    # moments are rounded to float32, and the ridge bounds what that can do to their quotient;
    # so is the target, which moves outputs by their own size times eps
    size = float(np.square(low).sum() * np.square(weight).sum())
    slack = EPS * channels * (size + nothing) / min(ridge, 1.0)
    assert less <= nothing + slack
    assert more <= less + slack
