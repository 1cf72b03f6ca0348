"""Rounding with compensation against the textbook, and what it refuses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.errors import CalibrationError, NonFiniteError
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.gptq import (
    ROWS_AT_A_TIME,
    GramFactor,
    keep_better_rows,
    round_gptq,
)
from faq_onnx.quant.objective import output_energy
from faq_onnx.quant.uniform import (
    BlockGrid,
    code_limits,
    dequantize,
    minmax_grid,
    round_to_grid,
    to_blocks,
)

Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
FORMAT = block_format(3, 16, symmetric=False)


def _gram(rng: np.random.Generator, channels: int) -> Array:
    """Of correlated activations, well conditioned."""
    mixing = rng.normal(size=(channels, channels))
    tokens = rng.normal(size=(4 * channels, channels)) @ mixing
    return (tokens.T @ tokens / len(tokens)).astype(np.float32)


def _loss(weight: Array, codes: Codes, grid: BlockGrid, gram: Array) -> float:
    whole = dequantize(codes, grid).reshape(len(weight), -1)
    return output_energy(whole[:, : weight.shape[1]] - weight, gram)


def _textbook(weight: Array, grid: BlockGrid, gram: Array, damping: float) -> Codes:
    """GPTQ as in the paper's algorithm 1: float64, one channel and rank-1 update at a time."""
    size = FORMAT.block_size
    order = np.argsort(-np.diagonal(gram), kind="stable")
    damped = gram.astype(np.float64)
    damped += damping * np.diagonal(damped).mean() * np.eye(len(gram))
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    rest = weight.astype(np.float64)[:, order]
    codes = np.repeat(grid.zero_point, size, axis=1).astype(np.uint8)
    lowest, highest = code_limits(FORMAT)
    for j, channel in enumerate(order):
        scale = grid.scale[:, channel // size].astype(np.float64)
        zero_point = grid.zero_point[:, channel // size]
        code = np.clip(np.floor(rest[:, j] / scale + zero_point + 0.5), lowest, highest)
        codes[:, channel] = code
        error = (rest[:, j] - (code - zero_point) * scale) / upper[j, j]
        rest[:, j:] -= np.outer(error, upper[j, j:])
    return codes.reshape(len(codes), -1, size)


@pytest.mark.parametrize("columns", [16, 90, 160])
def test_equals_the_textbook(rng: np.random.Generator, columns: int) -> None:
    weight = rng.normal(size=(60, columns)).astype(np.float32)
    grid = minmax_grid(to_blocks(weight, 16), FORMAT)
    gram = _gram(rng, columns)
    expected = _textbook(weight, grid, gram, 0.01)
    nearest = round_to_grid(to_blocks(weight, 16), grid, FORMAT)
    expected = keep_better_rows(weight, nearest, expected, grid, gram)
    found = round_gptq(weight, grid, FORMAT, GramFactor.of(gram, 0.01))
    # float32 moves a target by about 1e-5 steps, and a flipped code moves the rest of its row
    same = (found == expected).all(axis=(1, 2))
    assert same.mean() >= 0.95
    assert (expected != nearest).mean() > 0.05


def test_rounding_loses_much_less(rng: np.random.Generator) -> None:
    weight, gram = rng.normal(size=(50, 128)).astype(np.float32), _gram(rng, 128)
    grid = minmax_grid(to_blocks(weight, 16), FORMAT)
    codes = round_gptq(weight, grid, FORMAT, GramFactor.of(gram, 0.01))
    nearest = round_to_grid(to_blocks(weight, 16), grid, FORMAT)
    assert _loss(weight, codes, grid, gram) < 0.6 * _loss(weight, nearest, grid, gram)


def test_the_feedback_is_that_of_the_inverse(rng: np.random.Generator) -> None:
    gram = _gram(rng, 150)  # large enough for the recursive inversion
    factor = GramFactor.of(gram, 0.1)
    damped = gram.astype(np.float64) + 0.1 * np.diagonal(gram).mean() * np.eye(150)
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(factor.order, factor.order)])).T
    expected = (upper / np.diagonal(upper)[:, np.newaxis]).T - np.eye(150)
    np.testing.assert_allclose(factor.feedback, expected, atol=1e-6)
    assert (np.diff(np.diagonal(gram)[factor.order]) <= 0).all()


def test_a_dead_channel_is_rounded_to_nearest_and_moves_none(rng: np.random.Generator) -> None:
    gram = _gram(rng, 32)
    gram[5] = gram[:, 5] = 0
    weight = rng.normal(size=(20, 32)).astype(np.float32)
    grid = minmax_grid(to_blocks(weight, 16), FORMAT)
    codes = round_gptq(weight, grid, FORMAT, GramFactor.of(gram, 0.01))
    nearest = round_to_grid(to_blocks(weight, 16), grid, FORMAT)
    np.testing.assert_array_equal(codes[:, 0, 5], nearest[:, 0, 5])
    assert np.isfinite(GramFactor.of(np.zeros_like(gram), 0.01).feedback).all()


def test_damping_grows_until_the_matrix_is_definite(rng: np.random.Generator) -> None:
    token = rng.normal(size=(1, 40)).astype(np.float32)
    factor = GramFactor.of(token.T @ token - np.float32(1e-3) * np.eye(40, dtype=np.float32), 0.0)
    assert 0 < factor.damping < 0.1
    assert GramFactor.of(_gram(rng, 16), 0.01).damping == 0.01


def test_what_is_no_gram_matrix_is_refused() -> None:
    gram = np.eye(16, dtype=np.float32)
    gram[0, 1] = gram[1, 0] = np.inf
    with pytest.raises(NonFiniteError, match="Gram"):
        GramFactor.of(gram, 0.01)
    gram[0, 1] = gram[1, 0] = 1e30
    with pytest.raises(CalibrationError, match="definite"):
        GramFactor.of(gram, 0.01)


def test_rows_are_rounded_alone(rng: np.random.Generator) -> None:
    rows = ROWS_AT_A_TIME + 3
    weight = rng.normal(size=(rows, 16)).astype(np.float32)
    grid = minmax_grid(to_blocks(weight, 16), FORMAT)
    factor = GramFactor.of(_gram(rng, 16), 0.01)
    whole = round_gptq(weight, grid, FORMAT, factor)
    last = BlockGrid(grid.scale[-3:], grid.zero_point[-3:])
    np.testing.assert_array_equal(whole[-3:], round_gptq(weight[-3:], last, FORMAT, factor))
