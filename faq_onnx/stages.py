"""The stages of a conversion, one function each; `pipeline` puts them in order."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.analysis import canonicalise, check_finite, take_census
from faq_onnx.artifacts.plan import SitePlan
from faq_onnx.artifacts.record import fingerprint_file
from faq_onnx.artifacts.sites import EmbeddingSite, LinearSite, ModelCensus, ScaleGroup
from faq_onnx.artifacts.source import SourceModel
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.artifacts.verification import SiteError
from faq_onnx.artifacts.weights import WeightStore
from faq_onnx.calibration.paired import PairedWalk
from faq_onnx.calibration.paired_moments import PairedMoments
from faq_onnx.config import BlockScales, QuantizeConfig
from faq_onnx.errors import CorruptModelError, FaqOnnxError, UnsupportedModelError
from faq_onnx.export import resolve_source
from faq_onnx.graph.io import DATA_ALIGNMENT_BYTES, load_model, release_weights, rest_bytes
from faq_onnx.graph.weights import read_initializer, read_weight
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

__all__ = [
    "OpenedModel",
    "Quantized",
    "load_source",
    "open_model",
    "quantize",
    "read_config",
    "rewrite",
    "source_bytes",
    "understand",
]

_LOG = logging.getLogger(__name__)

LOW_BIT_TENSORS = 3  # codes, scales and zero points of a weight
MULTIPLYING = 5  # unit of 8-bit scales, nodes that multiply, what lies between them
REFERENCE_BYTES = 90  # dims of one of them, suffix of its name, its share of the node's attributes


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A float model, understood.

    Attributes:
        source: Where it came from.
        model: The graph; weights on disk.
        census: What is in it.
        fingerprint: Sha256 over its files, and what was rotated.
        unrotated: The model before a rotation; None where there was none.
    """

    source: SourceModel
    model: ir.Model
    census: ModelCensus
    fingerprint: str
    unrotated: OpenedModel | None = None

    @property
    def given(self) -> OpenedModel:
        """The model as it came, whose logits are the reference."""
        return self.unrotated or self

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        if self.census.embeddings:
            return self.census.embeddings[0].rows
        heads = [site for site in self.census.sites if site.role == "lm_head"]
        if not heads:
            msg = (
                f"{self.source.onnx_path}: neither a token embedding nor an lm_head was found, so "
                "the model cannot be run on text; use --method rtn with `faq-onnx opt`"
            )
            raise UnsupportedModelError(msg)
        return heads[0].out_features

    def read(self, site: LinearSite) -> npt.NDArray[np.float32]:
        """The weight of a site as the graph holds it now, float32 [N, K]."""
        return read_weight(self.model, site)

    def read_table(self, table: EmbeddingSite) -> npt.NDArray[np.float32]:
        """An embedding as the graph holds it now, float32 [rows, width]."""
        values = read_initializer(self.model, table.weight).astype(np.float32, copy=False)
        if values.shape == (table.rows, table.width):
            return values
        return np.ascontiguousarray(values.T)  # a tied head's weight, behind a Transpose

    def other_bytes(self, block_scales: BlockScales, *, external: bool) -> int:
        """At most what a low-bit file holds besides codes, scales and zero points."""
        weights: list[LinearSite | EmbeddingSite] = [*self.census.sites, *self.census.embeddings]
        rest = rest_bytes(self.model, {weight.weight for weight in weights})
        # Pages of onnxruntime: in a file of their own, tensors begin at multiples of 4096.
        padding = DATA_ALIGNMENT_BYTES if external else 0
        names = sum(len(weight.name) + len(weight.weight) for weight in weights)
        entries = LOW_BIT_TENSORS if block_scales == "float" else LOW_BIT_TENSORS + MULTIPLYING
        bookkeeping = entries * (len(weights) * REFERENCE_BYTES + names)
        return rest + bookkeeping + LOW_BIT_TENSORS * len(weights) * padding


def open_model(source: str, work: Path, progress: Progress) -> OpenedModel:
    """Resolve, load, canonicalise and take stock of a float source."""
    return understand(*load_source(source, work, progress), progress)


def load_source(source: str, work: Path, progress: Progress) -> tuple[SourceModel, ir.Model]:
    """Resolve, load and canonicalise a source, float or low-bit."""
    resolved = _resolve(source, work, progress)
    model = load_model(resolved.onnx_path)
    try:
        canonicalise(model)
    except FaqOnnxError as error:
        error.add_note(f"model: {resolved.onnx_path}")
        raise
    return resolved, model


def understand(resolved: SourceModel, model: ir.Model, progress: Progress) -> OpenedModel:
    """Take stock of a float model."""
    try:
        census = take_census(model, read_config(resolved))
        check_finite(model, census)
    except FaqOnnxError as error:
        error.add_note(f"model: {resolved.onnx_path}")
        raise
    release_weights(model)
    for warning in census.warnings:
        progress.note(warning)
    return OpenedModel(resolved, model, census, _fingerprint(model, resolved.onnx_path))


