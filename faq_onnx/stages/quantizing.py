"""The stages that make a float model low-bit: fold its scales, quantize, rewrite the graph."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import SitePlan
from faq_onnx.artifacts.sites import LinearSite, ScaleGroup
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.artifacts.verification import SiteError
from faq_onnx.artifacts.weights import WeightStore
from faq_onnx.calibration.ahead import LookAhead
from faq_onnx.calibration.attention import AttentionMoments
from faq_onnx.calibration.paired import PairedWalk
from faq_onnx.calibration.paired_moments import PairedMoments
from faq_onnx.graph.io import release_weights
from faq_onnx.passes import (
    FoldScalesPass,
    MatMulToNBitsPass,
    QuantizeEmbeddingPass,
    run_passes,
)
from faq_onnx.planning.budget import scale_dtype_of
from faq_onnx.planning.planner import PlannedModel
from faq_onnx.progress import Progress
from faq_onnx.quant.objective import scale_gram
from faq_onnx.quant.shift import Miss, correction
from faq_onnx.quant.site import (
    QuantizedSite,
    SiteMoments,
    looks_at_activations,
    quantize_weight,
    rtn_digest,
)
from faq_onnx.quant.threads import map_in_threads, thread_count
from faq_onnx.quant.uniform import dequantize_weight, quantize_rtn
from faq_onnx.stages.opening import OpenedModel

__all__ = ["Quantized", "fold", "quantize", "rewrite", "rtn_marks"]


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Low-bit weights on disk and what each costs."""

    weights: WeightStore
    errors: tuple[SiteError, ...]


def rtn_marks(opened: OpenedModel, planned: PlannedModel) -> dict[str, str]:
    """Digest of each site's round-to-nearest codes, taken before the graph is changed."""

    def mark(plan: SitePlan) -> str:
        assert plan.format is not None
        site = opened.census.site(plan.site)
        return rtn_digest(opened.read(site), plan.format, scale_dtype_of(site.dtype))

    plans = [plan for plan in planned.plan.sites if plan.format is not None]
    marks = dict(zip((p.site for p in plans), map_in_threads(mark, plans), strict=True))
    release_weights(opened.model)
    return marks


def fold(opened: OpenedModel, planned: PlannedModel) -> None:
    """Fold the channel scales into the graph; the function that it computes stays the same."""
    run_passes(opened.model, [FoldScalesPass(opened.census, planned.plan, planned.scales)])


