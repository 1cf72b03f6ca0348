"""Scales that are multiples of a unit a row."""

from __future__ import annotations

import numpy as np
import pytest

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.stored_scales import ScaleUnit


def _eight_bit(*, symmetric: bool) -> BlockFormat:
    return block_format(4, 32, symmetric=symmetric, block_scales="8-bit")


@pytest.mark.parametrize("symmetric", [False, True])
def test_negative_zero_is_no_negative_scale(symmetric: bool) -> None:
    """A block of zeros whose range was clipped to [-0, -0]."""
    unit = ScaleUnit.stored(np.ones((1, 1), np.float32), _eight_bit(symmetric=symmetric))
    assert unit.round(np.array([[-0.0, 0.0]], np.float32)).tolist() == [[1.0, 1.0]]


def test_symmetric_scales_keep_their_signs() -> None:
    unit = ScaleUnit.stored(np.full((1, 1), 0.5, np.float32), _eight_bit(symmetric=True))
    scale = np.array([[-0.3, 0.3, 1000.0]], np.float32)
    assert unit.round(scale).tolist() == [[-0.5, 0.5, 127 * 0.5]]


def test_multiples_stand_for_the_rounded_scales() -> None:
    scale = np.array([[0.001, 0.7, 1.3], [4.0, 0.0, 2.0]], np.float32)
    unit = ScaleUnit.of(scale, _eight_bit(symmetric=False), np.float16)
    assert unit is not None
    rounded = unit.round(scale)
    multiples = unit.multiples(rounded)
    assert multiples.dtype == np.uint8
    assert multiples.min() >= 1
    assert np.array_equal(unit.scales(multiples), rounded)
