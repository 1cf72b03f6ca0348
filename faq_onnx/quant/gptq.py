"""GPTQ on fixed block grids: round one input channel after another, each making up for the last.

Frantar et al., "GPTQ" (arXiv 2210.17323); algorithms.md 5.1. Grids are fixed beforehand and
channels go in descending order of their second moment (static groups with act-order): the only
form of act-order that MatMulNBits can store, because its blocks are runs of neighbours.

With H = G + damping * mean(diag G) * I, ordered, H^-1 = U^T U and e_j the error at channel j:
    w'_k = w_k - sum_{j<k} e_j U_jk / U_jj,    q_k = round(w'_k),    e_k = w'_k - q_k.
Evaluated as it is written ("left-looking"): what a channel receives is one product of finished
errors, so nothing but the errors is kept and no rank-1 update passes over the rest of the weight.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.errors import CalibrationError, NonFiniteError
from faq_onnx.quant.uniform import (
    HALF,
    BlockGrid,
    code_limits,
    dequantize,
    round_to_grid,
    to_blocks,
)

__all__ = [
    "GramFactor",
    "channel_energies",
    "keep_better_rows",
    "round_gptq",
    "weight_error",
]

Matrix = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Doubles = npt.NDArray[np.floating]  # float64; numpy.linalg's stubs promise no more

DAMPING = 0.01  # GPTQ's own default
SMALLEST_RETRY = 1e-6  # a damping of 0 has to grow from something
RETRIES = 12  # 1e-6 * 10^12: beyond K for any model, where a Gram matrix is surely definite
LAZY_CHANNELS = 32  # errors of a lazy block of channels stay in the second-level cache
ROWS_AT_A_TIME = 4096  # bounds the temporaries to a few [K, 4096] matrices
INVERT_WHOLE = 64  # triangles up to this size are inverted by LAPACK


@dataclasses.dataclass(frozen=True)
class GramFactor:
    """All that GPTQ needs of an activation; serves every site that reads it, and row chunks.

    Attributes:
        gram: The matrix that it was built of, float32 [K, K].
        order: Channels in the order in which they are rounded, int64 [K].
        feedback: float32 [K, K], strictly lower, rows and columns in that order:
            feedback[k, j] = U_jk / U_jj is what an error at channel j takes off channel k.
        damping: What was used; more than was asked for where Cholesky needed it.
    """

    gram: Matrix
    order: npt.NDArray[np.int64]
    feedback: Matrix
    damping: float

    @classmethod
    def of(cls, gram: Matrix, damping: float = DAMPING) -> GramFactor:
        """Factor a Gram matrix.

        Channels that were never active (diagonal 0) are coupled to none and rounded to nearest.

        Args:
            gram: float32 [K, K], mean over tokens of x^T x.
            damping: Ridge relative to the mean of the diagonal, >= 0; to infinity: nearest.

        Raises:
            NonFiniteError: NaN or infinity in `gram`.
            CalibrationError: No damping makes `gram` definite: it is no Gram matrix.
        """
        triangle = _Triangle.of(gram, damping)
        return cls(gram, triangle.order, _feedback(triangle.upper), triangle.damping)


def channel_energies(gram: Matrix, damping: float = DAMPING) -> Doubles:
    """What a rounding error at each channel costs once all later channels have made up for it.

    GPTQ's loss of a row is the sum over channels of e_k^2 d_k, for the errors e that it leaves and
    these energies d: the pivots of H = R R^T, d = diag(R)^2, which are what is left of a channel's
    second moment when the later ones have explained what they can. (GPTQ is Babai's nearest plane
    algorithm: Chen et al. 2025, arXiv 2507.18553.)

    Args:
        gram: float32 [K, K], mean over tokens of x^T x.
        damping: As for `GramFactor.of`.

    Returns:
        float64 [K], >= 0, in the order of the weight's columns; 0 where a channel is never active.

    Raises:
        NonFiniteError: NaN or infinity in `gram`.
        CalibrationError: No damping makes `gram` definite: it is no Gram matrix.
    """
    triangle = _Triangle.of(gram, damping)
    energies = np.empty(len(gram))
    energies[triangle.order] = np.square(np.diagonal(triangle.upper))
    return np.where(np.diagonal(gram) > 0, energies, 0.0)


@dataclasses.dataclass(frozen=True)
class _Triangle:
    """H = R R^T in the order in which channels are rounded.

    Attributes:
        order: Channels in descending order of their second moment, int64 [K].
        upper: R, float64 [K, K].
        damping: What was used.
    """

    order: npt.NDArray[np.int64]
    upper: Doubles
    damping: float

    @classmethod
    def of(cls, gram: Matrix, damping: float) -> _Triangle:
        """With H turned round, J H J = L L^T: then R = J L J."""
        if not np.isfinite(gram).all():
            msg = "NaN or infinity in a Gram matrix; check the model's activations"
            raise NonFiniteError(msg)
        diagonal = np.diagonal(gram).astype(np.float64)
        order = np.argsort(-diagonal, kind="stable")
        ordered = gram[np.ix_(order, order)].astype(np.float64)
        dead = diagonal[order] <= 0
        ordered[dead] = ordered[:, dead] = 0
        mean = float(diagonal.mean()) if diagonal.max(initial=0.0) > 0 else 1.0
        ordered[dead, dead] = mean
        own = np.diagonal(ordered).copy()
        used = damping
        for _ in range(RETRIES):
            np.fill_diagonal(ordered, own + used * mean)
            try:
                lower = np.linalg.cholesky(ordered[::-1, ::-1])
            except np.linalg.LinAlgError:
                used = max(used, SMALLEST_RETRY) * 10
            else:
                return cls(order, lower[::-1, ::-1], used)
        msg = f"a Gram matrix is not positive definite even with damping {used:g}; calibrate again"
        raise CalibrationError(msg)


def round_gptq(weight: Matrix, grid: BlockGrid, fmt: BlockFormat, factor: GramFactor) -> Codes:
    """Round on fixed grids so that errors cancel on `factor.gram`.

    A row on which that fails gets its nearest codes: no row's loss d G d^T is above nearest's.

    Args:
        weight: Target, float32 [N, K]; may be shifted, and K may be ragged.
        grid: Levels, float32 [N, k_blocks].
        fmt: Levels' limits and the block size.
        factor: Of the activation that this weight meets.

    Returns:
        uint8 [N, k_blocks, block]; padding has its block's zero point.
    """
    codes = np.empty((*grid.scale.shape, fmt.block_size), np.uint8)
    for start in range(0, len(weight), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        part = grid.rows(rows)
        nearest = round_to_grid(to_blocks(weight[rows], fmt.block_size), part, fmt)
        compensated = _compensate(weight[rows], part, fmt, factor)
        codes[rows] = keep_better_rows(weight[rows], nearest, compensated, part, factor.gram)
    return codes


def keep_better_rows(
    weight: Matrix, base: Codes, candidate: Codes, grid: BlockGrid, gram: Matrix
) -> Codes:
    """`candidate` where it lowers a row's loss, else `base`: uint8 [N, k_blocks, block].

    With errors a, b of both: b G b^T - a G a^T = (b - a) G (b + a)^T, one product and no
    difference of large numbers.
    """
    base_error = weight_error(weight, base, grid)
    error = weight_error(weight, candidate, grid)
    product = (error - base_error) @ gram
    error += base_error
    change = np.einsum("nk,nk->n", product, error, optimize=False)
    return np.where((change < 0)[:, np.newaxis, np.newaxis], candidate, base)


def weight_error(weight: Matrix, codes: Codes, grid: BlockGrid) -> Matrix:
    """w^ - w, float32 [N, K]."""
    rows, columns = weight.shape
    error: Matrix = dequantize(codes, grid).reshape(rows, -1)[:, :columns] - weight
    return error


def _feedback(upper: Doubles) -> Matrix:
    """U_jk / U_jj of H^-1 = U^T U, transposed, for H = R R^T: U = R^-1; H is never inverted."""
    inverse = _invert_upper(upper)
    feedback = (inverse / np.diagonal(inverse)[:, np.newaxis]).T.astype(np.float32)
    np.fill_diagonal(feedback, 0)
    return np.ascontiguousarray(feedback)


def _invert_upper(upper: Doubles) -> Doubles:
    """Inverse of an upper triangle [n, n], by halves: numpy has no triangular solver.

    [[A, B], [0, D]]^-1 = [[A^-1, -A^-1 B D^-1], [0, D^-1]]: 2/3 n^3 operations, nearly all in
    products, where a general inverse takes 8/3 n^3.
    """
    size = len(upper)
    if size <= INVERT_WHOLE:
        return np.linalg.inv(upper)
    half = size // 2
    inverse = np.zeros_like(upper)
    inverse[:half, :half] = _invert_upper(upper[:half, :half])
    inverse[half:, half:] = _invert_upper(upper[half:, half:])
    inner = inverse[:half, :half] @ upper[:half, half:]
    np.negative(inner @ inverse[half:, half:], out=inverse[:half, half:])
    return inverse


def _compensate(weight: Matrix, grid: BlockGrid, fmt: BlockFormat, factor: GramFactor) -> Codes:
    """Plain GPTQ of some rows [N, K]; a channel is a contiguous row of N in here."""
    rows, columns = weight.shape
    scale, zero_point = np.ascontiguousarray(grid.scale.T), np.ascontiguousarray(grid.zero_point.T)
    inverse = np.float32(1) / scale
    lowest, highest = (np.float32(limit) for limit in code_limits(fmt))
    codes = np.repeat(zero_point, fmt.block_size, axis=0).astype(np.uint8)
    errors = np.empty((columns, rows), np.float32)
    code, taken = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for start in range(0, columns, LAZY_CHANNELS):
        stop = min(start + LAZY_CHANNELS, columns)
        lazy = np.ascontiguousarray(weight[:, factor.order[start:stop]].T)
        if start:
            lazy -= factor.feedback[start:stop, :start] @ errors[:start]
        for j in range(start, stop):
            target, channel = lazy[j - start], factor.order[j]
            if j > start:
                np.dot(factor.feedback[j, start:j], errors[start:j], out=taken)
                np.subtract(target, taken, out=target)
            block = channel // fmt.block_size
            np.multiply(target, inverse[block], out=code)
            np.add(code, zero_point[block], out=code)
            np.add(code, HALF, out=code)
            np.floor(code, out=code)
            np.maximum(code, lowest, out=code)  # np.clip takes twice as long
            np.minimum(code, highest, out=code)
            codes[channel] = code
            np.subtract(code, zero_point[block], out=code)
            np.multiply(code, scale[block], out=code)
            np.subtract(target, code, out=errors[j])
    blocks = codes.T.reshape(rows, -1, fmt.block_size)
    return np.ascontiguousarray(blocks)
