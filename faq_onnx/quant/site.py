"""Turn one weight into its low-bit form, as its plan says."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.artifacts.weights import QuantizedWeight
from faq_onnx.quant.clip import clip_blocks
from faq_onnx.quant.objective import block_grams, output_energy
from faq_onnx.quant.uniform import (
    dequantize,
    minmax_grid,
    round_to_grid,
    to_blocks,
    to_quantized_weight,
)

__all__ = ["QuantizedSite", "quantize_weight", "rtn_codes"]

Array = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class QuantizedSite:
    """A low-bit weight and what it costs.

    Attributes:
        weight: Packed.
        codes: uint8 [N, k_blocks, block].
        sqnr_db: 10 log10(E|y|^2 / E|y_q - y|^2), of outputs where a Gram matrix was given, else
            of weights.
    """

    weight: QuantizedWeight
    codes: npt.NDArray[np.uint8]
    sqnr_db: float


def quantize_weight(
    weight: Array,
    fmt: BlockFormat,
    *,
    gram: Array | None = None,
    clip: bool = False,
    scale_dtype: npt.DTypeLike = np.float32,
) -> QuantizedSite:
    """Quantize one weight.

    Args:
        weight: float32 [N, K], channel scales already multiplied in.
        fmt: Bits, block size, symmetry.
        gram: E[x^T x] of the activations that this weight will meet, float32 [K, K].
        clip: Search clipping ratios on the Gram matrix's diagonal blocks.
        scale_dtype: Dtype in which scales are stored: that of the model's activations.
    """
    blocks = to_blocks(weight, fmt.block_size)
    target = blocks
    if clip and gram is not None:
        target = clip_blocks(blocks, block_grams(gram, fmt.block_size), fmt, scale_dtype)
    grid = minmax_grid(target, fmt, scale_dtype)
    codes = round_to_grid(target, grid, fmt)
    packed = to_quantized_weight(codes, grid, fmt, weight.shape[1], scale_dtype)
    delta = dequantize(codes, grid).reshape(len(weight), -1)[:, : weight.shape[1]] - weight
    return QuantizedSite(packed, codes, _sqnr_db(weight, delta, gram))


def rtn_codes(weight: Array, fmt: BlockFormat, scale_dtype: npt.DTypeLike) -> bytes:
    """Codes of plain round-to-nearest, to tell whether a method changed anything."""
    blocks = to_blocks(weight, fmt.block_size)
    return round_to_grid(blocks, minmax_grid(blocks, fmt, scale_dtype), fmt).tobytes()


def _sqnr_db(weight: Array, delta: Array, gram: Array | None) -> float:
    if gram is None:
        signal, noise = float(np.vdot(weight, weight)), float(np.vdot(delta, delta))
    else:
        signal, noise = output_energy(weight, gram), output_energy(delta, gram)
    if noise <= 0 or signal <= 0:
        return math.inf if signal > 0 else 0.0
    return 10 * math.log10(signal / noise)
