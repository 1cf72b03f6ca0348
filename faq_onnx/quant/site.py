"""Turn one weight into its low-bit form, as its plan says."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat, SitePlan
from faq_onnx.artifacts.weights import QuantizedWeight
from faq_onnx.errors import PlanError
from faq_onnx.quant.boa import round_boa
from faq_onnx.quant.clip import clip_grid
from faq_onnx.quant.data_free import hqq_grid, k_quant_grid
from faq_onnx.quant.gptq import GramFactor, round_gptq, weight_error
from faq_onnx.quant.grid import search_grid
from faq_onnx.quant.objective import block_grams, output_energy
from faq_onnx.quant.refit import descend_codes, refit_scales
from faq_onnx.quant.shrinkage import shrinkage_of
from faq_onnx.quant.threads import map_in_threads, one_blas_thread
from faq_onnx.quant.uniform import (
    BlockGrid,
    minmax_grid,
    round_to_grid,
    to_blocks,
    to_quantized_weight,
)

__all__ = [
    "QuantizedSite",
    "SiteMoments",
    "looks_at_activations",
    "quantize_weight",
    "rtn_digest",
]

Array = npt.NDArray[np.float32]

# Rows are quantized in pieces, which threads take from a common heap. What a piece is does not
# depend on the threads: BLAS may take the last rows of a product by another kernel (on AVX2 the
# last eight, whatever their number), so where a piece ends is seen in the last digit.
ROWS_AT_A_TIME = 512  # and a head of 150,000 rows would otherwise need gigabytes of temporaries
ONE_PIECE = 128  # as many rows or fewer: a second thread would wait more than work
# Of descent and refit behind GPTQ. SmolLM2, 4-bit 32: the loss of a gate and of a down_proj
# falls to 0.947 and 0.962 after one, 0.929 and 0.948, 0.920 and 0.942, 0.915 and 0.939.
SWEEPS = 2


@dataclasses.dataclass(frozen=True)
class SiteMoments:
    """What grids and rounding look at. What is derived from it is made once, for all rows.

    Attributes:
        gram: E[x^T x] of the activations that the weight will meet, float32 [K, K].
        shrinkage: Share of what lies off the diagonal that grids and rounding do not believe.
    """

    gram: Array
    shrinkage: float = 0.0

    @classmethod
    def of_text(cls, gram: Array, tokens: int, shrinkage: float | None = None) -> SiteMoments:
        """Of the text that was seen: by default shrunk as it is short.

        Args:
            gram: Mean over the text of x^T x, float32 [K, K].
            tokens: Of the text.
            shrinkage: None: what so few tokens per channel ask for.
        """
        share = shrinkage_of(tokens, len(gram)) if shrinkage is None else shrinkage
        return cls(gram, share)

    @functools.cached_property
    def shrunk(self) -> Array:
        """(1 - shrinkage) G + shrinkage diag(G), float32 [K, K].

        Directions in which one text hardly varies vary more in another, and rounding puts its
        errors into them. A diagonal target keeps what every channel weighs (Ledoit and Wolf 2004
        shrink to a multiple of the identity).
        """
        shrunk = self.gram * np.float32(1 - self.shrinkage)
        np.fill_diagonal(shrunk, np.diagonal(self.gram))
        return shrunk

    @functools.cached_property
    def factor(self) -> GramFactor:
        """For GPTQ."""
        return GramFactor.of(self.shrunk)

    def block_grams(self, block_size: int) -> Array:
        """Diagonal blocks, float32 [k_blocks, block, block]."""
        return block_grams(self.shrunk, block_size)


@dataclasses.dataclass(frozen=True)
class QuantizedSite:
    """A low-bit weight and what it costs.

    Attributes:
        weight: Packed.
        codes_digest: Sha256 that stands for all codes; equal digests, equal codes.
        sqnr_db: 10 log10(E|y|^2 / E|y_q - y|^2), of outputs where a Gram matrix was given, else
            of weights.
        shrinkage: Of the Gram matrix that grid and rounding saw; None where they saw none.
    """

    weight: QuantizedWeight
    codes_digest: str
    sqnr_db: float
    shrinkage: float | None = None


def quantize_weight(  # noqa: PLR0913 - what to round, how, and against what
    weight: Array,
    plan: SitePlan,
    moments: SiteMoments | Sequence[SiteMoments] | None = None,
    *,
    target: Array | None = None,
    row_metric: npt.NDArray[np.float64] | None = None,
    scale_dtype: npt.DTypeLike = np.float32,
    workers: int = 1,
) -> QuantizedSite:
    """Quantize one weight.

    Args:
        weight: float32 [N, K], channel scales already multiplied in.
        plan: Format, grid and rounding.
        moments: Of the activations that this weight will meet; several for as many equal shares
            of its rows (heads). Without them grid and rounding must not need any.
        target: What to round instead of the weight itself, float32 [N, K]: shifted to make up for
            errors that came before.
        row_metric: How errors of a head's outputs count, H_out [heads, d, d]: GPTQ then lets the
            rows of a head make up for each other (BoA).
        scale_dtype: Dtype in which scales are stored: that of the model's activations.
        workers: Threads; rows are shared out among them.

    Raises:
        PlanError: The plan looks at activations, and there are no moments.
    """
    assert plan.format is not None
    if moments is None and looks_at_activations(plan):
        msg = (
            f"{plan.site}: grid {plan.grid} with rounding {plan.rounding} needs the statistics of "
            "its activations; calibrate, or choose --grid minmax --rounding nearest"
        )
        raise PlanError(msg)

    wished = weight if target is None else target

    def quantize(share: _Share) -> _Rows:
        own, goal = weight[share.rows], wished[share.rows]
        return _quantize_rows(own, goal, plan, share.moments, share.metric, scale_dtype)

    shares = _shares(len(weight), moments, row_metric)
    if workers > 1:
        pieces = list(map_in_threads(quantize, shares))
    else:
        with one_blas_thread():
            pieces = [quantize(share) for share in shares]
    signal = sum(piece.signal for piece in pieces)
    noise = sum(piece.noise for piece in pieces)
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.codes)
    seen = shares[0].moments if looks_at_activations(plan) else None
    return QuantizedSite(
        _join([p.weight for p in pieces]),
        digest.hexdigest(),
        _db(signal, noise),
        None if seen is None else seen.shrinkage,
    )


class _Share(NamedTuple):
    """Rows that are quantized together, and what their errors meet."""

    rows: slice
    moments: SiteMoments | None
    metric: npt.NDArray[np.float64] | None


def _shares(
    rows: int,
    moments: SiteMoments | Sequence[SiteMoments] | None,
    metric: npt.NDArray[np.float64] | None,
) -> list[_Share]:
    """Heads are never divided, where there are any."""
    if isinstance(moments, Sequence):
        size = _head_size(rows, len(moments))
        return [
            _Share(
                slice(i * size, (i + 1) * size), own, None if metric is None else metric[i : i + 1]
            )
            for i, own in enumerate(moments)
        ]
    if metric is None:
        return [_Share(share, moments, None) for share in row_shares(rows)]
    size = _head_size(rows, len(metric))
    return [
        _Share(share, moments, metric[share.start // size : share.stop // size])
        for share in row_shares(rows, size)
    ]


def _head_size(rows: int, heads: int) -> int:
    size, rest = divmod(rows, heads)
    if rest:
        msg = f"{rows} rows cannot be shared out equally among {heads} heads"
        raise ValueError(msg)
    return size


def row_shares(rows: int, head_size: int = 1) -> list[slice]:
    """Rows that are quantized together: an even number of like pieces, for two threads or more.

    Args:
        rows: Of the weight, whole heads.
        head_size: Rows that are never divided.
    """
    heads = rows // head_size
    pieces = 1 if rows <= ONE_PIECE else min(heads, 2 * -(-rows // (2 * ROWS_AT_A_TIME)))
    bounds = [heads * i // pieces * head_size for i in range(pieces + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def looks_at_activations(plan: SitePlan) -> bool:
    """Whether a site's grid or rounding is judged on activations."""
    judged = plan.grid in {"clip", "search"} or plan.rounding == "gptq"
    return plan.format is not None and judged


