"""BoA: GPTQ for q, k and v projections that lets the rows of a head make up for each other.

A change dW [d, K] of a head's weight costs tr(H_out dW H_in dW^T): H_in [K, K] of its inputs, and
H_out [d, d] of what reads its outputs (`head_grams.py`). GPTQ knows H_in alone. Here rows go in
steps of B rows of every head: GPTQ rounds them on H_in, then the head's later rows take up what
was lost. With H_out^-1 = U^T U, rows in order, W_B the rows before and Q_B after rounding:

    W[rest] -= U^T[rest, B] (U^T[B, B])^-1 (W_B - Q_B).

With one row to a step this is GPTQ on the dense Hessian H_out (x) H_in of the row-major weight;
more rows to a step ignore H_out among them and are that much faster. Source: BoA (arXiv
2406.13474), TurboBoA (arXiv 2602.04929); algorithms.md 3.2. No code was taken from either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.quant.gptq import GramFactor, round_gptq
from faq_onnx.quant.uniform import BlockGrid, dequantize, round_to_grid, to_blocks

__all__ = ["round_boa"]

Matrix = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]


def round_boa(  # noqa: PLR0913 - two metrics and their knobs
    weight: Matrix,
    grid: BlockGrid,
    fmt: BlockFormat,
    gram_in: GramFactor | Sequence[GramFactor],
    gram_out: npt.NDArray[np.floating],
    *,
    rows_per_step: int = 16,
    damping: float = 0.01,
) -> Codes:
    """Round on fixed grids so that errors cancel within a head, over channels and over rows.

    A head on which that fails gets its nearest codes: no head's loss is above nearest's.

    Args:
        weight: Target, float32 [heads * d, K], a head's rows side by side; K may be ragged.
        grid: Levels, float32 [heads * d, k_blocks].
        fmt: Levels' limits and the block size.
        gram_in: Factor of H_in, one for all heads or one for each.
        gram_out: H_out, symmetric [heads, d, d].
        rows_per_step: Rows of a head that are rounded together, 1 to d.
        damping: Ridge on H_out, relative to the mean of its diagonal.

    Returns:
        uint8 [heads * d, k_blocks, block]; padding has its block's zero point.

    Raises:
        ValueError: Shapes do not fit each other.
        NonFiniteError, CalibrationError: `gram_out` is no Gram matrix, as `GramFactor.of`.
    """
    factors = _per_head(gram_in, weight, gram_out, rows_per_step)
    outs = [GramFactor.of(gram, damping) for gram in gram_out]
    size = gram_out.shape[1]
    rows = np.stack([head * size + out.order for head, out in enumerate(outs)])
    feedback = np.stack([out.feedback for out in outs])
    work = weight[rows]
    codes = np.empty((*grid.scale.shape, fmt.block_size), np.uint8)
    for start in range(0, size, rows_per_step):
        stop = min(start + rows_per_step, size)
        here = rows[:, start:stop]
        codes[here] = _round_step(work[:, start:stop], _part(grid, here), fmt, factors)
        if stop < size:
            error = work[:, start:stop] - _values(codes, grid, here, weight.shape[1])
            work[:, stop:] -= _spread(feedback, start, stop) @ error
    nearest = round_to_grid(to_blocks(weight, fmt.block_size), grid, fmt)
    changes = _changes(weight, grid, nearest, codes, factors, gram_out)
    better = np.repeat(changes < 0, size)
    return np.where(better[:, np.newaxis, np.newaxis], codes, nearest)


def _per_head(
    gram_in: GramFactor | Sequence[GramFactor],
    weight: Matrix,
    gram_out: npt.NDArray[np.floating],
    rows_per_step: int,
) -> tuple[GramFactor, ...]:
    """Factors, one or as many as heads; guards the shapes."""
    factors = (gram_in,) if isinstance(gram_in, GramFactor) else tuple(gram_in)
    heads, size = gram_out.shape[:2]
    if gram_out.shape != (heads, size, size) or heads * size != len(weight):
        msg = f"H_out of shape {gram_out.shape} does not fit a weight of {len(weight)} rows"
        raise ValueError(msg)
    if len(factors) not in {1, heads}:
        msg = f"{len(factors)} matrices H_in for {heads} heads; give one, or one for each head"
        raise ValueError(msg)
    if rows_per_step < 1:
        msg = f"rows_per_step={rows_per_step} rounds nothing; choose 1 or more"
        raise ValueError(msg)
    return factors


def _round_step(
    work: Matrix, grid: BlockGrid, fmt: BlockFormat, factors: Sequence[GramFactor]
) -> Codes:
    """GPTQ of a step's rows [heads, n, K]: uint8 [heads, n, k_blocks, block].

    Heads with one H_in between them are one call: its time is that of K channels one after
    another, however many rows they have.
    """
    count = work.shape[1]
    pieces = [
        round_gptq(
            work[heads].reshape(-1, work.shape[2]),
            BlockGrid(
                grid.scale[heads].reshape(-1, grid.scale.shape[2]),
                grid.zero_point[heads].reshape(-1, grid.scale.shape[2]),
            ),
            fmt,
            factor,
        )
        for heads, factor in _shares(len(work), factors)
    ]
    codes = np.concatenate(pieces)
    return codes.reshape(-1, count, *codes.shape[1:])


def _shares(heads: int, factors: Sequence[GramFactor]) -> Iterator[tuple[slice, GramFactor]]:
    """Heads that have one H_in between them."""
    each = heads // len(factors)
    for index, factor in enumerate(factors):
        yield slice(index * each, (index + 1) * each), factor


def _part(grid: BlockGrid, rows: npt.NDArray[np.intp]) -> BlockGrid:
    return BlockGrid(grid.scale[rows], grid.zero_point[rows])


def _values(codes: Codes, grid: BlockGrid, rows: npt.NDArray[np.intp], columns: int) -> Matrix:
    """Weights that some rows' codes stand for: float32 [heads, n, K]."""
    values: Matrix = dequantize(codes[rows], _part(grid, rows)).reshape(*rows.shape, -1)
    return values[:, :, :columns]


