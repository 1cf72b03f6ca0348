"""Which format each site and embedding gets, from the configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from faq_onnx.artifacts.plan import BlockFormat, EmbeddingPlan, SitePlan
from faq_onnx.artifacts.sites import EmbeddingSite, LinearRole, LinearSite, ModelCensus
from faq_onnx.config import Axes, Grid, QuantizeConfig, Rounding
from faq_onnx.errors import ConfigError
from faq_onnx.quant.formats import BLOCK_SIZES, block_format, check_embedding_format

__all__ = ["plan_embeddings", "plan_sites"]

# AWQ does not clip these: their outputs meet in a product of each other (llm-awq auto_clip.py).
_NEVER_CLIPPED = frozenset({LinearRole.Q_PROJ, LinearRole.K_PROJ, LinearRole.QKV_PROJ})


def plan_sites(census: ModelCensus, config: QuantizeConfig) -> tuple[SitePlan, ...]:
    """One plan per site, in census order.

    Raises:
        ConfigError: An --exclude pattern fits no site, nothing is left to quantize, or the grid
            does not go with the format.
        UnsupportedFormatError: A format that no kernel stores.
    """
    _check_patterns(census.sites, config.exclude)
    _check_grid(config)
    tied = {table.tied_site for table in census.embeddings}
    plans = tuple(
        _plan_site(site, config, shares_table=site.name in tied) for site in census.sites
    )
    if all(plan.format is None for plan in plans):
        msg = (
            f"nothing to quantize: --exclude {' '.join(config.exclude) or '(none)'} and "
            f"--lm-head {config.lm_head} leave all {len(plans)} sites float"
        )
        raise ConfigError(msg)
    return plans


def plan_embeddings(
    census: ModelCensus, config: QuantizeConfig, sites: Sequence[SitePlan]
) -> tuple[EmbeddingPlan, ...]:
    """One plan per embedding.

    Raises:
        ConfigError: `shared` was asked for and the head is not tied, or stays float.
    """
    formats = {plan.site: plan.format for plan in sites}
    return tuple(_plan_embedding(table, config, formats) for table in census.embeddings)


def _plan_site(site: LinearSite, config: QuantizeConfig, *, shares_table: bool) -> SitePlan:
    reason = ""
    bits: int = config.bits
    if any(fnmatchcase(site.name, pattern) for pattern in config.exclude):
        reason = "excluded by --exclude"
    elif site.role is LinearRole.LM_HEAD and config.lm_head == "keep":
        reason = "kept float by --lm-head keep"
    elif site.role is LinearRole.LM_HEAD and config.lm_head != "same":
        bits = int(config.lm_head)
    block_size: int = config.block_size
    if shares_table and config.embedding in {"auto", "shared"}:
        block_size = _whole_blocks(site.in_features, block_size)
    fmt = None if reason else block_format(bits, block_size, config.symmetric, config.block_scales)
    grid, rounding = _grid_and_rounding(site, config.axes, fmt)
    return SitePlan(
        site=site.name,
        format=fmt,
        grid=grid,
        rounding=rounding,
        accuracy_level=config.accuracy_level,
        reason=reason,
    )


def _grid_and_rounding(
    site: LinearSite, axes: Axes, fmt: BlockFormat | None
) -> tuple[Grid, Rounding]:
    """What the axes mean for one site.

    At 8 bits the steps are so fine that neither pays. A subgraph cannot be calibrated.
    """
    if fmt is None or fmt.code_bits >= 8:
        return "minmax", "nearest"
    on_activations = axes.grid in {"clip", "search"}
    if (axes.grid == "clip" and site.role in _NEVER_CLIPPED) or (
        on_activations and site.in_subgraph
    ):
        return "minmax", "nearest" if site.in_subgraph else axes.rounding
    return axes.grid, "nearest" if site.in_subgraph else axes.rounding


def _plan_embedding(
    table: EmbeddingSite, config: QuantizeConfig, formats: dict[str, BlockFormat | None]
) -> EmbeddingPlan:
    head = None if table.tied_site is None else formats.get(table.tied_site)
    wish = config.embedding
    if wish == "auto":
        wish = "shared" if head is not None and head.storage_bits in {4, 8} else "keep"
        if wish == "shared" and head is not None and table.width % head.block_size:
            wish = "keep"
    if wish == "keep":
        return EmbeddingPlan(embedding=table.name, format=None, reason="kept float")
    if wish == "shared":
        if table.tied_site is None or head is None:
            found = "has no tied lm_head" if table.tied_site is None else "has a float lm_head"
            msg = (
                f"embedding {table.name}: --embedding shared, but it {found}; choose "
                "--embedding keep, 4 or 8" + ("" if head else ", or --lm-head 4, 8 or same")
            )
            raise ConfigError(msg)
        check_embedding_format(head, width=table.width, embedding=table.name)
        return EmbeddingPlan(embedding=table.name, format=head, shared_with=table.tied_site)
    fmt = block_format(int(wish), config.block_size, config.symmetric, config.block_scales)
    check_embedding_format(fmt, width=table.width, embedding=table.name)
    return EmbeddingPlan(embedding=table.name, format=fmt)


def _whole_blocks(in_features: int, block_size: int) -> int:
    """The largest block up to `block_size` that divides K: what a Gather can read, too."""
    fitting = [b for b in BLOCK_SIZES if b <= block_size and in_features % b == 0]
    return max(fitting, default=block_size)


def _check_grid(config: QuantizeConfig) -> None:
    if config.block_scales == "lpbq" and not config.symmetric:
        msg = (
            "--block-scales lpbq: Qualcomm's low-power block quantization has no zero points; add "
            "--symmetric"
        )
        raise ConfigError(msg)
    if config.symmetric and config.axes.grid == "hqq":
        way = "--method hqq" if config.rounding.grid == "method" else "--grid hqq"
        msg = (
            f"{way} with --symmetric: it moves zero points, and a symmetric format has none; "
            "choose --asymmetric, or another grid: minmax, clip, search or k-quant"
        )
        raise ConfigError(msg)


def _check_patterns(sites: Sequence[LinearSite], patterns: Sequence[str]) -> None:
    unused = [p for p in patterns if not any(fnmatchcase(site.name, p) for site in sites)]
    if unused:
        names = ", ".join(site.name for site in sites[:3])
        msg = (
            f"--exclude {' '.join(unused)}: fits none of the {len(sites)} sites; names look like "
            f"{names} (see `faq-onnx inspect`)"
        )
        raise ConfigError(msg)
