"""The formulas of AWQ's scale and FAQ's fused statistic, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from faq_onnx.config import FaqConfig
from faq_onnx.quant.channel_scale import (
    awq_scale,
    exponents,
    fuse_statistics,
    future_layers,
    share_over_heads,
)


def test_exponents_begin_with_the_identity_and_stop_below_one() -> None:
    assert exponents(4) == (0.0, 0.25, 0.5, 0.75)
    assert exponents(1) == (0.0,)
    assert len(exponents(20)) == 20
    assert exponents(20)[-1] == pytest.approx(0.95)


@pytest.mark.parametrize(
    "statistic", [[1e-9, 1.0, 1e9], [0.0, 1.0, 2.0], [0.0, 0.0], [3.0]], ids=str
)
def test_exponent_zero_gives_exactly_ones(statistic: list[float]) -> None:
    scale = awq_scale(np.array(statistic, np.float32), 0.0)
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(scale, np.ones(len(statistic), np.float32))


def test_scale_by_hand() -> None:
    # sqrt of 1, 4, 16 is 1, 2, 4; the geometric middle of 1 and 4 is 2
    scale = awq_scale(np.array([1, 4, 16], np.float32), 0.5)
    np.testing.assert_array_equal(scale, np.array([0.5, 1, 2], np.float32))


def test_dead_channels_are_clamped_where_awq_clamps() -> None:
    # 0 becomes 1e-4, so the divisor is sqrt(1e-4 * 1) = 1e-2
    scale = awq_scale(np.array([0, 1], np.float32), 0.5)
    np.testing.assert_allclose(scale, [1e-2, 1e2], rtol=1e-6)
    assert np.isfinite(scale).all()


LAYER_CASES = [(0, 3, (3,)), (5, 3, (7,)), (6, 1, (7,)), (7, 3, ()), (0, 99, (7,))]
WINDOW_CASES = [(0, 3, (1, 2, 3)), (5, 3, (6, 7)), (6, 3, (7,)), (7, 3, ()), (2, 1, (3,))]


@pytest.mark.parametrize(("layer", "window", "expected"), LAYER_CASES)
def test_layer_preview_looks_at_one(layer: int, window: int, expected: tuple[int, ...]) -> None:
    config = FaqConfig(preview="layer", window=window)
    assert future_layers(layer, 8, config) == expected


@pytest.mark.parametrize(("layer", "window", "expected"), WINDOW_CASES)
def test_window_preview_looks_at_all(layer: int, window: int, expected: tuple[int, ...]) -> None:
    config = FaqConfig(preview="window", window=window)
    assert future_layers(layer, 8, config) == expected


CURRENT = np.array([1, 2, 3], np.float32)
NEXT = [np.array([20, 10, 0], np.float32), np.array([0, 2, 10], np.float32)]


def test_fusion_by_hand_with_mean_normalisation() -> None:
    # means 2, 10 and 4: [.5, 1, 1.5], and ahead the mean of [2, 1, 0] and [0, .5, 2.5]
    config = FaqConfig(fusion=0.75, normalisation="mean")
    fused = fuse_statistics(CURRENT, NEXT, config)
    expected = 2 * (0.75 * np.array([0.5, 1, 1.5]) + 0.25 * np.array([1, 0.75, 1.25]))
    np.testing.assert_allclose(fused, expected, rtol=1e-6)


def test_fusion_by_hand_with_max_normalisation() -> None:
    # maxima 3, 20 and 10: ahead the mean of [1, .5, 0] and [0, .2, 1]
    config = FaqConfig(fusion=0.5, normalisation="max")
    fused = fuse_statistics(CURRENT, NEXT, config)
    expected = 3 * (0.5 * np.array([1, 2, 3]) / 3 + 0.5 * np.array([0.5, 0.35, 0.5]))
    np.testing.assert_allclose(fused, expected, rtol=1e-6)


def test_fusion_by_hand_without_normalisation() -> None:
    config = FaqConfig(fusion=0.5, normalisation="none")
    fused = fuse_statistics(CURRENT, NEXT, config)
    np.testing.assert_allclose(fused, [5.5, 4, 4], rtol=1e-6)


def test_fusion_zero_forgets_the_current_shape_but_not_its_size() -> None:
    fused = fuse_statistics(CURRENT, NEXT[:1], FaqConfig(fusion=0))
    np.testing.assert_allclose(fused, [4, 2, 0], rtol=1e-6)


def test_fusion_one_or_no_future_returns_the_very_same_array() -> None:
    assert fuse_statistics(CURRENT, NEXT, FaqConfig(fusion=1)) is CURRENT
    assert fuse_statistics(CURRENT, [], FaqConfig(fusion=0.5)) is CURRENT


def test_a_dead_layer_ahead_does_not_divide_by_zero() -> None:
    fused = fuse_statistics(CURRENT, [np.zeros(3, np.float32)], FaqConfig(fusion=0.5))
    np.testing.assert_allclose(fused, CURRENT / 2, rtol=1e-6)


def test_heads_that_share_a_value_head_share_the_mean() -> None:
    # 2 value heads, 2 query heads each, 2 channels per head
    statistic = np.array([1, 2, 3, 6, 10, 20, 30, 40], np.float32)
    shared = share_over_heads(statistic, 2, 2)
    np.testing.assert_array_equal(shared, [2, 4, 2, 4, 20, 30, 20, 30])
    np.testing.assert_array_equal(share_over_heads(statistic, 2, 1), statistic)
    assert share_over_heads(statistic, 2, 4).tolist() == [11, 17] * 4
