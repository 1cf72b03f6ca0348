"""Laws of grid searches, for every weight, format and Gram matrix."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.config import BlockScales
from faq_onnx.quant.clip import clip_grid
from faq_onnx.quant.data_free import hqq_grid, k_quant_grid
from faq_onnx.quant.formats import CODE_BITS, block_format
from faq_onnx.quant.grid import search_grid
from faq_onnx.quant.objective import block_grams
from faq_onnx.quant.stored_scales import storable_scale
from faq_onnx.quant.uniform import (
    BlockGrid,
    dequantize,
    minmax_grid,
    round_to_grid,
    to_blocks,
)

Array = npt.NDArray[np.float32]

pytestmark = pytest.mark.property
FEW = settings(max_examples=40, deadline=None)
FORMATS = st.builds(
    block_format,
    st.sampled_from(CODE_BITS),
    st.sampled_from((16, 32)),
    symmetric=st.booleans(),
    block_scales=st.sampled_from(get_args(BlockScales)),
)
METHODS = st.sampled_from(["clip", "search", "hqq", "k-quant"])
DTYPES = st.sampled_from([np.float16, np.float32])


@st.composite
def sites(draw: st.DrawFn) -> tuple[Array, Array]:
    """A weight [N, K] with heavy tails, zero and one-sided rows, and a Gram matrix [K, K]."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns = draw(st.integers(3, 8)), draw(st.integers(1, 80))
    weight = rng.standard_t(3, (rows, columns)) * draw(st.sampled_from([1e-3, 1.0, 100.0]))
    weight[0] = 0
    weight[1] = np.abs(weight[1])
    if draw(st.booleans()):  # few significant bits: many ties
        weight = np.round(weight * 4) / 4
    tokens = rng.normal(size=(draw(st.sampled_from([1, 4, 100])), columns))
    tokens *= np.exp2(rng.normal(size=columns))
    tokens[:, ::7] = 0  # dead channels
    gram = tokens.T @ tokens / len(tokens)
    return weight.astype(np.float32), gram.astype(np.float32)


def _errors(blocks: Array, grid: BlockGrid, grams: Array, fmt: BlockFormat) -> Array:
    """Each block's d G_b d^T in float64, [N, k_blocks]."""
    delta = dequantize(round_to_grid(blocks, grid, fmt), grid).astype(np.float64) - blocks
    errors: Array = np.einsum("nbi,bij,nbj->nb", delta, grams.astype(np.float64), delta)
    return errors


def _slack(blocks: Array, grid: BlockGrid, grams: Array, fmt: BlockFormat) -> Array:
    """What float32 sums may hide: block**2 terms, each of at most |d| |G_b| |d|^T."""
    delta = np.abs(dequantize(round_to_grid(blocks, grid, fmt), grid) - blocks)
    size: Array = np.einsum("nbi,bij,nbj->nb", delta, np.abs(grams), delta)
    return size * np.float32(2 * blocks.shape[-1] * 2.0**-24)


@FEW
@given(sites(), FORMATS, DTYPES)
def test_no_block_is_worse_than_min_max(
    site: tuple[Array, Array], fmt: BlockFormat, dtype: npt.DTypeLike
) -> None:
    blocks, grams = to_blocks(site[0], fmt.block_size), block_grams(site[1], fmt.block_size)
    plain = minmax_grid(blocks, fmt, dtype)
    found = search_grid(blocks, grams, fmt, dtype)
    before, after = (_errors(blocks, g, grams, fmt) for g in (plain, found))
    assert (after <= before + 2 * _slack(blocks, plain, grams, fmt)).all()


def _without_ties(blocks: Array, grid: BlockGrid) -> npt.NDArray[np.bool_]:
    """Blocks where no weight is half-way between two levels, float32 rounding included.

    The search rounds halves to even, round_to_grid rounds them up.
    """
    levels = blocks / grid.scale[..., np.newaxis]
    distance: Array = np.abs(levels - np.floor(levels) - np.float32(0.5))
    clear: npt.NDArray[np.bool_] = np.min(distance, axis=-1) > 2.0**-15
    return clear


@FEW
@given(sites(), FORMATS)
def test_refining_does_not_lose(site: tuple[Array, Array], fmt: BlockFormat) -> None:
    blocks, grams = to_blocks(site[0], fmt.block_size), block_grams(site[1], fmt.block_size)
    coarse = search_grid(blocks, grams, fmt, refine=False)
    fine = search_grid(blocks, grams, fmt)
    before, after = (_errors(blocks, g, grams, fmt) for g in (coarse, fine))
    clear = _without_ties(blocks, coarse) & _without_ties(blocks, fine)
    assert (after <= before + 2 * _slack(blocks, coarse, grams, fmt))[clear].all()


