"""A block format for every weight under a budget, by what its rounding does to the logits.

    predicted KL of a format = c_site * err_site(format),   c_site = KL_site / err_site, measured
err is the output-error energy sum_n d_n G d_n^T of the site's own rounding, so a method that
rounds better at few bits gets more of them. Predictions add up over the sites: their errors are
independent, and KL is quadratic in them (measured: calibration/sensitivity.py).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat, EmbeddingPlan, SitePlan
from faq_onnx.artifacts.sensitivity import Perturbation, Sensitivities
from faq_onnx.artifacts.sites import EmbeddingSite, LinearSite, ModelCensus
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.artifacts.trade_off import TradeOff, TradeOffPoint
from faq_onnx.config import QuantizeConfig
from faq_onnx.planning.budget import (
    ROUNDING,
    Allocation,
    Budget,
    BudgetItem,
    BudgetKind,
    Candidate,
    CurvePoint,
    allocate,
    format_bytes,
    parse_budget,
)
from faq_onnx.planning.formats import plan_sites
from faq_onnx.progress import SILENT, Progress
from faq_onnx.quant.formats import BLOCK_SIZES, block_format, check_embedding_format
from faq_onnx.quant.objective import output_energy
from faq_onnx.quant.site import SiteMoments, quantize_weight
from faq_onnx.quant.threads import map_in_threads
from faq_onnx.quant.uniform import dequantize_weight, fake_quantize, quantize_rtn, to_blocks

__all__ = [
    "COARSE",
    "COARSE_NAME",
    "FORMATS",
    "CoarseRounding",
    "MixedFormats",
    "MixedPlanner",
    "ReadTable",
    "describe_trade_off",
]

Array = npt.NDArray[np.float32]
ReadWeight = Callable[[LinearSite], Array]
ReadTable = Callable[[EmbeddingSite], Array]

# Bits and block sizes that compete; 3-bit codes take 4 bits of storage, so they never would win.
# No kernel is fast for 2 bits in blocks of 256.
FORMATS = (
    *((2, block) for block in (32, 64, 128)),
    *((bits, block) for bits in (4, 8) for block in (32, 64, 128, 256)),
)
TABLE_BITS = (4, 8)  # what `--embedding` offers
COARSE = block_format(3, 32, symmetric=False)
COARSE_NAME = "round-to-nearest, 3 bits, blocks of 32, zero points"
# Rows that stand for a weight: all its candidates are judged on the same ones.
SAMPLE_ROWS = 128
PLAIN = MappingProxyType({"grid": "minmax", "rounding": "nearest"})
ROWS_AT_A_TIME = 4096
# Predictions leave out how errors of several weights work together: measured KL was up to a
# quarter higher, so a KL budget is spent up to here.
KL_SHARE = 0.8
CURVE_POINTS = 64  # of hundreds, for the report
BYTES_OF = {"float32": 4, "float16": 2, "bfloat16": 2}


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
class MixedFormats:
    """Formats under a budget.

    Attributes:
        sites: One plan per site, in census order.
        embeddings: One plan per embedding, in census order.
        allocation: The choice and the whole trade-off curve, for printing.
        fixed_bytes: Of all that does not compete, which a size budget includes.
    """

    sites: tuple[SitePlan, ...]
    embeddings: tuple[EmbeddingPlan, ...]
    allocation: Allocation
    fixed_bytes: int


@dataclasses.dataclass(frozen=True)
class MixedPlanner:
    """Chooses formats.

    Attributes:
        census: Of the model.
        config: The wish. `bits` and `block_size` hold only for weights that have no sensitivity;
            `lm_head` keep leaves the head float, every other value lets it compete; an embedding
            competes as auto, shared, or with the bits that are named.
        stats: Gram matrices.
        sensitivities: Measured ones.
        read_weight: Weight of a site, float32 [N, K].
        read_table: Table of an embedding, float32 [rows, width].
        formats: (bits, block size) that compete, with and without zero points.
        other_bytes: Of the file that are not weights of sites or embeddings.
    """

    census: ModelCensus
    config: QuantizeConfig
    stats: CalibrationStats
    sensitivities: Sensitivities
    read_weight: ReadWeight
    read_table: ReadTable
    formats: Sequence[tuple[int, int]] = FORMATS
    other_bytes: int = 0

    def choose(self, budget: Budget, progress: Progress = SILENT) -> MixedFormats:
        """Spread the budget.

        Raises:
            PlanError: It cannot be met; says the smallest value that can.
            ConfigError: A pattern of `exclude` fits no site.
        """
        options = self._site_options()
        tables = self._own_tables()
        work: list[Callable[[], BudgetItem]] = [
            *(
                functools.partial(self._site_item, self.census.site(n), o)
                for n, o in options.items()
            ),
            *(functools.partial(self._table_item, table) for table in tables),
        ]
        items = []
        with progress.stage("predict KL", len(work), "weights") as advance:
            for item in map_in_threads(lambda predict: predict(), work):
                items.append(item)
                advance(1)
        fixed = self.other_bytes + self._fixed_bytes({item.name for item in items})
        allocation = allocate(items, _with_margin(budget, items), fixed)
        chosen = {name: candidate.format for name, candidate in allocation.choice.items()}
        return MixedFormats(
            self._chosen_sites(options, chosen), self._chosen_tables(chosen), allocation, fixed
        )

    def _site_options(self) -> dict[str, list[SitePlan]]:
        """Plans that compete, by site, for measured sites that do not stay float."""
        measured = self.sensitivities.per_error()
        head = "keep" if self.config.lm_head == "keep" else "same"
        options: dict[str, list[SitePlan]] = {}
        for (bits, block_size), symmetric in itertools.product(self.formats, self._symmetries()):
            wish: dict[str, object] = {"bits": bits, "block_size": block_size}
            wish |= {"symmetric": symmetric, "lm_head": head}
            for plan in plan_sites(self.census, self.config.model_copy(update=wish)):
                known = options.setdefault(plan.site, [])
                if plan.format is not None and self._fits(plan) and not self._beaten(plan, known):
                    known.append(plan)
        return {name: plans for name, plans in options.items() if plans and name in measured}

    def _beaten(self, plan: SitePlan, known: Sequence[SitePlan]) -> bool:
        """Whether smaller blocks of the same kind take no more room: long ones are padded."""
        site, fmt = self.census.site(plan.site), plan.format
        assert fmt is not None
        size = format_bytes(site.out_features, site.in_features, fmt)
        return any(
            (other.code_bits, other.symmetric) == (fmt.code_bits, fmt.symmetric)
            and other.block_size <= fmt.block_size
            and format_bytes(site.out_features, site.in_features, other) <= size
            for other in (one.format for one in known)
            if other is not None
        )

    def _symmetries(self) -> tuple[bool, ...]:
        """Zero points cost a few hundredths of a bit, and not every weight needs them."""
        if self.config.symmetric:
            return (True,)
        return (False,) if self.config.axes.grid == "hqq" else (False, True)  # hqq moves them

    def _fits(self, plan: SitePlan) -> bool:
        """Whether the head's table can be the embedding's as well."""
        assert plan.format is not None
        table = self._sharing().get(plan.site)
        if table is None:
            return True
        if self.config.embedding == "shared":
            check_embedding_format(plan.format, width=table.width, embedding=table.name)
            return True
        return plan.format.storage_bits in TABLE_BITS

    def _sharing(self) -> dict[str, EmbeddingSite]:
        """Tables that a head of low bits hands on, by head: as `plan_embeddings` shares them."""
        if self.config.embedding not in {"auto", "shared"}:
            return {}
        measured = self.sensitivities.per_error()
        return {
            table.tied_site: table
            for table in self.census.embeddings
            if table.tied_site is not None
            and table.tied_site in measured
            and not self._stays_float(table.tied_site)
            and (self.config.embedding == "shared" or table.width % BLOCK_SIZES[0] == 0)
        }

    def _stays_float(self, head: str) -> bool:
        excluded = any(fnmatchcase(head, pattern) for pattern in self.config.exclude)
        return excluded or self.config.lm_head == "keep"

    def _own_tables(self) -> list[EmbeddingSite]:
        """Tables that compete by themselves."""
        measured = self.sensitivities.per_error()
        shared = {table.name for table in self._sharing().values()}
        return [
            table
            for table in self.census.embeddings
            if table.name in measured
            and table.name not in shared
            and table.dtype in {"float32", "float16"}
            and self._table_formats(table)
        ]

    def _table_formats(self, table: EmbeddingSite) -> list[BlockFormat]:
        wish = self.config.embedding
        named = {"auto": TABLE_BITS, "4": (4,), "8": (8,)}.get(wish, ())
        blocks = dict.fromkeys(block for _, block in self.formats)
        return [
            block_format(bits, block, symmetric)
            for bits, block, symmetric in itertools.product(named, blocks, self._symmetries())
            if table.width % block == 0
        ]

    def _site_item(self, site: LinearSite, plans: Sequence[SitePlan]) -> BudgetItem:
        weight = self.read_weight(site)
        rows = _spread_rows(weight)
        gram = _gram(self.stats, self.census, site.name)
        moments = None if gram is None else SiteMoments(gram, self.config.rounding.shrinkage)
        table = self._sharing().get(site.name)
        per_error = self.sensitivities.per_error()
        candidates = []
        for plan in plans:
            own = plan if moments else plan.model_copy(update=PLAIN)
            result = quantize_weight(rows, own, moments, scale_dtype=_scale_dtype(site.dtype))
            delta = dequantize_weight(result.weight) - rows
            kl = per_error[site.name] * _energy(delta, gram) * len(weight) / len(rows)
            if table is not None:
                kl += per_error.get(table.name, 0.0) * _energy(delta, None) / len(rows)
            assert plan.format is not None
            size = format_bytes(
                site.out_features, site.in_features, plan.format, _scale_dtype(site.dtype)
            )
            candidates.append(Candidate(plan.format, size, kl))
        return BudgetItem(site.name, weight.size, tuple(candidates))

    def _table_item(self, table: EmbeddingSite) -> BudgetItem:
        rows = _spread_rows(self.read_table(table))
        dtype = _scale_dtype(table.dtype)
        per_error = self.sensitivities.per_error()[table.name]
        candidates = []
        for fmt in self._table_formats(table):
            delta = dequantize_weight(quantize_rtn(rows, fmt, dtype)) - rows
            size = format_bytes(table.rows, table.width, fmt, dtype)
            candidates.append(Candidate(fmt, size, per_error * _energy(delta, None) / len(rows)))
        return BudgetItem(table.name, table.rows * table.width, tuple(candidates))

    def _fixed_bytes(self, competing: set[str]) -> int:
        """Size of what does not compete; an initializer that several read counts once."""
        sizes: dict[str, int] = {}
        plans = {plan.site: plan.format for plan in plan_sites(self.census, self.config)}
        for site in self.census.sites:
            fmt = plans[site.name]
            if site.name in competing:
                continue
            shape = (site.out_features, site.in_features)
            if fmt is None:
                sizes[site.weight] = shape[0] * shape[1] * BYTES_OF[site.dtype]
            else:
                sizes[site.name] = format_bytes(*shape, fmt, _scale_dtype(site.dtype))
        shared = {table.name for table in self._sharing().values()}
        for table in self.census.embeddings:
            if table.name not in competing | shared:
                sizes[table.weight] = table.rows * table.width * BYTES_OF[table.dtype]
        return sum(sizes.values())

    def _chosen_sites(
        self, options: Mapping[str, Sequence[SitePlan]], chosen: Mapping[str, BlockFormat | None]
    ) -> tuple[SitePlan, ...]:
        return tuple(
            next((p for p in options.get(plan.site, ()) if p.format == chosen[plan.site]), plan)
            for plan in plan_sites(self.census, self.config)
        )

    def _chosen_tables(
        self, chosen: Mapping[str, BlockFormat | None]
    ) -> tuple[EmbeddingPlan, ...]:
        heads = {table.name: head for head, table in self._sharing().items() if head in chosen}
        plans = []
        for table in self.census.embeddings:
            head = heads.get(table.name)
            fmt = chosen.get(head or table.name)
            reason = "" if fmt else "kept float"
            plans.append(
                EmbeddingPlan(embedding=table.name, format=fmt, shared_with=head, reason=reason)
            )
        return tuple(plans)


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
    budget, allocation, fixed = parse_budget(wish), found.allocation, found.fixed_bytes
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


def _scale_dtype(dtype: str) -> npt.DTypeLike:
    return np.float16 if dtype == "float16" else np.float32
