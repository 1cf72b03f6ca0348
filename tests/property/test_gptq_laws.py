"""Laws of error-compensating rounding, for every weight, Gram matrix and format."""

from __future__ import annotations

import dataclasses
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.config import BlockScales
from faq_onnx.quant.formats import CODE_BITS, block_format
from faq_onnx.quant.gptq import GramFactor, round_gptq
from faq_onnx.quant.refit import descend_codes, refit_scales
from faq_onnx.quant.uniform import BlockGrid, code_limits, dequantize, minmax_grid, to_blocks
from faq_onnx.quant.uniform import round_to_grid as nearest_codes

pytestmark = pytest.mark.property
FEW = settings(max_examples=40, deadline=None)
Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight [N, K] with its grids, and the Gram matrix of what it meets."""

    weight: Array
    fmt: BlockFormat
    grid: BlockGrid
    gram: Array
    scale_dtype: type[np.floating]

    @property
    def nearest(self) -> Codes:
        """Codes of round-to-nearest."""
        codes = nearest_codes(to_blocks(self.weight, self.fmt.block_size), self.grid, self.fmt)
        codes.flags.writeable = False
        return codes

    def losses(self, codes: Codes, grid: BlockGrid | None = None) -> npt.NDArray[np.float64]:
        """Loss d G d^T of each row, in float64."""
        whole = dequantize(codes, grid or self.grid).reshape(len(self.weight), -1)
        error = whole[:, : self.weight.shape[1]].astype(np.float64) - self.weight
        product = error @ self.gram.astype(np.float64)
        losses: npt.NDArray[np.float64] = np.einsum("nk,nk->n", product, error)
        return losses

    @property
    def slack(self) -> npt.NDArray[np.float64]:
        """Float32 doubt about a row's loss: K^2 terms, each no larger than the largest."""
        count = self.weight.shape[1]
        step = np.abs(self.grid.scale).max(axis=1).astype(np.float64)
        size = np.abs(self.weight).max(axis=1) + step * 2.0**self.fmt.code_bits
        doubt: npt.NDArray[np.float64] = count**2 * 2.0**-23 * size**2 * self.gram.max()
        return doubt


@st.composite
def cases(draw: st.DrawFn, *, bits: tuple[int, ...] = CODE_BITS) -> Case:
    """Weights with outliers; Gram matrices of few or many tokens, with dead and huge channels."""
    fmt = block_format(
        draw(st.sampled_from(bits)),
        draw(st.sampled_from([16, 32])),
        symmetric=draw(st.booleans()),
        block_scales=draw(st.sampled_from(get_args(BlockScales))),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 100))
    weight = rng.standard_t(3, size=(rows, columns)).astype(np.float32)
    mixing = rng.normal(size=(columns, columns)) * rng.lognormal(0, 2, size=columns)
    tokens = rng.normal(size=(draw(st.integers(1, 200)), columns)) @ mixing
    tokens[:, rng.random(columns) < draw(st.sampled_from([0.0, 0.3]))] = 0
    gram = (tokens.T @ tokens / len(tokens)).astype(np.float32)
    dtype: type[np.floating] = np.float16 if draw(st.booleans()) else np.float32
    grid = minmax_grid(to_blocks(weight, fmt.block_size), fmt, dtype)
    for array in (weight, gram, grid.scale, grid.zero_point):
        array.flags.writeable = False  # nothing may work in its input's memory
    return Case(weight, fmt, grid, gram, dtype)


@FEW
@given(cases(), st.sampled_from([0.0, 0.01, 1.0]))
def test_no_row_loses_more_than_nearest(case: Case, damping: float) -> None:
    codes = round_gptq(case.weight, case.grid, case.fmt, GramFactor.of(case.gram, damping))
    assert (case.losses(codes) <= case.losses(case.nearest) + case.slack).all()