def source_bytes(source: SourceModel, model: ir.Model) -> int:
    """Size of the ONNX file and of the files that hold its weights."""
    path = source.onnx_path
    external = {
        Path(value.const_value.path).resolve()
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    external.discard(path.resolve())
    return path.stat().st_size + sum(file.stat().st_size for file in external)


def _resolve(source: str, work: Path, progress: Progress) -> SourceModel:
    """`resolve_source`, or the export that an earlier run left in the work folder."""
    record = work / "source.json"
    if record.is_file():
        earlier = SourceModel.load(record)
        path = Path(source)
        changed = path.exists() and path.stat().st_mtime > record.stat().st_mtime
        if earlier.given == source and earlier.onnx_path.is_file() and not changed:
            progress.note(f"{source}: taking the export in {earlier.onnx_path.parent}")
            return earlier
    resolved = resolve_source(source, work, progress)
    if resolved.exported:
        resolved.save(record)
    return resolved


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
        config = self.planned.plan.config or QuantizeConfig()
        aware = config.rounding.attention_aware
        walk = PairedWalk(self.opened.model, self.opened.census, folder, aware)
        walk.run(windows, groups, self._solve, progress)

    def _solve(
        self, group: ScaleGroup, halves: tuple[PairedMoments, PairedMoments]
    ) -> Mapping[str, npt.NDArray[np.float32]]:
        """Quantize the sites of one group; what the low-bit path goes on with."""
        config = self.planned.plan.config or QuantizeConfig()
        seen = PairedMoments.mean(halves)
        moments = SiteMoments(seen.gram, config.rounding.shrinkage)
        targets = _Targets(halves) if config.rounding.correct else None
        found = {}
        for name in group.sites:
            plan = self.plans.get(name)
            if plan is None:
                continue
            weight = self.opened.read(self.opened.census.site(name))
            target = None
            if targets is not None and looks_at_activations(plan):
                target = targets.of(name, weight)
            result = quantize_weight(
                weight,
                plan,
                self._by_head(seen.attention.inputs.get(name)) or moments,
                target=target,
                row_metric=seen.attention.rows.get(name),
                scale_dtype=scale_dtype_of(self.opened.census.site(name).dtype),
                workers=thread_count(),
            )
            self._keep(plan, result)
            found[name] = dequantize_weight(result.weight)
        return found

    def _by_head(self, attended: npt.NDArray[np.float32] | None) -> list[SiteMoments]:
        config = self.planned.plan.config or QuantizeConfig()
        grams = () if attended is None else attended
        return [SiteMoments(gram, config.rounding.shrinkage) for gram in grams]

    def quantize_rest(self, progress: Progress) -> None:
        """Quantize what no walk has reached, against the float model."""
        config = self.planned.plan.config or QuantizeConfig()
        groups = {name: group for group in self.opened.census.groups for name in group.sites}
        plans = [plan for name, plan in self.plans.items() if name not in self.errors]
        sites = {plan.site: self.opened.census.site(plan.site) for plan in plans}
        total = sum(site.in_features * site.out_features for site in sites.values()) / 1e6

        def quantize_one(plan: SitePlan) -> QuantizedSite:
            gram = _gram(groups[plan.site], self.planned, self.stats)
            moments = None if gram is None else SiteMoments(gram, config.rounding.shrinkage)
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
    return SiteError(site=site.name, sqnr_db=round(result.sqnr_db, 3), equals_rtn=same)


def _quantize_embeddings(opened: OpenedModel, planned: PlannedModel, store: WeightStore) -> None:
    tables = {table.name: table for table in opened.census.embeddings}
    for plan in planned.plan.embeddings:
        if plan.format is None or plan.shared_with is not None:
            continue
        table = tables[plan.embedding]
        values = opened.read_table(table)
        store.put(table.name, quantize_rtn(values, plan.format, scale_dtype_of(table.dtype)))


def _gram(
    group: ScaleGroup, planned: PlannedModel, stats: CalibrationStats | None
) -> npt.NDArray[np.float32] | None:
    """Gram matrix of what the sites read after folding: x / s."""
    if stats is None or not stats.has(group.name):
        return None
    gram = stats.gram(group.name)
    scale = planned.scales.get(group.name)
    return gram if scale is None else scale_gram(gram, scale)


def read_config(source: SourceModel) -> Mapping[str, object] | None:
    """The parsed config.json, None where there is none."""
    path = source.companion("config.json")
    if path is None:
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        msg = f"{path}: not valid JSON ({error}); restore it or remove it"
        raise CorruptModelError(msg) from error
    return config if isinstance(config, dict) else None


def _fingerprint(model: ir.Model, path: Path) -> str:
    """Sha256 over the ONNX file and the files that hold its weights."""
    files = {path.resolve()}
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                files.add(Path(value.const_value.path).resolve())
    parts = [fingerprint_file(file) for file in sorted(files)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