def rtn_digest(weight: Array, fmt: BlockFormat, scale_dtype: npt.DTypeLike) -> str:
    """`QuantizedSite.codes_digest` of plain round-to-nearest: did a method change anything?"""
    plain = SitePlan(site="", format=fmt)
    return quantize_weight(weight, plain, scale_dtype=scale_dtype).codes_digest


@dataclasses.dataclass(frozen=True)
class _Rows:
    weight: QuantizedWeight
    codes: bytes
    signal: float
    noise: float


def _quantize_rows(  # noqa: PLR0913, PLR0917 - what to round, how, and against what
    weight: Array,
    target: Array,
    plan: SitePlan,
    moments: SiteMoments | None,
    metric: npt.NDArray[np.float64] | None,
    scale_dtype: npt.DTypeLike,
) -> _Rows:
    """Some rows [n, K]: they do not depend on each other, and temporaries stay small."""
    fmt = plan.format
    assert fmt is not None
    grid = _find_grid(target, plan, moments, scale_dtype)
    if plan.rounding == "gptq" and moments is not None and metric is not None:
        codes = round_boa(target, grid, fmt, moments.factor, metric)
    elif plan.rounding == "gptq" and moments is not None:
        codes = round_gptq(target, grid, fmt, moments.factor)
        grid = refit_scales(target, codes, grid, moments.shrunk, scale_dtype)
        for _ in range(SWEEPS):
            codes = descend_codes(target, codes, grid, moments.shrunk, fmt)
            grid = refit_scales(target, codes, grid, moments.shrunk, scale_dtype)
    else:
        codes = round_to_grid(to_blocks(target, fmt.block_size), grid, fmt)
    packed = to_quantized_weight(codes, grid, fmt, weight.shape[1], scale_dtype)
    delta = weight_error(weight, codes, grid)
    gram = None if moments is None else moments.gram
    return _Rows(packed, codes.tobytes(), _energy(weight, gram), _energy(delta, gram))


