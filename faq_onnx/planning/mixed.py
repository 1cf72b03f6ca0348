"""A block format for every weight under a budget, by what its rounding does to the logits.

Predictions (`prediction`) of the formats that compete (`candidates`) add up over the sites: their
errors are independent, and KL is quadratic in them (measured: calibration/sensitivity.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from faq_onnx.artifacts.plan import EmbeddingPlan, SitePlan
from faq_onnx.artifacts.sensitivity import Sensitivities
from faq_onnx.artifacts.sites import ModelCensus
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.artifacts.trade_off import TradeOff, TradeOffPoint
from faq_onnx.config import QuantizeConfig
from faq_onnx.planning.budget import (
    ROUNDING,
    Allocation,
    Budget,
    BudgetItem,
    BudgetKind,
    CurvePoint,
    SameSize,
    allocate,
)
from faq_onnx.planning.candidates import FORMATS, FormatCandidates, Judge, run_anywhere
from faq_onnx.planning.prediction import KLPredictor, ReadTable, ReadWeight
from faq_onnx.progress import SILENT, Progress
from faq_onnx.quant.threads import map_in_threads

__all__ = ["MixedFormats", "MixedPlanner", "describe_trade_off"]

# Predictions leave out how errors of several weights work together: measured KL was up to a
# quarter higher, so a KL budget is spent up to here.
KL_SHARE = 0.8
CURVE_POINTS = 64  # of hundreds, for the report


@dataclasses.dataclass(frozen=True)
class MixedFormats:
    """Formats under a budget.

    Attributes:
        sites: One plan per site, in census order.
        embeddings: One plan per embedding, in census order.
        budget: The limit that was kept; a size where the wish was `same`.
        allocation: The choice and the whole trade-off curve, for printing.
        fixed_bytes: Of all that does not compete, which a size budget includes.
    """

    sites: tuple[SitePlan, ...]
    embeddings: tuple[EmbeddingPlan, ...]
    budget: Budget
    allocation: Allocation
    fixed_bytes: int


@dataclasses.dataclass(frozen=True)
class MixedPlanner:
    """Chooses formats.

    Attributes:
        census: Of the model.
        config: The wish. `bits` and `block_size` hold only for weights that have no sensitivity,
            and for the size of the budget `same`;
            `lm_head` keep leaves the head float, every other value lets it compete; an embedding
            competes as auto, shared, or with the bits that are named.
        stats: Gram matrices.
        sensitivities: Measured ones.
        read_weight: Weight of a site, float32 [N, K].
        read_table: Table of an embedding, float32 [rows, width].
        formats: (bits, block size) that compete, with and without zero points.
        other_bytes: Of the file that are not weights of sites or embeddings.
        judge: What it refuses does not compete.
    """

    census: ModelCensus
    config: QuantizeConfig
    stats: CalibrationStats
    sensitivities: Sensitivities
    read_weight: ReadWeight
    read_table: ReadTable
    formats: Sequence[tuple[int, int]] = FORMATS
    other_bytes: int = 0
    judge: Judge = run_anywhere

    def choose(self, wish: Budget | SameSize, progress: Progress = SILENT) -> MixedFormats:
        """Spread the budget.

        Raises:
            PlanError: It cannot be met; says the smallest value that can.
            ConfigError: A pattern of `exclude` fits no site.
        """
        measured = frozenset(self.sensitivities.per_error())
        candidates = FormatCandidates(self.census, self.config, measured, self.formats, self.judge)
        items = self._predict(candidates, progress)
        fixed = self.other_bytes + candidates.fixed_bytes
        budget = candidates.limit(wish, self.other_bytes)
        allocation = allocate(items, _with_margin(budget, items), fixed)
        chosen = {name: candidate.format for name, candidate in allocation.choice.items()}
        return MixedFormats(
            candidates.site_plans(chosen),
            candidates.table_plans(chosen),
            budget,
            allocation,
            fixed,
        )

    def _predict(self, candidates: FormatCandidates, progress: Progress) -> list[BudgetItem]:
        """What each weight could have, and at which KL."""
        predictor = KLPredictor(
            self.census,
            self.stats,
            self.sensitivities.per_error(),
            self.config.rounding.shrinkage,
            self.read_weight,
            self.read_table,
        )
        work: list[Callable[[], BudgetItem]] = []
        for name, plans in candidates.of_sites.items():
            site, table = self.census.site(name), candidates.shared.get(name)
            work.append(functools.partial(predictor.of_site, site, plans, table))
        tables = {table.name: table for table in self.census.embeddings}
        for name, formats in candidates.of_tables.items():
            work.append(functools.partial(predictor.of_table, tables[name], formats))
        items = []
        with progress.stage("predict KL", len(work), "weights") as advance:
            for item in map_in_threads(lambda predict: predict(), work):
                items.append(item)
                advance(1)
        return items


def _with_margin(budget: Budget, items: Sequence[BudgetItem]) -> Budget:
    """A KL to aim at below the one that is asked for, as far as that can be reached."""
    if budget.kind is not BudgetKind.KL:
        return budget
    best = sum(min(candidate.kl for candidate in item.candidates) for item in items)
    if best * (1 + ROUNDING) > budget.limit:
        return budget  # the refusal is in the words of the wish
    return Budget(BudgetKind.KL, max(KL_SHARE * budget.limit, best * (1 + ROUNDING)))


def describe_trade_off(wish: str, found: MixedFormats) -> TradeOff:
    """For the plan and the report: the choice, and points of the curve about evenly spaced."""
    budget, allocation, fixed = found.budget, found.allocation, found.fixed_bytes
    curve = allocation.curve
    wanted = np.linspace(curve[0].bytes, curve[-1].bytes, CURVE_POINTS)
    sizes = np.asarray([point.bytes for point in curve])
    nearest = np.unique(np.searchsorted(sizes, wanted, side="right") - 1)

    def described(point: CurvePoint) -> TradeOffPoint:
        bits = round(point.bpw, 4)
        return TradeOffPoint(bytes=point.bytes + fixed, bits_per_weight=bits, kl=point.kl)

    return TradeOff(
        budget=wish,
        kind=budget.kind.value,
        limit=budget.limit,
        fixed_bytes=fixed,
        chosen=described(allocation.total),
        curve=tuple(described(curve[index]) for index in nearest),
    )