def _find(method: str, site: tuple[Array, Array], fmt: BlockFormat, dtype: Any) -> BlockGrid:
    blocks = to_blocks(site[0], fmt.block_size)
    if method == "hqq":
        return hqq_grid(blocks, fmt, dtype)
    if method == "k-quant":
        return k_quant_grid(blocks, fmt, dtype)
    grams = block_grams(site[1], fmt.block_size)
    find = clip_grid if method == "clip" else search_grid
    return find(blocks, grams, fmt, dtype)


@FEW
@given(METHODS, sites(), FORMATS, DTYPES)
def test_grids_can_be_stored(
    method: str, site: tuple[Array, Array], fmt: BlockFormat, dtype: npt.DTypeLike
) -> None:
    assume(not (method == "hqq" and fmt.symmetric))
    grid = _find(method, site, fmt, dtype)
    assert grid.scale.dtype == grid.zero_point.dtype == np.float32
    assert np.array_equal(storable_scale(grid.scale, dtype, grid.unit), grid.scale)
    assert np.isfinite(grid.scale).all()
    assert (grid.scale != 0).all()
    if fmt.symmetric:
        assert (grid.zero_point == 1 << (fmt.storage_bits - 1)).all()
    else:
        assert (grid.scale > 0).all()
        assert np.array_equal(grid.zero_point, np.floor(grid.zero_point))
        assert grid.zero_point.min() >= 0
        assert grid.zero_point.max() < 1 << fmt.code_bits


@FEW
@given(METHODS, sites(), FORMATS, DTYPES)
def test_zero_blocks_stay_zero(
    method: str, site: tuple[Array, Array], fmt: BlockFormat, dtype: npt.DTypeLike
) -> None:
    assume(not (method == "hqq" and fmt.symmetric))
    grid = _find(method, site, fmt, dtype)
    blocks = to_blocks(site[0], fmt.block_size)
    assert not dequantize(round_to_grid(blocks, grid, fmt), grid)[0].any()


@FEW
@given(METHODS, sites(), FORMATS)
def test_the_same_bytes_twice(method: str, site: tuple[Array, Array], fmt: BlockFormat) -> None:
    assume(not (method == "hqq" and fmt.symmetric))
    found, again = (_find(method, site, fmt, np.float32) for _ in range(2))
    assert found.scale.tobytes() == again.scale.tobytes()
    assert found.zero_point.tobytes() == again.zero_point.tobytes()


@FEW
@given(sites(), FORMATS.filter(lambda fmt: fmt.block_scales == "float"))
def test_k_quants_are_never_worse_by_their_own_weights(
    site: tuple[Array, Array], fmt: BlockFormat
) -> None:
    blocks = to_blocks(site[0], fmt.block_size)
    grids = minmax_grid(blocks, fmt), k_quant_grid(blocks, fmt)
    squares = np.square(blocks)
    weights = np.sqrt(np.mean(squares, axis=-1, keepdims=True)) + np.abs(blocks)
    before, after = (
        np.sum(weights * np.square(dequantize(round_to_grid(blocks, g, fmt), g) - blocks), axis=-1)
        for g in grids
    )
    # what float32 loses in sum w^2 and sum w x c, whose difference the symmetric fit looks at
    lost = 4 * fmt.block_size * 2.0**-24 * np.sum(weights * squares, axis=-1)
    assert (after <= before + lost).all()


@FEW
@given(sites(), FORMATS)
def test_padding_has_no_say(site: tuple[Array, Array], fmt: BlockFormat) -> None:
    """What stands in the Gram matrix for the padded channels does not matter."""
    blocks, grams = to_blocks(site[0], fmt.block_size), block_grams(site[1], fmt.block_size)
    missing = blocks.shape[1] * fmt.block_size - site[0].shape[1]
    other = grams.copy()
    if missing:
        other[-1, -missing:, -missing:] = np.eye(missing, dtype=np.float32)
    found, again = (search_grid(blocks, g, fmt) for g in (grams, other))
    np.testing.assert_array_equal(found.scale, again.scale)
    np.testing.assert_array_equal(found.zero_point, again.zero_point)


@FEW
@given(sites(), FORMATS, st.permutations(range(3)))
def test_rows_are_searched_alone(
    site: tuple[Array, Array], fmt: BlockFormat, order: list[int]
) -> None:
    """Equal up to float32 sums: a BLAS may add up the last rows of a product in another order."""
    blocks, grams = to_blocks(site[0], fmt.block_size), block_grams(site[1], fmt.block_size)
    found = search_grid(blocks, grams, fmt)
    permuted = search_grid(np.ascontiguousarray(blocks[order]), grams, fmt)
    before = _errors(blocks, found, grams, fmt)[order]
    after = _errors(blocks[order], permuted, grams, fmt)
    clear = _without_ties(blocks[order], permuted) & _without_ties(blocks, found)[order]
    slack = 2 * _slack(blocks, found, grams, fmt)[order]
    assert (np.abs(after - before) <= slack)[clear].all()
