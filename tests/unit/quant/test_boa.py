"""BoA against dense GPTQ on the Kronecker Hessian, plain GPTQ, and its own loss."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.quant.boa import round_boa
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.gptq import GramFactor, round_gptq
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
HeadLosses = Callable[..., npt.NDArray[np.float64]]
DAMPING = 0.01


def _gram(rng: np.random.Generator, size: int) -> Array:
    """Of a quarter as many causes as channels; the diagonal descends, as GPTQ orders channels."""
    causes = rng.normal(size=(4 * size, -(-size // 4)))
    x = causes @ rng.normal(size=(causes.shape[1], size)) + 0.1 * rng.normal(size=(4 * size, size))
    gram = x.T @ x / len(x)
    scale = np.sqrt(np.linspace(2, 1, size) / np.diagonal(gram))
    return (gram * scale * scale[:, np.newaxis]).astype(np.float32)


def _grams(rng: np.random.Generator, heads: int, size: int) -> Array:
    return np.stack([_gram(rng, size) for _ in range(heads)])


def _weight(rng: np.random.Generator, rows: int, columns: int) -> Array:
    return rng.normal(size=(rows, columns)).astype(np.float32)


def _damped(gram: Array) -> npt.NDArray[np.float64]:
    ridge = DAMPING * np.diagonal(gram).mean(dtype=np.float64)
    damped: npt.NDArray[np.float64] = gram.astype(np.float64) + ridge * np.eye(len(gram))
    return damped


def _dense_gptq(
    weight: Array,
    grid: BlockGrid,
    limits: tuple[int, int],
    block: int,
    hessian: npt.NDArray[np.floating],
) -> Codes:
    """GPTQ of one long vector, coordinate after coordinate, all in float64."""
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    scale = np.repeat(grid.scale, block, axis=1).ravel().astype(np.float64)
    zero_point = np.repeat(grid.zero_point, block, axis=1).ravel()
    vector = weight.astype(np.float64).ravel()
    codes = np.empty(vector.size, np.uint8)
    for j in range(vector.size):
        code = np.clip(np.floor(vector[j] / scale[j] + zero_point[j] + 0.5), *limits)
        codes[j] = code
        error = vector[j] - scale[j] * (code - zero_point[j])
        vector[j:] -= error / upper[j, j] * upper[j, j:]
    return codes.reshape(len(weight), -1, block)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_one_row_to_a_step_is_dense_gptq(
    bits: int, symmetric: bool, rng: np.random.Generator
) -> None:
    heads, size, columns = 3, 6, 32
    fmt = block_format(bits, 16, symmetric=symmetric)
    weight = _weight(rng, heads * size, columns)
    # room for what rows take up and, in _gram, few causes: round_gptq gives no row up
    grid = minmax_grid(to_blocks(np.float32(2) * weight, 16), fmt)
    gram_in, gram_out = _gram(rng, columns), _grams(rng, heads, size)
    factor = GramFactor.of(gram_in, DAMPING)
    codes = round_boa(weight, grid, fmt, factor, gram_out, rows_per_step=1, damping=DAMPING)
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        part = BlockGrid(grid.scale[rows], grid.zero_point[rows])
        hessian = np.kron(_damped(gram_out[head]), _damped(gram_in))
        dense = _dense_gptq(weight[rows], part, code_limits(fmt), 16, hessian)
        np.testing.assert_array_equal(codes[rows], dense)
    assert (codes != round_gptq(weight, grid, fmt, factor)).any()


@pytest.mark.parametrize("rows_per_step", [1, 3, 4, 7])
def test_later_rows_are_the_least_squares_answer_to_earlier_ones(
    rows_per_step: int, rng: np.random.Generator
) -> None:
    """W_rest minimises tr(H_out dW H_in dW^T) given all rounded rows, whatever H_in is."""
    size, columns = 7, 32
    fmt = block_format(3, 16, symmetric=False)
    weight = _weight(rng, size, columns)
    grid = minmax_grid(to_blocks(np.float32(2) * weight, 16), fmt)
    factor, gram_out = GramFactor.of(_gram(rng, columns), DAMPING), _gram(rng, size)
    damped = _damped(gram_out)
    target, codes = weight.astype(np.float64), np.empty((size, 2, 16), np.uint8)
    for start in range(0, size, rows_per_step):
        here, stop = slice(start, start + rows_per_step), start + rows_per_step
        part = BlockGrid(grid.scale[here], grid.zero_point[here])
        codes[here] = round_gptq(target[here].astype(np.float32), part, fmt, factor)
        if stop >= size:
            break
        values = dequantize(codes, grid).reshape(size, columns)
        error = damped[stop:, :stop] @ (values[:stop] - weight[:stop])
        target[stop:] = weight[stop:] - np.linalg.solve(damped[stop:, stop:], error)
    found = round_boa(weight, grid, fmt, factor, gram_out[np.newaxis], rows_per_step=rows_per_step)
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("rows_per_step", [1, 3, 8])
def test_unrelated_rows_make_it_gptq(rows_per_step: int, rng: np.random.Generator) -> None:
    fmt = block_format(3, 16, symmetric=False)
    weight = _weight(rng, 2 * 8, 48)
    grid = minmax_grid(to_blocks(weight, 16), fmt)
    factor = GramFactor.of(_gram(rng, 48), DAMPING)
    alone = np.broadcast_to(np.eye(8), (2, 8, 8))
    codes = round_boa(weight, grid, fmt, factor, alone, rows_per_step=rows_per_step)
    np.testing.assert_array_equal(codes, round_gptq(weight, grid, fmt, factor))


@pytest.mark.parametrize("rows_per_step", [1, 2, 4])
def test_rows_may_come_in_any_order(rows_per_step: int, rng: np.random.Generator) -> None:
    """Rows of a head, shuffled together with H_out, get the same codes."""
    heads, size = 2, 8
    fmt = block_format(3, 16, symmetric=False)
    weight = _weight(rng, heads * size, 32)
    factor, gram_out = GramFactor.of(_gram(rng, 32), DAMPING), _grams(rng, heads, size)
    orders = np.stack([rng.permutation(size) for _ in range(heads)])
    rows = (orders + size * np.arange(heads)[:, np.newaxis]).ravel()
    shuffled = np.stack([g[np.ix_(o, o)] for g, o in zip(gram_out, orders, strict=True)])

    def rounded(rows_of: Array, out: Array) -> Codes:
        grid = minmax_grid(to_blocks(rows_of, 16), fmt)
        return round_boa(rows_of, grid, fmt, factor, out, rows_per_step=rows_per_step)

    np.testing.assert_array_equal(rounded(weight[rows], shuffled), rounded(weight, gram_out)[rows])


def test_each_head_may_have_its_own_inputs(rng: np.random.Generator) -> None:
    heads, size = 3, 8
    fmt = block_format(2, 16, symmetric=False)
    weight = _weight(rng, heads * size, 32)
    grid = minmax_grid(to_blocks(weight, 16), fmt)
    factors = [GramFactor.of(gram, DAMPING) for gram in _grams(rng, heads, 32)]
    gram_out = _grams(rng, heads, size)
    codes = round_boa(weight, grid, fmt, factors, gram_out, rows_per_step=4)
    for head, factor in enumerate(factors):
        rows = slice(head * size, (head + 1) * size)
        part = BlockGrid(grid.scale[rows], grid.zero_point[rows])
        alone = round_boa(
            weight[rows], part, fmt, factor, gram_out[head : head + 1], rows_per_step=4
        )
        np.testing.assert_array_equal(codes[rows], alone)
    assert (codes != round_boa(weight, grid, fmt, factors[0], gram_out, rows_per_step=4)).any()


def test_it_beats_gptq_on_its_loss(rng: np.random.Generator, head_losses: HeadLosses) -> None:
    heads, size, columns = 8, 16, 64
    fmt = block_format(3, 32, symmetric=False)
    weight = _weight(rng, heads * size, columns)
    grid = minmax_grid(to_blocks(weight, 32), fmt)
    gram_in, gram_out = _gram(rng, columns), _grams(rng, heads, size)
    factor = GramFactor.of(gram_in, DAMPING)

    def loss(codes: Codes) -> float:
        delta = dequantize(codes, grid).reshape(weight.shape) - weight
        return float(head_losses(delta, gram_in, gram_out).sum())

    plain = loss(round_gptq(weight, grid, fmt, factor))
    one, four = (
        loss(round_boa(weight, grid, fmt, factor, gram_out, rows_per_step=n)) for n in (1, 4)
    )
    # mean errors over 16 equally correlated rows cancel: most of the loss lies there
    assert one < four < plain
    assert one < 0.5 * plain


def test_weights_on_their_grid_stay(rng: np.random.Generator) -> None:
    """Ragged too: a head that cannot get better has its nearest codes, and plain padding."""
    fmt = block_format(4, 16, symmetric=False)
    weight = _weight(rng, 8, 20)
    grid = minmax_grid(to_blocks(weight, 16), fmt)
    codes = round_to_grid(to_blocks(weight, 16), grid, fmt)
    exact = np.ascontiguousarray(dequantize(codes, grid).reshape(8, -1)[:, :20])
    factor = GramFactor.of(_gram(rng, 20), DAMPING)
    found = round_boa(exact, grid, fmt, factor, _grams(rng, 2, 4))
    np.testing.assert_array_equal(found, round_to_grid(to_blocks(exact, 16), grid, fmt))


def test_shapes_are_checked(rng: np.random.Generator) -> None:
    fmt = block_format(4, 16, symmetric=False)
    weight = _weight(rng, 8, 16)
    grid = minmax_grid(to_blocks(weight, 16), fmt)
    factor = GramFactor.of(_gram(rng, 16), DAMPING)
    with pytest.raises(ValueError, match="8 rows"):
        round_boa(weight, grid, fmt, factor, _grams(rng, 3, 4))
    with pytest.raises(ValueError, match="for 4 heads"):
        round_boa(weight, grid, fmt, [factor] * 3, _grams(rng, 4, 2))
    with pytest.raises(ValueError, match="rows_per_step=0"):
        round_boa(weight, grid, fmt, factor, _grams(rng, 4, 2), rows_per_step=0)
