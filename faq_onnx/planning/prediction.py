"""The KL that a format of a weight will cost, from what a coarse rounding of it was measured to.

    predicted KL of a format = c_site * err_site(format),   c_site = KL_site / err_site, measured
err is the output-error energy sum_n d_n G d_n^T of the site's own rounding, so a method that
rounds better at few bits gets more of them; of a table, it is |d|^2 per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat, SitePlan
from faq_onnx.artifacts.sensitivity import Perturbation
from faq_onnx.artifacts.sites import EmbeddingSite, LinearSite, ModelCensus
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.planning.budget import BudgetItem, Candidate, scale_bytes_of, scale_dtype_of
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.objective import output_energy
from faq_onnx.quant.site import SiteMoments, quantize_weight
from faq_onnx.quant.uniform import dequantize_weight, fake_quantize, quantize_rtn, to_blocks

__all__ = ["COARSE", "COARSE_NAME", "CoarseRounding", "KLPredictor", "ReadTable", "ReadWeight"]

Array = npt.NDArray[np.float32]
ReadWeight = Callable[[LinearSite], Array]
ReadTable = Callable[[EmbeddingSite], Array]

COARSE = block_format(3, 32, symmetric=False)
COARSE_NAME = "round-to-nearest, 3 bits, blocks of 32, zero points"
# Rows that stand for a weight: all its candidates are judged on the same ones.
SAMPLE_ROWS = 128
PLAIN = MappingProxyType({"grid": "minmax", "rounding": "nearest"})
ROWS_AT_A_TIME = 4096


@dataclasses.dataclass(frozen=True)
class CoarseRounding:
    """What sensitivity is measured with: plain round-to-nearest at 3 bits.

    Attributes:
        census: Of the model.
        stats: Gram matrices; a site without one is measured by its weight error, as it will be
            judged.
        read_weight: Weight of a site, float32 [N, K].
        read_table: Table of an embedding, float32 [rows, width].
        ids: The tokens that are run: an embedding's error is that of their rows.
    """

    census: ModelCensus
    stats: CalibrationStats
    read_weight: ReadWeight
    read_table: ReadTable
    ids: npt.NDArray[np.int64]

    def __call__(self, weight: LinearSite | EmbeddingSite) -> Perturbation:
        """The rounded weight, and the energy of its error."""
        if isinstance(weight, LinearSite):
            values = self.read_weight(weight)
            rounded = _fake_quantized(values, COARSE)
            gram = _gram(self.stats, self.census, weight.name)
            return Perturbation(rounded, _rounding_energy(rounded, values, gram))
        values = self.read_table(weight)
        rounded = _fake_quantized(values, COARSE)
        seen = self.ids.reshape(-1)
        return Perturbation(rounded, _energy(rounded[seen] - values[seen], None) / seen.size)


@dataclasses.dataclass(frozen=True)
class KLPredictor:
    """Predicts KL, one weight at a time.

    Attributes:
        census: Of the model.
        stats: Gram matrices; a site without one is judged by its weight error.
        per_error: KL per unit of error, nats, by name of a site or embedding.
        shrinkage: Of Gram matrices, as the rounding will take them; None: by the tokens that
            they are of.
        read_weight: Weight of a site, float32 [N, K].
        read_table: Table of an embedding, float32 [rows, width].
    """

    census: ModelCensus
    stats: CalibrationStats
    per_error: Mapping[str, float]
    shrinkage: float | None
    read_weight: ReadWeight
    read_table: ReadTable

    def of_site(
        self, site: LinearSite, plans: Sequence[SitePlan], table: EmbeddingSite | None
    ) -> BudgetItem:
        """Round some rows as each plan says.

        Args:
            site: With a sensitivity.
            plans: Each with a format.
            table: An embedding that the site hands its low-bit weight to: its KL counts too.
        """
        weight = self.read_weight(site)
        rows = _spread_rows(weight)
        gram = _gram(self.stats, self.census, site.name)
        moments = None
        if gram is not None:
            moments = SiteMoments.of_text(gram, self.stats.manifest.tokens, self.shrinkage)
        candidates = []
        for plan in plans:
            own = plan if moments else plan.model_copy(update=PLAIN)
            result = quantize_weight(rows, own, moments, scale_dtype=scale_dtype_of(site.dtype))
            delta = dequantize_weight(result.weight) - rows
            kl = self.per_error[site.name] * _energy(delta, gram) * len(weight) / len(rows)
            if table is not None:
                kl += self.per_error.get(table.name, 0.0) * _energy(delta, None) / len(rows)
            assert plan.format is not None
            size = plan.format.weight_bytes(
                site.out_features, site.in_features, scale_bytes_of(site.dtype)
            )
            candidates.append(Candidate(plan.format, size, kl))
        return BudgetItem(site.name, weight.size, tuple(candidates))

    def of_table(self, table: EmbeddingSite, formats: Sequence[BlockFormat]) -> BudgetItem:
        """Round some rows of an embedding that has a sensitivity to each format."""
        rows = _spread_rows(self.read_table(table))
        dtype = scale_dtype_of(table.dtype)
        per_error = self.per_error[table.name]
        candidates = []
        for fmt in formats:
            delta = dequantize_weight(quantize_rtn(rows, fmt, dtype)) - rows
            size = fmt.weight_bytes(table.rows, table.width, scale_bytes_of(table.dtype))
            candidates.append(Candidate(fmt, size, per_error * _energy(delta, None) / len(rows)))
        return BudgetItem(table.name, table.rows * table.width, tuple(candidates))


def _gram(stats: CalibrationStats, census: ModelCensus, site: str) -> Array | None:
    group = next(group.name for group in census.groups if site in group.sites)
    return stats.gram(group) if stats.has(group) else None


def _energy(delta: Array, gram: Array | None) -> float:
    return float(np.vdot(delta, delta)) if gram is None else output_energy(delta, gram)


def _rounding_energy(rounded: Array, weight: Array, gram: Array | None) -> float:
    """`_energy` of a whole weight, some rows at a time: a head may be half of the model."""
    total = 0.0
    for start in range(0, len(weight), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        total += _energy(rounded[rows] - weight[rows], gram)
    return total


def _fake_quantized(weight: Array, fmt: BlockFormat) -> Array:
    blocks = to_blocks(weight, fmt.block_size)
    whole = fake_quantize(blocks, fmt).reshape(len(weight), -1)
    return np.ascontiguousarray(whole[:, : weight.shape[1]])


def _spread_rows(weight: Array) -> Array:
    """At most SAMPLE_ROWS rows, evenly spaced."""
    if len(weight) <= SAMPLE_ROWS:
        return weight
    picked = np.linspace(0, len(weight) - 1, SAMPLE_ROWS).round().astype(np.intp)
    return np.ascontiguousarray(weight[picked])