def _spread(feedback: Matrix, start: int, stop: int) -> Matrix:
    """U^T[rest, B] (U^T[B, B])^-1 of every head: float32 [heads, rest, n].

    `GramFactor.feedback` is F - I of the unit lower triangle F in U^T = F D; D cancels.
    """
    within = feedback[:, start:stop, start:stop].astype(np.float64) + np.eye(stop - start)
    spread = feedback[:, stop:, start:stop] @ np.linalg.inv(within)
    return spread.astype(np.float32)


def _changes(  # noqa: PLR0913, PLR0917 - two roundings of one weight, and its metrics
    weight: Matrix,
    grid: BlockGrid,
    base: Codes,
    codes: Codes,
    factors: Sequence[GramFactor],
    gram_out: npt.NDArray[np.floating],
) -> npt.NDArray[np.float64]:
    """What each head's loss gains from `base` to `codes`: float64 [heads].

    With errors a, b of both: tr(H_out (b - a) H_in (a + b)^T), no difference of large numbers.
    """
    heads, size = gram_out.shape[:2]
    rows, columns = np.arange(len(weight)).reshape(heads, size), weight.shape[1]
    original = weight.reshape(heads, size, columns)
    before = _values(base, grid, rows, columns) - original
    after = _values(codes, grid, rows, columns) - original
    product = np.empty_like(after)
    for part, factor in _shares(heads, factors):
        product[part] = (after[part] - before[part]) @ factor.gram
    return _traces(product, before + after, gram_out)


def _traces(
    left: npt.NDArray[np.floating],
    right: npt.NDArray[np.floating],
    gram_out: npt.NDArray[np.floating],
) -> npt.NDArray[np.float64]:
    """tr(H_out L R^T) of each head's L and R [d, K]: float64 [heads]."""
    inner = left @ right.transpose(0, 2, 1)  # [i, j] = L_i . R_j, and tr sums H_out[j, i] of it
    traces: npt.NDArray[np.float64] = np.einsum(
        "hij,hji->h", inner.astype(np.float64), gram_out, optimize=False
    )
    return traces