def quantize(  # noqa: PLR0913, PLR0917 - the stage joins the artifacts of all stages before it
    opened: OpenedModel,
    planned: PlannedModel,
    stats: CalibrationStats | None,
    marks: Mapping[str, str],
    folder: Path,
    progress: Progress,
    *,
    windows: npt.NDArray[np.int64] | None = None,
) -> Quantized:
    """Quantize every planned site and embedding of the folded graph.

    Args:
        opened: The model after `fold`.
        planned: What to do.
        stats: Gram matrices of the float model, for grids, rounding and output errors; None where
            nothing needs them.
        marks: From `rtn_marks`.
        folder: Receives the weights, and what walks need.
        progress: Receives weights done, in millions.
        windows: Token ids [windows, length] that walk the low-bit path: sites are rounded against
            the model quantized so far. None rounds against the float model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bench = _Bench(opened, planned, stats, marks, WeightStore(folder))
    if windows is not None:
        bench.walk(windows, folder / "walk", progress)
    bench.quantize_rest(progress)
    _quantize_embeddings(opened, planned, bench.store)
    release_weights(opened.model)
    return Quantized(bench.store, bench.in_order())


@dataclasses.dataclass
class _Bench:
    """Where sites are quantized one after another."""

    opened: OpenedModel
    planned: PlannedModel
    stats: CalibrationStats | None
    marks: Mapping[str, str]
    store: WeightStore
    errors: dict[str, SiteError] = dataclasses.field(default_factory=dict)

    @property
    def plans(self) -> dict[str, SitePlan]:
        """By site name, those that get a format."""
        return {plan.site: plan for plan in self.planned.plan.sites if plan.format is not None}

    def in_order(self) -> tuple[SiteError, ...]:
        """What each site costs, in the order of the plan."""
        return tuple(self.errors[name] for name in self.plans)

    def walk(self, windows: npt.NDArray[np.int64], folder: Path, progress: Progress) -> None:
        """Quantize the sites whose rounding looks at activations, on the low-bit path."""
        judged = {name for name, plan in self.plans.items() if looks_at_activations(plan)}
        groups = [g.name for g in self.opened.census.groups if judged & set(g.sites)]
        rounding = self.planned.plan.rounding
        walk = PairedWalk(
            self.opened.model,
            self.opened.census,
            folder,
            rounding.attention_aware,
            rounding.look_ahead,
        )
        walk.run(windows, groups, self._solve, progress)

    def _solve(
        self,
        group: ScaleGroup,
        halves: tuple[PairedMoments, PairedMoments],
        look: LookAhead | None,
    ) -> Mapping[str, npt.NDArray[np.float32]]:
        """Quantize the sites of one group; what the low-bit path goes on with."""
        rounding = self.planned.plan.rounding
        seen = PairedMoments.mean(halves)
        moments = SiteMoments.of_text(seen.gram, seen.tokens, rounding.shrinkage)
        plans = {name: self.plans[name] for name in group.sites if name in self.plans}
        weights = {name: self.opened.read(self.opened.census.site(name)) for name in plans}
        targets: dict[str, npt.NDArray[np.float32]] = {}
        if rounding.correct:
            wished = _Targets(halves)
            judged = [name for name, plan in plans.items() if looks_at_activations(plan)]
            targets = {name: wished.of(name, weights[name]) for name in judged}
            if look is not None and targets:
                targets = dict(look(targets))
        found = {}
        for name, plan in plans.items():
            result = quantize_weight(
                weights[name],
                plan,
                self._by_head(name, seen.attention) or moments,
                target=targets.get(name),
                row_metric=seen.attention.rows.get(name),
                scale_dtype=scale_dtype_of(self.opened.census.site(name).dtype),
                workers=thread_count(),
            )
            self._keep(plan, result)
            found[name] = dequantize_weight(result.weight)
        return found

    def _by_head(self, name: str, attended: AttentionMoments) -> list[SiteMoments]:
        strength = self.planned.plan.rounding.shrinkage
        return [
            SiteMoments.of_text(gram, attended.tokens, strength)
            for gram in attended.inputs.get(name, ())
        ]

    def quantize_rest(self, progress: Progress) -> None:
        """Quantize what no walk has reached, against the float model."""
        groups = {name: group for group in self.opened.census.groups for name in group.sites}
        plans = [plan for name, plan in self.plans.items() if name not in self.errors]
        sites = {plan.site: self.opened.census.site(plan.site) for plan in plans}
        total = sum(site.in_features * site.out_features for site in sites.values()) / 1e6

        def quantize_one(plan: SitePlan) -> QuantizedSite:
            moments = _moments(groups[plan.site], self.planned, self.stats)
            site = sites[plan.site]
            dtype = scale_dtype_of(site.dtype)
            return quantize_weight(self.opened.read(site), plan, moments, scale_dtype=dtype)

        if not plans:
            return
        with progress.stage("quantize", total, "M weights") as advance:
            for plan, result in zip(plans, map_in_threads(quantize_one, plans), strict=True):
                self._keep(plan, result)
                site = sites[plan.site]
                advance(site.in_features * site.out_features / 1e6)

    def _keep(self, plan: SitePlan, result: QuantizedSite) -> None:
        self.store.put(plan.site, result.weight)
        self.errors[plan.site] = _site_error(
            self.opened.census.site(plan.site), result, self.marks
        )


def rewrite(opened: OpenedModel, planned: PlannedModel, weights: WeightStore) -> None:
    """Replace the float nodes by low-bit ones."""
    plans = {plan.site: plan for plan in planned.plan.sites if plan.format is not None}
    tables = {p.embedding: p for p in planned.plan.embeddings if p.format is not None}
    sites = tuple(site for site in opened.census.sites if site.name in plans)
    embeddings = tuple(table for table in opened.census.embeddings if table.name in tables)
    run_passes(
        opened.model,
        [
            MatMulToNBitsPass(sites, plans, weights),
            QuantizeEmbeddingPass(embeddings, tables, weights),
        ],
    )


@dataclasses.dataclass(frozen=True)
class _Targets:
    """What the sites of one group should round to for the low-bit path to meet the float one."""

    halves: tuple[PairedMoments, PairedMoments]

    def of(self, name: str, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The target of one site, float32 [N, K]."""
        if name not in self.halves[0].residual:
            return weight + weight @ self._activation
        one, other = (
            Miss(half.gram, half.residual[name] - weight @ half.gram, half.tokens)
            for half in self.halves
        )
        return weight + correction((one, other))

    @functools.cached_property
    def _activation(self) -> npt.NDArray[np.float32]:
        """What takes x_q nearer to x, for all sites that pass it on: float32 [K, K]."""
        one, other = (Miss(half.gram, half.cross, half.tokens) for half in self.halves)
        return correction((one, other))


def _site_error(site: LinearSite, result: QuantizedSite, marks: Mapping[str, str]) -> SiteError:
    same = result.codes_digest == marks.get(site.name)
    shrinkage = None if result.shrinkage is None else round(result.shrinkage, 3)
    return SiteError(
        site=site.name,
        sqnr_db=round(result.sqnr_db, 3),
        equals_rtn=same,
        shrinkage=shrinkage,
    )


def _quantize_embeddings(opened: OpenedModel, planned: PlannedModel, store: WeightStore) -> None:
    tables = {table.name: table for table in opened.census.embeddings}
    for plan in planned.plan.embeddings:
        if plan.format is None or plan.shared_with is not None:
            continue
        table = tables[plan.embedding]
        values = opened.read_table(table)
        store.put(table.name, quantize_rtn(values, plan.format, scale_dtype_of(table.dtype)))


def _moments(
    group: ScaleGroup, planned: PlannedModel, stats: CalibrationStats | None
) -> SiteMoments | None:
    """Of what the sites read after folding: x / s."""
    if stats is None or not stats.has(group.name):
        return None
    gram, scale = stats.gram(group.name), planned.scales.get(group.name)
    if scale is not None:
        gram = scale_gram(gram, scale)
    return SiteMoments.of_text(gram, stats.manifest.tokens, planned.plan.rounding.shrinkage)
