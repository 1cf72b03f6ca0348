"""Laws of BoA: what holds for every weight, format and pair of metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.quant.boa import round_boa
from faq_onnx.quant.formats import CODE_BITS, block_format
from faq_onnx.quant.gptq import GramFactor
from faq_onnx.quant.uniform import code_limits, dequantize, minmax_grid, round_to_grid, to_blocks

pytestmark = pytest.mark.property
HeadLosses = Callable[..., npt.NDArray[np.float64]]
FEW = settings(max_examples=60, deadline=None)
FORMATS = st.builds(block_format, st.sampled_from(CODE_BITS), st.just(16), symmetric=st.booleans())


def _gram(rng: np.random.Generator, size: int, rank: int) -> npt.NDArray[np.float32]:
    """Of any rank, with channels of very different size; some never active."""
    x = rng.normal(size=(rank, size)) * np.exp2(3 * rng.normal(size=size))
    x[:, rng.random(size) < 0.1] = 0
    return (x.T @ x / rank).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and the seed of what fills them."""

    heads: int
    size: int
    columns: int
    step: int
    shared: bool
    seed: int


CASES = st.builds(
    Case,
    heads=st.integers(1, 3),
    size=st.integers(1, 6),
    columns=st.integers(1, 40),
    step=st.integers(1, 8),
    shared=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


@FEW
@given(FORMATS, CASES)
def test_no_head_loses_more_than_nearest(
    head_losses: HeadLosses, fmt: BlockFormat, case: Case
) -> None:
    heads, size, columns = case.heads, case.size, case.columns
    rng = np.random.default_rng(case.seed)
    weight = rng.normal(size=(heads * size, columns)).astype(np.float32)
    blocks = to_blocks(weight, 16)
    grid = minmax_grid(blocks, fmt)
    rank = int(rng.integers(1, 50))
    count = 1 if case.shared else heads
    grams = np.stack([_gram(rng, columns, rank) for _ in range(count)])
    gram_out = np.stack([_gram(rng, size, int(rng.integers(1, 9))) for _ in range(heads)])
    factors = [GramFactor.of(gram, 0.01) for gram in grams]
    found, again = (
        round_boa(weight, grid, fmt, factors, gram_out, rows_per_step=case.step) for _ in range(2)
    )
    assert np.array_equal(found, again)
    assert found.dtype == np.uint8
    lowest, highest = code_limits(fmt)
    assert found.min() >= lowest
    assert found.max() <= highest

    def error(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        values = dequantize(codes, grid).reshape(len(weight), -1)[:, :columns]
        return values.astype(np.float64) - weight

    nearest, own = error(round_to_grid(blocks, grid, fmt)), error(found)
    # the choice compares float32 sums of columns + size terms of either sign
    terms = head_losses(abs(nearest) + abs(own), np.abs(grams), abs(gram_out))
    slack = (columns + size) * 2.0**-23 * terms
    assert (
        head_losses(own, grams, gram_out) <= head_losses(nearest, grams, gram_out) + slack
    ).all()
