"""Is a calibrated weight more than round-to-nearest of the source weight?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.record import Record
from faq_onnx.artifacts.weights import QuantizedWeight
from faq_onnx.quant.uniform import quantize_rtn

__all__ = ["RtnComparison", "compare_with_rtn", "equals_rtn"]


class RtnComparison(Record):
    """A quantized weight beside plain round-to-nearest of the same source weight.

    Attributes:
        equal: Codes, zero points and scales are all the same bytes.
        equal_bytes: Share of packed code bytes that are the same, 0 to 1.
    """

    equal: bool
    equal_bytes: float


def compare_with_rtn(
    quantized: QuantizedWeight, weight: npt.NDArray[np.floating]
) -> RtnComparison:
    """Compare with `quantize_rtn(weight)` in the same format.

    Args:
        quantized: What will be written.
        weight: Source weight [N, K], before any channel scale.
    """
    plain = quantize_rtn(weight, quantized.format, quantized.scales.dtype)
    same = plain.packed == quantized.packed
    zero_points_equal = plain.zero_points is None or np.array_equal(
        plain.zero_points, quantized.zero_points if quantized.zero_points is not None else []
    )
    scales_equal = np.array_equal(plain.scales, quantized.scales)
    return RtnComparison(
        equal=bool(same.all()) and zero_points_equal and scales_equal,
        equal_bytes=float(same.mean()),
    )


def equals_rtn(quantized: QuantizedWeight, weight: npt.NDArray[np.floating]) -> bool:
    """Whether calibration changed nothing: the bytes are those of round-to-nearest."""
    return compare_with_rtn(quantized, weight).equal
