"""Search each block's scale and zero point for the least output error of that block.

The error of a block is d G_b d^T, d = w^ - w and G_b its part of the diagonal of the Gram matrix:
algorithms.md 3.3 (the "Hessian" grid) and 5.5 (clipping both ends, without training).
A grid is searched as (scale, zero point) rather than as its two ends: zero points are integers, so
few of them fit a scale, and all of them share one rounding of w / scale. Against a 24 x 24 search
over both ends times floor and ceil (1152 grids), the 46 grids tried here end within 0.8 % of its
error on SmolLM2's weights. The whole G_b counts: on its diagonal alone the error is higher.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.quant.objective import block_errors
from faq_onnx.quant.stored_scales import storable_scale
from faq_onnx.quant.uniform import (
    BlockGrid,
    fake_quantize,
    minmax_grid,
)

__all__ = ["search_grid"]

Floats = npt.NDArray[np.float32]

CHUNK_ELEMENTS = 1 << 15  # 128 KB: weights and three temporaries stay in the second-level cache
ROWS_AT_A_TIME = 512  # for the last judgement, as in quant.clip
# Coarse scales, as parts of the one that covers the block: from WIDEST down. Fewer levels gain
# more from clipping.
WIDEST = 1.05
COARSE_POINTS, NARROWEST = 14, {2: 0.3, 3: 0.3, 4: 0.4, 8: 0.95}
SYMMETRIC_POINTS, SYMMETRIC_NARROWEST = 24, {2: 0.2, 3: 0.25, 4: 0.4, 8: 0.95}
# Then steps from the best scale, in coarse spacings; the fourth looks further away again. The
# zero point moves before the first two.
REFINEMENTS = (0.5, 0.25, 0.12, 0.4, 0.06)
ZERO_MOVES = 2


def search_grid(
    blocks: Floats,
    grams: Floats,
    fmt: BlockFormat,
    scale_dtype: npt.DTypeLike = np.float32,
    *,
    refine: bool = True,
) -> BlockGrid:
    """Grid of the least d G_b d^T found; the min-max grid where nothing beats it.

    Args:
        blocks: float32 [N, k_blocks, block], zero-padded at a ragged end.
        grams: Diagonal blocks of the Gram matrix, float32 [k_blocks, block, block].
        fmt: Levels; a symmetric format searches size and sign of the scale only.
        scale_dtype: Dtype in which scales are stored: they are rounded before they are judged.
        refine: Refine around the best coarse candidate.
    """
    plain = minmax_grid(blocks, fmt, scale_dtype)
    scale, zero_point = np.empty_like(plain.scale), np.empty_like(plain.zero_point)
    step = max(1, CHUNK_ELEMENTS // blocks.shape[-1])
    together = max(1, step // len(blocks))  # of few rows, or numpy's calls would take the time
    buffers = _Buffers.of(together * blocks.shape[-1] * min(step, len(blocks)))
    for first in range(0, blocks.shape[1], together):
        columns = slice(first, first + together)
        for start in range(0, len(blocks), step):
            rows = slice(start, start + step)
            unit = None if plain.unit is None else plain.unit.rows(rows)
            store = functools.partial(storable_scale, scale_dtype=scale_dtype, unit=unit)
            trial = _Trial(blocks[rows, columns], grams[columns], fmt, store, buffers)
            _search(trial, fmt, refine=refine)
            scale[rows, columns] = trial.best_scale.T
            zero_point[rows, columns] = trial.best_zero.T
    found = _as_stored(BlockGrid(scale, zero_point), fmt)
    return _better(blocks, grams, fmt, plain, found)


@dataclasses.dataclass(frozen=True)
class _Buffers:
    """Temporaries float32 [block columns, block, rows], used again by every chunk."""

    weights: Floats
    levels: Floats
    rounded: Floats
    error: Floats
    product: Floats

    @classmethod
    def of(cls, elements: int) -> _Buffers:
        """Flat room for chunks of up to that many weights."""
        return cls(*(np.empty(elements, np.float32) for _ in dataclasses.fields(cls)))

    def view(self, shape: tuple[int, int, int]) -> _Buffers:
        """The beginning of each in that shape, contiguous."""
        elements = math.prod(shape)
        return _Buffers(
            *(
                getattr(self, field.name)[:elements].reshape(shape)
                for field in dataclasses.fields(self)
            )
        )


class _Trial:
    """The best grid so far of some rows of some block columns, and how to try another.

    Codes count from 0; a symmetric format is the asymmetric one whose zero point is the middle
    (positive scale) or the level below it (negative scale).

    Attributes:
        base: Scale that covers the whole block with one of the two zero points, float32
            [block columns, rows], as all that is one number a block.
        zero: The lower of the two zero points that suit `base`.
        best_scale: Positive, storable.
        best_zero: Integer-valued.
    """

    def __init__(
        self,
        blocks: Floats,
        grams: Floats,
        fmt: BlockFormat,
        store: Callable[[Floats], Floats],
        buffers: _Buffers,
    ) -> None:
        rows, columns, block = blocks.shape
        self._buffers = buffers.view((columns, block, rows))
        self._grams = grams
        self._store = store
        self._highest = np.float32((1 << fmt.code_bits) - 1)
        self._lowest_zero, self._highest_zero = np.float32(0), self._highest
        weights = self._buffers.weights
        np.copyto(weights, blocks.transpose(1, 2, 0))
        low = np.minimum.reduce(weights, axis=1, initial=0.0)
        high = np.maximum.reduce(weights, axis=1, initial=0.0)
        if fmt.symmetric:
            half = np.float32(1 << (fmt.code_bits - 1))
            only_positive = fmt.block_scales == "lpbq"
            self._lowest_zero = half if only_positive else half - 1
            self._highest_zero = half
            self.base = _off_zero(np.maximum(-low, high) / (half - 1))
            self.zero = np.full(low.shape, half - 1, np.float32)
        else:
            self.base = _off_zero((high - low) / self._highest)
            self.zero = np.floor(-low / self.base)
        self._scale = self.base
        self._best_error = np.full(low.shape, np.inf, np.float32)
        self.best_scale, self.best_zero = self.base.copy(), self.zero.copy()

    def set_scale(self, scale: Floats) -> None:
        """Round the weights on `scale` (> 0), for the zero points that follow."""
        self._scale = self._store(scale.T).T
        inverse = (np.float32(1) / self._scale)[:, np.newaxis]
        np.multiply(self._buffers.weights, inverse, out=self._buffers.levels)
        np.rint(self._buffers.levels, out=self._buffers.rounded)

    def try_zero(self, zero: Floats) -> None:
        """Judge the current scale with this zero point (clipped to what can be stored)."""
        zero = np.clip(zero, self._lowest_zero, self._highest_zero)
        error, product = self._buffers.error, self._buffers.product
        np.maximum(self._buffers.rounded, -zero[:, np.newaxis], out=error)
        np.minimum(error, (self._highest - zero)[:, np.newaxis], out=error)
        np.subtract(error, self._buffers.levels, out=error)
        np.matmul(self._grams, error, out=product)
        np.multiply(product, error, out=product)
        errors = np.add.reduce(product, axis=1)
        errors *= self._scale * self._scale
        better = errors < self._best_error
        np.copyto(self._best_error, errors, where=better)
        np.copyto(self.best_scale, self._scale, where=better)
        np.copyto(self.best_zero, zero, where=better)

    def try_scale(self, scale: Floats, zero: Floats) -> None:
        """Judge a scale with the zero points `zero` and `zero` + 1."""
        self.set_scale(scale)
        self.try_zero(zero)
        self.try_zero(zero + np.float32(1))

    def move_zero(self) -> None:
        """Move the best zero point by one; the lower or the upper end of the range stays."""
        scale, zero = self.best_scale.copy(), self.best_zero.copy()
        for step in (-1, 1):
            moved = np.clip(zero + np.float32(step), self._lowest_zero, self._highest_zero)
            self.set_scale(scale * _ratio(zero, moved))
            self.try_zero(moved)
            self.set_scale(scale * _ratio(self._highest - zero, self._highest - moved))
            self.try_zero(moved)

    def move_scale(self, step: float) -> None:
        """Make the best scale smaller and larger by the factor 1 -+ `step`."""
        scale, zero = self.best_scale.copy(), self.best_zero.copy()
        for factor in (1 - step, 1 + step):
            self.set_scale(scale * np.float32(factor))
            self.try_zero(zero)


def _search(trial: _Trial, fmt: BlockFormat, *, refine: bool) -> None:
    narrowest = SYMMETRIC_NARROWEST if fmt.symmetric else NARROWEST
    points = SYMMETRIC_POINTS if fmt.symmetric else COARSE_POINTS
    shrinks = np.linspace(WIDEST, narrowest[fmt.code_bits], points, dtype=np.float32)
    for shrink in shrinks:
        trial.try_scale(trial.base * shrink, trial.zero)
    if not refine:
        return
    spacing = float(shrinks[0] - shrinks[1])
    for index, part in enumerate(REFINEMENTS):
        if index < ZERO_MOVES and not fmt.symmetric:
            trial.move_zero()
        trial.move_scale(part * spacing)


def _as_stored(grid: BlockGrid, fmt: BlockFormat) -> BlockGrid:
    """Grid as a format stores it: symmetric ones have one zero point and signed scales."""
    if not fmt.symmetric:
        return grid
    half = np.float32(1 << (fmt.code_bits - 1))
    middle = np.full_like(grid.zero_point, 1 << (fmt.storage_bits - 1))
    return BlockGrid(np.where(grid.zero_point == half, grid.scale, -grid.scale), middle)


def _better(
    blocks: Floats, grams: Floats, fmt: BlockFormat, plain: BlockGrid, found: BlockGrid
) -> BlockGrid:
    """Of each block's two grids the one with the lower error of the codes it will get.

    The search rounds halves to even, and weights of few bits have many halves.
    """
    scale, zero_point = plain.scale.copy(), plain.zero_point.copy()
    for start in range(0, len(blocks), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        before, after = (_errors(blocks[rows], grams, fmt, g.rows(rows)) for g in (plain, found))
        better = after < before
        np.copyto(scale[rows], found.scale[rows], where=better)
        np.copyto(zero_point[rows], found.zero_point[rows], where=better)
    return BlockGrid(scale, zero_point, plain.unit)


def _errors(blocks: Floats, grams: Floats, fmt: BlockFormat, grid: BlockGrid) -> Floats:
    delta = fake_quantize(blocks, fmt, grid=grid)
    delta -= blocks
    return block_errors(delta, grams)


def _off_zero(scale: Floats) -> Floats:
    result: Floats = np.where(scale > 0, scale, np.float32(1))
    return result


def _ratio(before: Floats, after: Floats) -> Floats:
    """Quotient before / after, 1 where there is no range on this side of zero."""
    usable = (before > 0) & (after > 0)
    result: Floats = np.where(usable, before / np.maximum(after, np.float32(1)), np.float32(1))
    return result
