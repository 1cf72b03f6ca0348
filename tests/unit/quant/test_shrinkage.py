"""The strength that a text's length asks for, and what it does to moments."""

from __future__ import annotations

import numpy as np
import pytest

from faq_onnx.quant.gptq import GramFactor
from faq_onnx.quant.shrinkage import LEAST, PRIOR_TOKENS, shrinkage_of
from faq_onnx.quant.site import SiteMoments

SIZE = 96


@pytest.mark.parametrize("channels", [1, 64, 4096])
def test_by_tokens_per_channel(channels: int) -> None:
    found = [shrinkage_of(ratio * channels, channels) for ratio in (0, 1, 5, 20, 45, 1000)]
    expected = [1.0, 5 / 6, 0.5, 0.2, LEAST, LEAST]
    assert found == pytest.approx(expected)
    assert shrinkage_of(PRIOR_TOKENS * channels, channels) == 0.5  # as much text as prior


def test_a_given_strength_holds_for_any_text() -> None:
    gram = np.eye(SIZE, dtype=np.float32)
    for strength in (0.0, 0.02, 1.0):
        assert SiteMoments.of_text(gram, 10, strength).shrinkage == strength
    assert SiteMoments.of_text(gram, 10).shrinkage == shrinkage_of(10, SIZE)


def test_one_token_can_be_factored() -> None:
    token = np.random.default_rng(0).normal(size=(1, SIZE)).astype(np.float32)
    moments = SiteMoments.of_text(token.T @ token, 1)
    assert moments.factor.damping == GramFactor.of(np.eye(SIZE, dtype=np.float32)).damping
