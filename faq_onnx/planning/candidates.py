"""Formats that compete for the weights under a budget, known before anything is measured."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from faq_onnx.artifacts.plan import BlockFormat, EmbeddingPlan, SitePlan
from faq_onnx.artifacts.sites import EmbeddingSite, LinearSite, ModelCensus
from faq_onnx.artifacts.target import Refusal
from faq_onnx.config import QuantizeConfig
from faq_onnx.planning.budget import Budget, BudgetKind, SameSize, scale_bytes_of
from faq_onnx.planning.formats import plan_embeddings, plan_sites
from faq_onnx.quant.formats import BLOCK_SIZES, block_format, check_embedding_format

__all__ = ["FORMATS", "FormatCandidates", "Judge", "run_anywhere"]

# Bits and block sizes that compete; 3-bit codes take 4 bits of storage, so they never would win.
# No kernel is fast for 2 bits in blocks of 256.
FORMATS = (
    *((2, block) for block in (32, 64, 128)),
    *((4, block) for block in (16, 32, 64, 128, 256)),
    *((8, block) for block in (32, 64, 128, 256)),
)
TABLE_BITS = (4, 8)  # what `--embedding` offers
BYTES_OF = {"float32": 4, "float16": 2, "bfloat16": 2}

Weight = LinearSite | EmbeddingSite
# Why a weight in some format would not run where the model is to run; empty if it would.
Judge = Callable[[Weight, BlockFormat], Sequence[Refusal]]


def run_anywhere(_weight: Weight, _fmt: BlockFormat) -> tuple[Refusal, ...]:
    """The judge that refuses nothing."""
    return ()


@dataclasses.dataclass(frozen=True)
class FormatCandidates:
    """Which formats compete for which weight.

    Attributes:
        census: Of the model.
        config: The wish; see `MixedPlanner`.
        measured: Names of sites and embeddings that have a sensitivity; no others compete.
        formats: (bits, block size) that compete, with and without zero points.
        judge: What it refuses does not compete.
    """

    census: ModelCensus
    config: QuantizeConfig
    measured: frozenset[str]
    formats: Sequence[tuple[int, int]] = FORMATS
    judge: Judge = run_anywhere

    @functools.cached_property
    def of_sites(self) -> Mapping[str, list[SitePlan]]:
        """Plans that compete, by site, for measured sites that do not stay float.

        Raises:
            ConfigError: A pattern of `exclude` fits no site.
        """
        options = {
            name: self._unbeaten(plan for plan in plans if not self._refusals(plan))
            for name, plans in self._site_plans.items()
        }
        return {name: plans for name, plans in options.items() if plans}

    @functools.cached_property
    def of_tables(self) -> Mapping[str, list[BlockFormat]]:
        """Formats that compete, by embedding, for tables that compete by themselves."""
        options = {
            name: [fmt for fmt in formats if not self.judge(self._tables[name], fmt)]
            for name, formats in self._table_formats.items()
        }
        return {name: formats for name, formats in options.items() if formats}

    @functools.cached_property
    def shared(self) -> Mapping[str, EmbeddingSite]:
        """Tables that a head of low bits hands on, by head: as `plan_embeddings` shares them."""
        if self.config.embedding not in {"auto", "shared"}:
            return {}
        return {
            table.tied_site: table
            for table in self.census.embeddings
            if table.tied_site is not None
            and table.tied_site in self.measured
            and not self._stays_float(table.tied_site)
            and (self.config.embedding == "shared" or table.width % BLOCK_SIZES[0] == 0)
        }

    @functools.cached_property
    def weights(self) -> int:
        """Number of weights that compete."""
        sites = (self._sites[name] for name in self.of_sites)
        tables = (self._tables[name] for name in self.of_tables)
        return sum(site.in_features * site.out_features for site in sites) + sum(
            table.rows * table.width for table in tables
        )

    @functools.cached_property
    def sizes(self) -> Mapping[str, list[int]]:
        """Bytes of each candidate, by name of what competes."""
        found = {
            name: [self._site_bytes(plan) for plan in plans]
            for name, plans in self.of_sites.items()
        }
        for name, formats in self.of_tables.items():
            found[name] = [self._table_bytes(self._tables[name], fmt) for fmt in formats]
        return found

    @functools.cached_property
    def fixed_bytes(self) -> int:
        """Size of weights that do not compete."""
        handed_on = {table.name for head, table in self.shared.items() if head in self.of_sites}
        competing = self.of_sites.keys() | self.of_tables.keys() | handed_on
        plans = plan_sites(self.census, self.config)
        return self._stored_bytes(
            [plan for plan in plans if plan.site not in competing],
            {table.name: None for table in self.census.embeddings if table.name not in competing},
        )

    @functools.cached_property
    def bytes_without_budget(self) -> int:
        """Size of all weights in the formats that the settings name."""
        sites = plan_sites(self.census, self.config)
        tables = plan_embeddings(self.census, self.config, sites)
        own = {plan.embedding: plan.format for plan in tables if plan.shared_with is None}
        return self._stored_bytes(sites, own)

    def limit(self, wish: Budget | SameSize, other_bytes: int) -> Budget:
        """The budget; the same size as that of the file that the settings make without one.

        Args:
            wish: What was asked for.
            other_bytes: Of the file that are not weights of sites or embeddings.
        """
        if isinstance(wish, Budget):
            return wish
        size = other_bytes + self.bytes_without_budget
        return Budget(BudgetKind.BYTES, size, wish=str(wish))

    def smallest(self) -> dict[str, BlockFormat]:
        """The smallest format by name; for a weight that the judge leaves none, one it refuses."""
        found = {
            name: plans[0].format for name, plans in self._site_plans.items() if plans[0].format
        }
        found |= {name: formats[0] for name, formats in self._table_formats.items()}
        for name, sizes in self.sizes.items():
            at = sizes.index(min(sizes))
            fmt = self.of_sites[name][at].format if name in self.of_sites else None
            found[name] = fmt or self.of_tables[name][at]
        return found

    def site_plans(self, chosen: Mapping[str, BlockFormat | None]) -> tuple[SitePlan, ...]:
        """One plan per site, in census order; what is not chosen is as the wish says."""
        options = self._site_plans
        return tuple(
            next(
                (p for p in options.get(plan.site, ()) if p.format == chosen.get(plan.site)), plan
            )
            for plan in plan_sites(self.census, self.config)
        )

    def table_plans(self, chosen: Mapping[str, BlockFormat | None]) -> tuple[EmbeddingPlan, ...]:
        """One plan per embedding, in census order; what is not chosen stays float."""
        heads = {table.name: head for head, table in self.shared.items() if head in chosen}
        plans = []
        for table in self.census.embeddings:
            head = heads.get(table.name)
            fmt = chosen.get(head or table.name)
            reason = "" if fmt else "kept float"
            plans.append(
                EmbeddingPlan(embedding=table.name, format=fmt, shared_with=head, reason=reason)
            )
        return tuple(plans)

    def refused(self) -> tuple[Refusal, ...]:
        """Why formats that would fit do not compete."""
        of_sites = (
            refusal
            for plans in self._site_plans.values()
            for plan in plans
            for refusal in self._refusals(plan)
        )
        of_tables = (
            refusal
            for name, formats in self._table_formats.items()
            for fmt in formats
            for refusal in self.judge(self._tables[name], fmt)
        )
        return (*of_sites, *of_tables)

    @functools.cached_property
    def _sites(self) -> Mapping[str, LinearSite]:
        return {site.name: site for site in self.census.sites}

    @functools.cached_property
    def _tables(self) -> Mapping[str, EmbeddingSite]:
        return {table.name: table for table in self.census.embeddings}

    @functools.cached_property
    def _site_plans(self) -> Mapping[str, list[SitePlan]]:
        """What would compete if the judge refused nothing."""
        head = "keep" if self.config.lm_head == "keep" else "same"
        options: dict[str, list[SitePlan]] = {}
        for (bits, block_size), symmetric in itertools.product(self.formats, self._symmetries()):
            wish: dict[str, object] = {"bits": bits, "block_size": block_size}
            wish |= {"symmetric": symmetric, "lm_head": head}
            for plan in plan_sites(self.census, self.config.model_copy(update=wish)):
                if plan.site in self.measured and plan.format is not None and self._fits(plan):
                    options.setdefault(plan.site, []).append(plan)
        return options

    @functools.cached_property
    def _table_formats(self) -> Mapping[str, list[BlockFormat]]:
        """What would compete if the judge refused nothing."""
        shared = {table.name for table in self.shared.values()}
        named = {"auto": TABLE_BITS, "4": (4,), "8": (8,)}.get(self.config.embedding, ())
        blocks = dict.fromkeys(block for _, block in self.formats)
        options = {
            table.name: [
                block_format(bits, block, symmetric, self.config.block_scales)
                for bits in named
                for block in blocks
                for symmetric in self._symmetries()
                if table.width % block == 0
            ]
            for table in self.census.embeddings
            if table.name in self.measured
            and table.name not in shared
            and table.dtype in {"float32", "float16"}
        }
        return {name: formats for name, formats in options.items() if formats}

    def _refusals(self, plan: SitePlan) -> Sequence[Refusal]:
        """What the judge says of a site, and of the table that shares its buffer."""
        assert plan.format is not None
        table = self.shared.get(plan.site)
        found = self.judge(self._sites[plan.site], plan.format)
        return found if found or table is None else self.judge(table, plan.format)

    def _stored_bytes(
        self, sites: Iterable[SitePlan], tables: Mapping[str, BlockFormat | None]
    ) -> int:
        """Size of these weights; a float initializer that several read counts once."""
        sizes: dict[str, int] = {}
        for plan in sites:
            site = self._sites[plan.site]
            if plan.format is None:
                sizes[site.weight] = site.out_features * site.in_features * BYTES_OF[site.dtype]
            else:
                sizes[site.name] = self._site_bytes(plan)
        for name, fmt in tables.items():
            table = self._tables[name]
            if fmt is None:
                sizes[table.weight] = table.rows * table.width * BYTES_OF[table.dtype]
            else:
                sizes[name] = self._table_bytes(table, fmt)
        return sum(sizes.values())

    @staticmethod
    def _table_bytes(table: EmbeddingSite, fmt: BlockFormat) -> int:
        return fmt.weight_bytes(table.rows, table.width, scale_bytes_of(table.dtype))

    def _site_bytes(self, plan: SitePlan) -> int:
        site = self._sites[plan.site]
        assert plan.format is not None
        return plan.format.weight_bytes(
            site.out_features, site.in_features, scale_bytes_of(site.dtype)
        )

    def _unbeaten(self, plans: Iterable[SitePlan]) -> list[SitePlan]:
        """Without those that smaller blocks match in size: where long ones are padded."""
        known: list[SitePlan] = []
        for plan in plans:
            if not self._beaten(plan, known):
                known.append(plan)
        return known

    def _beaten(self, plan: SitePlan, known: Sequence[SitePlan]) -> bool:
        fmt, size = plan.format, self._site_bytes(plan)
        assert fmt is not None
        return any(
            (other.format.code_bits, other.format.symmetric) == (fmt.code_bits, fmt.symmetric)
            and other.format.block_size <= fmt.block_size
            and self._site_bytes(other) <= size
            for other in known
            if other.format is not None
        )

    def _symmetries(self) -> tuple[bool, ...]:
        """Zero points cost a few hundredths of a bit, and not every weight needs them."""
        if self.config.symmetric:
            return (True,)
        return (False,) if self.config.axes.grid == "hqq" else (False, True)  # hqq moves them

    def _fits(self, plan: SitePlan) -> bool:
        """Whether the head's table can be the embedding's as well."""
        assert plan.format is not None
        table = self.shared.get(plan.site)
        if table is None:
            return True
        if self.config.embedding == "shared":
            check_embedding_format(plan.format, width=table.width, embedding=table.name)
            return True
        return plan.format.storage_bits in TABLE_BITS

    def _stays_float(self, head: str) -> bool:
        excluded = any(fnmatchcase(head, pattern) for pattern in self.config.exclude)
        return excluded or self.config.lm_head == "keep"