@FEW
@given(cases(), st.booleans())
def test_channels_without_correlation_are_rounded_to_nearest(case: Case, same: bool) -> None:
    diagonal = np.ones(len(case.gram)) if same else np.diagonal(case.gram)
    factor = GramFactor.of(np.diag(diagonal).astype(np.float32), 0.01)
    codes = round_gptq(case.weight, case.grid, case.fmt, factor)
    np.testing.assert_array_equal(codes, case.nearest)


@FEW
@given(cases())
def test_endless_damping_is_nearest(case: Case) -> None:
    codes = round_gptq(case.weight, case.grid, case.fmt, GramFactor.of(case.gram, 1e12))
    np.testing.assert_array_equal(codes, case.nearest)


@FEW
@given(cases())
def test_codes_keep_to_their_limits_and_padding_to_the_zero_point(case: Case) -> None:
    codes = round_gptq(case.weight, case.grid, case.fmt, GramFactor.of(case.gram, 0.01))
    lowest, highest = code_limits(case.fmt)
    assert lowest <= codes.min() <= codes.max() <= highest
    flat = codes.reshape(len(codes), -1)[:, case.weight.shape[1] :]
    np.testing.assert_array_equal(flat, np.broadcast_to(case.grid.zero_point[:, -1:], flat.shape))


@FEW
@given(cases())
def test_the_same_input_gives_the_same_bytes(case: Case) -> None:
    first, second = (
        round_gptq(case.weight, case.grid, case.fmt, GramFactor.of(case.gram, 0.01)).tobytes()
        for _ in range(2)
    )
    assert first == second


@FEW
@given(cases(), st.booleans())
def test_new_scales_raise_no_row_and_can_be_stored(case: Case, compensate: bool) -> None:
    codes = case.nearest
    if compensate:
        codes = round_gptq(case.weight, case.grid, case.fmt, GramFactor.of(case.gram, 0.01))
    grid = refit_scales(case.weight, codes, case.grid, case.gram, case.scale_dtype)
    assert (case.losses(codes, grid) <= case.losses(codes) + case.slack).all()
    unit = grid.unit
    stored = grid.scale.astype(case.scale_dtype) if unit is None else unit.round(grid.scale)
    np.testing.assert_array_equal(grid.scale, stored)
    np.testing.assert_array_equal(np.sign(grid.scale), np.sign(case.grid.scale))
    np.testing.assert_array_equal(grid.zero_point, case.grid.zero_point)


@FEW
@given(cases(), st.booleans())
def test_descent_raises_no_row_and_keeps_to_the_levels(case: Case, compensate: bool) -> None:
    codes = case.nearest
    if compensate:
        codes = round_gptq(case.weight, case.grid, case.fmt, GramFactor.of(case.gram, 0.01))
    lower = descend_codes(case.weight, codes, case.grid, case.gram, case.fmt)
    assert (case.losses(lower) <= case.losses(codes) + case.slack).all()
    lowest, highest = code_limits(case.fmt)
    assert lowest <= lower.min() <= lower.max() <= highest
    flat, before = (c.reshape(len(c), -1)[:, case.weight.shape[1] :] for c in (lower, codes))
    np.testing.assert_array_equal(flat, before)


@FEW
@given(cases())
def test_descent_cannot_leave_nearest_without_correlation(case: Case) -> None:
    gram = np.eye(len(case.gram), dtype=np.float32)
    lower = descend_codes(case.weight, case.nearest, case.grid, gram, case.fmt)
    alone = dataclasses.replace(case, gram=gram)
    np.testing.assert_allclose(
        alone.losses(lower), alone.losses(case.nearest), atol=alone.slack.max()
    )


@FEW
@given(cases())
def test_refit_and_descent_give_the_same_bytes(case: Case) -> None:
    runs = [
        descend_codes(
            case.weight,
            case.nearest,
            refit_scales(case.weight, case.nearest, case.grid, case.gram),
            case.gram,
            case.fmt,
        ).tobytes()
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
