"""Telling a calibrated weight from plain round-to-nearest."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.quant.formats import block_format
from faq_onnx.quant.uniform import quantize_rtn
from faq_onnx.verify.rtn_check import compare_with_rtn, equals_rtn


def _weight() -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((16, 96)).astype(np.float32)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_to_nearest_is_recognized(symmetric: bool, dtype: str) -> None:
    quantized = quantize_rtn(_weight(), block_format(4, 32, symmetric=symmetric), dtype)
    found = compare_with_rtn(quantized, _weight())
    assert found.equal
    assert found.equal_bytes == 1


def test_a_channel_scale_makes_a_difference() -> None:
    channel_scale = np.linspace(0.5, 2, 96, dtype=np.float32)
    quantized = quantize_rtn(_weight() * channel_scale, block_format(4, 32, symmetric=False))
    assert not equals_rtn(quantized, _weight())
    assert compare_with_rtn(quantized, _weight()).equal_bytes < 0.9


def test_scales_alone_make_a_difference() -> None:
    quantized = quantize_rtn(_weight(), block_format(4, 32, symmetric=False))
    other = dataclasses.replace(quantized, scales=quantized.scales * np.float32(0.5))
    found = compare_with_rtn(other, _weight())
    assert not found.equal
    assert found.equal_bytes == 1


def test_zero_points_alone_make_a_difference() -> None:
    quantized = quantize_rtn(_weight(), block_format(4, 32, symmetric=False))
    assert quantized.zero_points is not None
    other = dataclasses.replace(quantized, zero_points=quantized.zero_points ^ np.uint8(1))
    assert not equals_rtn(other, _weight())
