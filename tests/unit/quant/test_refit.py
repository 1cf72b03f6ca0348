"""Scales and codes against exhaustive search."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from faq_onnx.quant.formats import block_format
from faq_onnx.quant.refit import ROWS_AT_A_TIME, descend_codes, refit_scales
from faq_onnx.quant.uniform import BlockGrid, dequantize, minmax_grid, round_to_grid, to_blocks

Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
FORMAT = block_format(3, 16, symmetric=False)


def _gram(rng: np.random.Generator, channels: int) -> Array:
    tokens = rng.normal(size=(4 * channels, channels)) @ rng.normal(size=(channels, channels))
    return (tokens.T @ tokens / len(tokens)).astype(np.float32)


def _losses(weight: Array, codes: Codes, grid: BlockGrid, gram: Array) -> npt.NDArray[np.float64]:
    whole = dequantize(codes, grid).reshape(len(weight), -1)[:, : weight.shape[1]]
    error = whole.astype(np.float64) - weight
    losses: npt.NDArray[np.float64] = np.einsum("nk,nk->n", error @ gram, error)
    return losses


def test_one_block_gets_its_best_scale(rng: np.random.Generator) -> None:
    """One block per row: the least-squares scale in closed form, in float64."""
    weight, gram = rng.normal(size=(30, 16)).astype(np.float32), _gram(rng, 16)
    grid = minmax_grid(to_blocks(weight, 16), FORMAT)
    codes = round_to_grid(to_blocks(weight, 16), grid, FORMAT)
    found = refit_scales(weight, codes, grid, gram)
    levels = codes[:, 0].astype(np.float64) - grid.zero_point
    weighted = levels @ gram
    best = (weighted * weight).sum(axis=1) / (weighted * levels).sum(axis=1)
    np.testing.assert_allclose(found.scale[:, 0], best, rtol=1e-4)


def test_blocks_make_up_for_each_other(rng: np.random.Generator) -> None:
    """Sweeps end where the joint least-squares problem of all scales of a row has its minimum."""
    weight, gram = rng.normal(size=(8, 40)).astype(np.float32), _gram(rng, 40)
    start = grid = minmax_grid(to_blocks(weight, 16), FORMAT)
    codes = round_to_grid(to_blocks(weight, 16), grid, FORMAT)
    for _ in range(60):
        grid = refit_scales(weight, codes, grid, gram)
    for row, target in enumerate(weight.astype(np.float64)):
        levels = codes[row].astype(np.float64) - start.zero_point[row][:, np.newaxis]
        basis = np.zeros((3, 48))
        for block in range(3):
            basis[block, 16 * block : 16 * (block + 1)] = levels[block]
        basis = basis[:, :40]
        best = np.linalg.solve(basis @ gram @ basis.T, basis @ gram @ target)
        np.testing.assert_allclose(grid.scale[row], best, rtol=2e-3)


def test_float16_scales_stay_float16(rng: np.random.Generator) -> None:
    weight, gram = rng.normal(size=(30, 48)).astype(np.float32), _gram(rng, 48)
    grid = minmax_grid(to_blocks(weight, 16), FORMAT, np.float16)
    codes = round_to_grid(to_blocks(weight, 16), grid, FORMAT)
    found = refit_scales(weight, codes, grid, gram, np.float16)
    np.testing.assert_array_equal(found.scale, found.scale.astype(np.float16))
    before, after = (_losses(weight, codes, g, gram) for g in (grid, found))
    assert (after <= before).all()
    assert after.sum() < 0.95 * before.sum()


def test_scales_neither_vanish_nor_flip_nor_overflow() -> None:
    codes = np.full((3, 1, 16), 5, np.uint8)
    grid = BlockGrid(np.ones((3, 1), np.float32), np.full((3, 1), 3, np.float32))
    wished = np.array([0.0, -1.0, 1e6], np.float32)  # of the scale
    weight = np.repeat(wished[:, np.newaxis] * 2, 16, axis=1)
    found = refit_scales(weight, codes, grid, np.eye(16, dtype=np.float32), np.float16)
    np.testing.assert_array_equal(found.scale[:, 0], [1, 1, np.finfo(np.float16).max])


def test_a_silent_activation_changes_nothing(rng: np.random.Generator) -> None:
    weight, gram = rng.normal(size=(4, 32)).astype(np.float32), np.zeros((32, 32), np.float32)
    grid = minmax_grid(to_blocks(weight, 16), FORMAT)
    codes = round_to_grid(to_blocks(weight, 16), grid, FORMAT)
    np.testing.assert_array_equal(refit_scales(weight, codes, grid, gram).scale, grid.scale)
    np.testing.assert_array_equal(descend_codes(weight, codes, grid, gram, FORMAT), codes)


def test_descent_takes_the_best_code_of_each_channel(rng: np.random.Generator) -> None:
    """Against trying all eight codes of one channel after another, in float64."""
    weight, gram = rng.normal(size=(20, 70)).astype(np.float32), _gram(rng, 70)
    grid = minmax_grid(to_blocks(weight, 16), FORMAT)
    expected = round_to_grid(to_blocks(weight, 16), grid, FORMAT)
    found = descend_codes(weight, expected, grid, gram, FORMAT)
    nearest = expected.copy()
    for channel in range(70):
        block, place = divmod(channel, 16)
        trials = np.repeat(expected[np.newaxis], 8, axis=0)
        trials[:, :, block, place] = np.arange(8)[:, np.newaxis]
        losses = np.array([_losses(weight, trial, grid, gram) for trial in trials])
        expected[:, block, place] = losses.argmin(axis=0)
    # a tie within float32's doubt may fall either way and move the rest of its row
    assert (found == expected).all(axis=(1, 2)).mean() >= 0.9
    assert (expected != nearest).mean() > 0.05
    before, after = (_losses(weight, codes, grid, gram).sum() for codes in (nearest, found))
    assert after < 0.8 * before


def test_rows_do_not_know_each_other(rng: np.random.Generator) -> None:
    weight, gram = rng.normal(size=(ROWS_AT_A_TIME + 3, 16)).astype(np.float32), _gram(rng, 16)
    grid = minmax_grid(to_blocks(weight, 16), FORMAT)
    codes = round_to_grid(to_blocks(weight, 16), grid, FORMAT)
    last = BlockGrid(grid.scale[-3:], grid.zero_point[-3:])
    whole = refit_scales(weight, codes, grid, gram)
    alone = refit_scales(weight[-3:], codes[-3:], last, gram)
    np.testing.assert_allclose(whole.scale[-3:], alone.scale, rtol=1e-5)
    np.testing.assert_array_equal(
        descend_codes(weight, codes, grid, gram, FORMAT)[-3:],
        descend_codes(weight[-3:], codes[-3:], last, gram, FORMAT),
    )