def _find_grid(
    weight: Array, plan: SitePlan, moments: SiteMoments | None, scale_dtype: npt.DTypeLike
) -> BlockGrid:
    fmt = plan.format
    assert fmt is not None
    blocks = to_blocks(weight, fmt.block_size)
    if plan.grid == "hqq":
        return hqq_grid(blocks, fmt, scale_dtype)
    if plan.grid == "k-quant":
        return k_quant_grid(blocks, fmt, scale_dtype)
    if plan.grid == "minmax" or moments is None:
        return minmax_grid(blocks, fmt, scale_dtype)
    grams = moments.block_grams(fmt.block_size)
    find = clip_grid if plan.grid == "clip" else search_grid
    return find(blocks, grams, fmt, scale_dtype)


def _energy(matrix: Array, gram: Array | None) -> float:
    if gram is None:
        return float(np.vdot(matrix, matrix))
    return output_energy(matrix, gram)


def _join(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    if len(weights) == 1:
        return weights[0]
    zero_points = [w.zero_points for w in weights if w.zero_points is not None]
    units = [w.scale_unit for w in weights if w.scale_unit is not None]
    return dataclasses.replace(
        weights[0],
        out_features=sum(w.out_features for w in weights),
        packed=np.concatenate([w.packed for w in weights]),
        scales=np.concatenate([w.scales for w in weights]),
        zero_points=np.concatenate(zero_points) if zero_points else None,
        scale_unit=np.concatenate(units) if units else None,
    )


def _db(signal: float, noise: float) -> float:
    if noise <= 0 or signal <= 0:
        return math.inf if signal > 0 else 0.0
    return 10 * math.log10(signal / noise)
