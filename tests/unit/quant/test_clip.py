"""The clip search: never worse by its own measure, the best of its candidates, and AWQ's."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.quant.clip import CLIP_STEPS, ROWS_AT_A_TIME, clip_grid
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.uniform import (
    BlockGrid,
    dequantize,
    fake_quantize,
    minmax_grid,
    round_to_grid,
)

Array = npt.NDArray[np.float32]
FORMATS = [(2, 16, True), (3, 16, False), (4, 32, False), (4, 16, True), (8, 16, False)]


def _grams(rng: np.random.Generator, k_blocks: int, block: int) -> Array:
    x = rng.normal(size=(k_blocks, 3 * block, block)) * np.exp2(rng.normal(size=block))
    return (x.transpose(0, 2, 1) @ x / (3 * block)).astype(np.float32)


def _errors(blocks: Array, rounded: Array, grams: Array) -> Array:
    """Each block's d G d^T in float64, [N, k_blocks]."""
    delta = rounded.astype(np.float64) - blocks
    errors: Array = np.einsum("nbi,bij,nbj->nb", delta, grams.astype(np.float64), delta)
    return errors


def _grid_errors(blocks: Array, grid: BlockGrid, grams: Array, fmt: BlockFormat) -> Array:
    return _errors(blocks, dequantize(round_to_grid(blocks, grid, fmt), grid), grams)


def _clamp_first(blocks: Array, grams: Array, fmt: BlockFormat) -> tuple[Array, Array]:
    """What llm-awq does: the clamped weights of the best ratio, and what they are rounded to."""
    limit = np.abs(blocks).max(axis=-1, keepdims=True)
    best_error, best = np.full(blocks.shape[:-1], np.inf), blocks
    for ratio in (1 - np.arange(CLIP_STEPS) / 20).astype(np.float32):
        clamped = np.clip(blocks, -limit * ratio, limit * ratio)
        error = _errors(blocks, fake_quantize(clamped.copy(), fmt), grams)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best = np.where(better[..., np.newaxis], clamped, best)
    return best, fake_quantize(best.copy(), fmt)


@pytest.mark.parametrize("parts", FORMATS, ids=str)
def test_no_block_gets_worse_and_some_get_better(
    parts: tuple[int, int, bool], rng: np.random.Generator
) -> None:
    fmt, block = block_format(*parts), parts[1]
    blocks = rng.standard_t(3, size=(40, 3, block)).astype(np.float32)
    grams = _grams(rng, 3, block)
    grids = minmax_grid(blocks, fmt), clip_grid(blocks, grams, fmt)
    before, after = (_grid_errors(blocks, grid, grams, fmt) for grid in grids)
    # the search compares float32 sums of block**2 terms
    slack = block * block * 2.0**-23 * before.max()
    assert (after <= before + slack).all()
    if fmt.code_bits < 8:
        assert after.sum() < 0.95 * before.sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_codes_are_those_of_clamping_first(bits: int, rng: np.random.Generator) -> None:
    fmt = block_format(bits, 16, symmetric=True)
    blocks = rng.standard_t(3, size=(30, 2, 16)).astype(np.float32)
    grams = _grams(rng, 2, 16)
    clamped, _ = _clamp_first(blocks, grams, fmt)
    grid, theirs = clip_grid(blocks, grams, fmt), minmax_grid(clamped, fmt)
    np.testing.assert_array_equal(grid.scale, theirs.scale)
    np.testing.assert_array_equal(
        round_to_grid(blocks, grid, fmt), round_to_grid(clamped, theirs, fmt)
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_clamping_first_is_never_nearer(bits: int, rng: np.random.Generator) -> None:
    """On a diagonal Gram matrix the nearest level is the best one, for every ratio."""
    fmt = block_format(bits, 16, symmetric=False)
    blocks = rng.standard_t(3, size=(30, 2, 16)).astype(np.float32)
    grams = np.stack([np.diag(row) for row in np.exp2(rng.normal(size=(2, 16)))])
    grams = grams.astype(np.float32)
    _, theirs = _clamp_first(blocks, grams, fmt)
    ours = _grid_errors(blocks, clip_grid(blocks, grams, fmt), grams, fmt)
    assert (ours <= _errors(blocks, theirs, grams) * (1 + 16 * 2.0**-23)).all()


def test_the_grid_lies_inside_the_range(rng: np.random.Generator) -> None:
    fmt = block_format(3, 16, symmetric=True)
    blocks = rng.standard_t(3, size=(10, 2, 16)).astype(np.float32)
    scale = np.abs(clip_grid(blocks, _grams(rng, 2, 16), fmt).scale)
    largest = np.abs(minmax_grid(blocks, fmt).scale)
    assert (scale <= largest).all()
    assert (scale >= np.float32(0.55) * largest * (1 - 2.0**-20)).all()


def test_rows_are_searched_alone(rng: np.random.Generator) -> None:
    """Pieces of ROWS_AT_A_TIME rows do not know each other."""
    rows = ROWS_AT_A_TIME + 3
    blocks = rng.normal(size=(rows, 1, 16)).astype(np.float32)
    grams, fmt = _grams(rng, 1, 16), block_format(4, 16, symmetric=False)
    whole, last = clip_grid(blocks, grams, fmt), clip_grid(blocks[-3:], grams, fmt)
    np.testing.assert_array_equal(whole.scale[-3:], last.scale)
    np.testing.assert_array_equal(whole.zero_point[-3:], last.zero_point)


def test_zero_blocks_stay_zero(rng: np.random.Generator) -> None:
    fmt = block_format(4, 16, symmetric=False)
    blocks = np.zeros((2, 1, 16), np.float32)
    grid = clip_grid(blocks, _grams(rng, 1, 16), fmt)
    np.testing.assert_array_equal(dequantize(round_to_grid(blocks, grid, fmt), grid), blocks)
