"""HQQ against its formulas written out, k-quants against a search over all they may choose."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.errors import UnsupportedFormatError
from faq_onnx.quant.data_free import hqq_grid, k_quant_grid
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.uniform import BlockGrid, fake_quantize, minmax_grid

Array = npt.NDArray[np.float32]


def _hqq_zero(weights: npt.NDArray[np.float64], highest: int) -> float:
    """One block, as algorithms.md 5.4 writes it, in float64."""
    low, high = min(weights.min(), 0.0), max(weights.max(), 0.0)
    inverse = highest / (high - low)
    zero, beta, best = -low * inverse, 10.0, np.inf
    for _ in range(20):
        codes = np.clip(np.rint(weights * inverse + zero), 0, highest)
        delta = weights - (codes - zero) / inverse
        size = np.abs(delta)
        shrunk = np.sign(delta) * np.maximum(size - np.maximum(size, 1e-30) ** -0.3 / beta, 0)
        zero = float(np.mean(codes - (weights - shrunk) * inverse))
        beta *= 1.01
        if size.mean() >= best:
            break
        best = size.mean()
    return float(np.clip(np.rint(zero), 0, highest))


@pytest.mark.parametrize("size", [0.05, 3.0])  # errors below and above the shrinking threshold
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_is_its_formula(bits: int, size: float, rng: np.random.Generator) -> None:
    fmt = block_format(bits, 16, symmetric=False)
    blocks = (size * rng.standard_t(3, size=(40, 2, 16))).astype(np.float32)
    grid = hqq_grid(blocks, fmt)
    wished = [[_hqq_zero(b.astype(np.float64), 2**bits - 1) for b in row] for row in blocks]
    # a block whose mean lies at a half may be rounded either way
    assert np.mean(grid.zero_point == wished) > 0.97
    np.testing.assert_array_equal(grid.scale, minmax_grid(blocks, fmt).scale)
    assert (grid.zero_point != minmax_grid(blocks, fmt).zero_point).any()


def test_hqq_refuses_symmetric_formats() -> None:
    with pytest.raises(UnsupportedFormatError, match="choose asymmetric"):
        hqq_grid(np.ones((1, 1, 16), np.float32), block_format(4, 16, symmetric=True))


def _weighted(blocks: Array, rounded: Array, weights: Array) -> Array:
    """Weighted squared error of each block, [N, k_blocks]."""
    errors: Array = np.sum(weights * np.square(rounded - blocks), axis=-1)
    return errors


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_k_quants_come_near_the_best_grid(
    bits: int, symmetric: bool, rng: np.random.Generator
) -> None:
    """The best of 200 scales times all zero points; no search may beat it by more than its gaps.

    The bound from above is one of quality: least squares on 37 roundings, against all of them.
    """
    fmt = block_format(bits, 32, symmetric=symmetric)
    blocks = rng.normal(size=(60, 1, 32)).astype(np.float32)
    mean = np.mean(np.square(blocks), axis=-1, keepdims=True)
    weights = np.sqrt(mean) + np.abs(blocks)
    largest = np.abs(blocks).max(axis=-1)
    middle = 1 << (fmt.storage_bits - 1)
    zeros = [middle] if symmetric else range(1 << bits)
    signs = (-1, 1) if symmetric else (1,)
    best = np.full(largest.shape, np.inf, np.float32)
    for part in np.linspace(0.05, 2.0, 200, dtype=np.float32):
        for zero in zeros:
            for sign in signs:
                scale = np.float32(sign) * part * 2 * largest / np.float32(2**bits - 1)
                grid = BlockGrid(scale, np.full(scale.shape, zero, np.float32))
                rounded = fake_quantize(blocks, fmt, grid=grid)
                best = np.minimum(best, _weighted(blocks, rounded, weights))
    found = fake_quantize(blocks, fmt, grid=k_quant_grid(blocks, fmt))
    plain = fake_quantize(blocks, fmt)
    total = _weighted(blocks, found, weights).sum()
    assert 0.98 * best.sum() <= total <= 1.2 * best.sum()
    assert total < 0.97 * _weighted(blocks, plain, weights).sum()
