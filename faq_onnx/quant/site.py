"""Turn one weight into its low-bit form, as its plan says."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

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

__all__ = ["QuantizedSite", "quantize_weight", "rtn_digest"]

Array = npt.NDArray[np.float32]

ROWS_AT_A_TIME = 4096  # a head of 150,000 rows would otherwise need gigabytes of temporaries


@dataclasses.dataclass(frozen=True)
class QuantizedSite:
    """A low-bit weight and what it costs.

    Attributes:
        weight: Packed.
        codes_digest: Sha256 that stands for all codes; equal digests, equal codes.
        sqnr_db: 10 log10(E|y|^2 / E|y_q - y|^2), of outputs where a Gram matrix was given, else
            of weights.
    """

    weight: QuantizedWeight
    codes_digest: str
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
    grams = block_grams(gram, fmt.block_size) if clip and gram is not None else None
    pieces = [
        _quantize_rows(weight[start : start + ROWS_AT_A_TIME], fmt, gram, grams, scale_dtype)
        for start in range(0, len(weight), ROWS_AT_A_TIME)
    ]
    signal = sum(piece.signal for piece in pieces)
    noise = sum(piece.noise for piece in pieces)
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.codes_digest)
    return QuantizedSite(_join([p.weight for p in pieces]), digest.hexdigest(), _db(signal, noise))


def rtn_digest(weight: Array, fmt: BlockFormat, scale_dtype: npt.DTypeLike) -> str:
    """`QuantizedSite.codes_digest` of plain round-to-nearest: did a method change anything?"""
    return quantize_weight(weight, fmt, scale_dtype=scale_dtype).codes_digest


@dataclasses.dataclass(frozen=True)
class _Rows:
    weight: QuantizedWeight
    codes_digest: bytes
    signal: float
    noise: float


def _quantize_rows(
    weight: Array,
    fmt: BlockFormat,
    gram: Array | None,
    grams: Array | None,
    scale_dtype: npt.DTypeLike,
) -> _Rows:
    """Some rows [n, K]: they do not depend on each other, and temporaries stay small."""
    blocks = to_blocks(weight, fmt.block_size)
    target = blocks if grams is None else clip_blocks(blocks, grams, fmt, scale_dtype)
    grid = minmax_grid(target, fmt, scale_dtype)
    codes = round_to_grid(target, grid, fmt)
    packed = to_quantized_weight(codes, grid, fmt, weight.shape[1], scale_dtype)
    delta = dequantize(codes, grid).reshape(len(weight), -1)[:, : weight.shape[1]] - weight
    return _Rows(
        packed,
        hashlib.sha256(codes.tobytes()).digest(),
        _energy(weight, gram),
        _energy(delta, gram),
    )


def _energy(matrix: Array, gram: Array | None) -> float:
    if gram is None:
        return float(np.vdot(matrix, matrix))
    return output_energy(matrix, gram)


def _join(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    if len(weights) == 1:
        return weights[0]
    zero_points = [w.zero_points for w in weights if w.zero_points is not None]
    return dataclasses.replace(
        weights[0],
        out_features=sum(w.out_features for w in weights),
        packed=np.concatenate([w.packed for w in weights]),
        scales=np.concatenate([w.scales for w in weights]),
        zero_points=np.concatenate(zero_points) if zero_points else None,
    )


def _db(signal: float, noise: float) -> float:
    if noise <= 0 or signal <= 0:
        return math.inf if signal > 0 else 0.0
    return 10 * math.log10(signal / noise)
