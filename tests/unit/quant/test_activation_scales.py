"""Steps of 16-bit activations, and how much of a token they take."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.quant.activation_scales import LARGEST_CODE, MARGIN, ActivationRange


def _range(tokens: npt.NDArray[np.float32]) -> ActivationRange:
    energies = np.square(tokens.astype(np.float64)).sum(axis=1)
    return ActivationRange(float(np.abs(tokens).max()), tokens.shape[1], energies)


def _tokens(outlier: float = 1) -> npt.NDArray[np.float32]:
    tokens = np.random.default_rng(0).standard_normal((200, 256)).astype(np.float32)
    tokens[0, 3] = 5 * outlier
    return tokens


def test_the_largest_value_and_the_margin_are_in_range() -> None:
    found = _range(_tokens(outlier=100))
    assert found.step * LARGEST_CODE == pytest.approx(500 * MARGIN)


@pytest.mark.parametrize("outlier", [1, 1000])
def test_noise_is_what_rounding_does_to_tokens(outlier: float) -> None:
    tokens = _tokens(outlier)
    found = _range(tokens)
    rounded = np.rint(tokens / found.step) * found.step
    lost = np.square(rounded - tokens).sum(axis=1) / np.square(tokens).sum(axis=1)
    assert found.noise == pytest.approx(np.sqrt(lost.mean()), rel=0.05)


def test_one_outlier_takes_the_range_of_all_tokens() -> None:
    assert _range(_tokens(outlier=1000)).noise > 500 * _range(_tokens()).noise


def test_joined_texts_are_one() -> None:
    tokens = _tokens()
    joined = _range(tokens[:50]).join(_range(tokens[50:]))
    whole = _range(tokens)
    assert joined.step == whole.step
    assert joined.noise == pytest.approx(whole.noise)


def test_nothing_but_zeros_has_a_step_and_no_noise() -> None:
    found = _range(np.zeros((3, 8), np.float32))
    assert found.step > 0
    assert found.noise == 0
