"""Formats that compete for the weights under a budget."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from faq_onnx.artifacts.plan import BlockFormat, SitePlan
from faq_onnx.artifacts.sites import EmbeddingSite, ModelCensus
from faq_onnx.config import QuantizeConfig
from faq_onnx.planning.formats import plan_sites
from faq_onnx.quant.formats import BLOCK_SIZES, block_format, check_embedding_format

__all__ = ["FORMATS", "FormatCandidates"]

# Bits and block sizes that compete; 3-bit codes take 4 bits of storage, so they never would win.
# No kernel is fast for 2 bits in blocks of 256.
FORMATS = (
    *((2, block) for block in (32, 64, 128)),
    *((4, block) for block in (16, 32, 64, 128, 256)),
    *((8, block) for block in (32, 64, 128, 256)),
)
TABLE_BITS = (4, 8)  # what `--embedding` offers


@dataclasses.dataclass(frozen=True)
class FormatCandidates:
    """Which formats compete for which weight.

    Attributes:
        census: Of the model.
        config: The wish; see `MixedPlanner`.
        measured: Names of sites and embeddings that have a sensitivity; no others compete.
        formats: (bits, block size) that compete, with and without zero points.
    """

    census: ModelCensus
    config: QuantizeConfig
    measured: frozenset[str]
    formats: Sequence[tuple[int, int]] = FORMATS

    def of_sites(self) -> dict[str, list[SitePlan]]:
        """Plans that compete, by site, for measured sites that do not stay float.

        Raises:
            ConfigError: A pattern of `exclude` fits no site.
        """
        head = "keep" if self.config.lm_head == "keep" else "same"
        options: dict[str, list[SitePlan]] = {}
        for (bits, block_size), symmetric in itertools.product(self.formats, self._symmetries()):
            wish: dict[str, object] = {"bits": bits, "block_size": block_size}
            wish |= {"symmetric": symmetric, "lm_head": head}
            for plan in plan_sites(self.census, self.config.model_copy(update=wish)):
                known = options.setdefault(plan.site, [])
                if plan.format is not None and self._fits(plan) and not self._beaten(plan, known):
                    known.append(plan)
        return {name: plans for name, plans in options.items() if plans and name in self.measured}

    def of_tables(self) -> dict[str, list[BlockFormat]]:
        """Formats that compete, by embedding, for tables that compete by themselves."""
        shared = {table.name for table in self.shared.values()}
        options = {
            table.name: self._table_formats(table)
            for table in self.census.embeddings
            if table.name in self.measured
            and table.name not in shared
            and table.dtype in {"float32", "float16"}
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

    def _beaten(self, plan: SitePlan, known: Sequence[SitePlan]) -> bool:
        """Whether smaller blocks of the same kind take no more room: long ones are padded."""
        site, fmt = self.census.site(plan.site), plan.format
        assert fmt is not None
        size = fmt.weight_bytes(site.out_features, site.in_features)
        return any(
            (other.code_bits, other.symmetric) == (fmt.code_bits, fmt.symmetric)
            and other.block_size <= fmt.block_size
            and other.weight_bytes(site.out_features, site.in_features) <= size
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

    def _table_formats(self, table: EmbeddingSite) -> list[BlockFormat]:
        wish = self.config.embedding
        named = {"auto": TABLE_BITS, "4": (4,), "8": (8,)}.get(wish, ())
        blocks = dict.fromkeys(block for _, block in self.formats)
        return [
            block_format(bits, block, symmetric, self.config.block_scales)
            for bits in named
            for block in blocks
            for symmetric in self._symmetries()
            if table.width % block == 0
        ]
