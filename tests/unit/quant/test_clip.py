"""The clip search: never worse by its own measure, and the best of its candidates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.quant.clip import CLIP_STEPS, ROWS_AT_A_TIME, clip_blocks
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.uniform import fake_quantize

Array = npt.NDArray[np.float32]
FORMATS = [(2, 16, True), (3, 16, False), (4, 32, False), (4, 16, True), (8, 16, False)]


def _grams(rng: np.random.Generator, k_blocks: int, block: int) -> Array:
    x = rng.normal(size=(k_blocks, 3 * block, block)) * np.exp2(rng.normal(size=block))
    return (x.transpose(0, 2, 1) @ x / (3 * block)).astype(np.float32)


def _errors(blocks: Array, clipped: Array, grams: Array, fmt: tuple[int, int, bool]) -> Array:
    """Each block's d G d^T in float64, [N, k_blocks]."""
    rounded = fake_quantize(clipped.copy(), block_format(*fmt))
    delta = rounded.astype(np.float64) - blocks
    errors: Array = np.einsum("nbi,bij,nbj->nb", delta, grams.astype(np.float64), delta)
    return errors


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_no_block_gets_worse_and_some_get_better(
    fmt: tuple[int, int, bool], rng: np.random.Generator
) -> None:
    block = fmt[1]
    blocks = rng.standard_t(3, size=(40, 3, block)).astype(np.float32)
    grams = _grams(rng, 3, block)
    clipped = clip_blocks(blocks, grams, block_format(*fmt))
    before, after = (_errors(blocks, b, grams, fmt) for b in (blocks, clipped))
    # the search compares float32 sums of block**2 terms
    slack = block * block * 2.0**-23 * before.max()
    assert (after <= before + slack).all()
    if fmt[0] < 8:
        assert after.sum() < 0.95 * before.sum()


def test_the_best_of_all_ratios_is_taken(rng: np.random.Generator) -> None:
    fmt = (3, 16, False)
    blocks = rng.standard_t(3, size=(20, 2, 16)).astype(np.float32)
    grams = _grams(rng, 2, 16)
    limit = np.abs(blocks).max(axis=-1, keepdims=True)
    ratios = (1 - np.arange(CLIP_STEPS) / 20).astype(np.float32)
    errors = [_errors(blocks, np.clip(blocks, -limit * r, limit * r), grams, fmt) for r in ratios]
    found = _errors(blocks, clip_blocks(blocks, grams, block_format(*fmt)), grams, fmt)
    np.testing.assert_allclose(found, np.min(errors, axis=0), rtol=1e-3)


def test_signs_and_small_weights_stay(rng: np.random.Generator) -> None:
    blocks = rng.standard_t(3, size=(10, 2, 16)).astype(np.float32)
    clipped = clip_blocks(blocks, _grams(rng, 2, 16), block_format(3, 16, symmetric=True))
    limit = np.abs(clipped).max(axis=-1, keepdims=True)
    np.testing.assert_array_equal(clipped, np.clip(blocks, -limit, limit))
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    assert (limit >= np.float32(0.55) * largest * (1 - 2.0**-20)).all()


def test_rows_are_searched_alone(rng: np.random.Generator) -> None:
    """Pieces of ROWS_AT_A_TIME rows do not know each other."""
    rows = ROWS_AT_A_TIME + 3
    blocks = rng.normal(size=(rows, 1, 16)).astype(np.float32)
    grams, fmt = _grams(rng, 1, 16), block_format(4, 16, symmetric=False)
    whole = clip_blocks(blocks, grams, fmt)
    np.testing.assert_array_equal(whole[-3:], clip_blocks(blocks[-3:], grams, fmt))


def test_zero_blocks_stay_zero(rng: np.random.Generator) -> None:
    blocks = np.zeros((2, 1, 16), np.float32)
    clipped = clip_blocks(blocks, _grams(rng, 1, 16), block_format(4, 16, symmetric=False))
    np.testing.assert_array_equal(clipped, blocks)
