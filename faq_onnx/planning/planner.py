"""Put the decisions together, and keep them on disk: plan.json and scales.safetensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from faq_onnx.artifacts.plan import (
    EmbeddingPlan,
    GroupPlan,
    QuantPlan,
    ScaleApplication,
    SitePlan,
)
from faq_onnx.artifacts.sensitivity import Sensitivities
from faq_onnx.artifacts.sites import LinearSite, ModelCensus
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.config import QuantizeConfig
from faq_onnx.errors import PlanError, StatsMismatchError
from faq_onnx.planning.budget import parse_budget
from faq_onnx.planning.candidates import Judge, run_anywhere
from faq_onnx.planning.formats import plan_embeddings, plan_sites
from faq_onnx.planning.mixed import MixedPlanner, describe_trade_off
from faq_onnx.planning.prediction import ReadTable
from faq_onnx.planning.scales import (
    GroupChoice,
    ScalePlanner,
    scaled_groups,
    settle_statistic,
)
from faq_onnx.progress import SILENT, Progress
from faq_onnx.quant.site import looks_at_activations

__all__ = ["PlannedModel", "check_statistics", "make_plan", "needs_statistics"]

Array = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class PlannedModel:
    """A plan with its arrays.

    Attributes:
        plan: The decisions.
        scales: Channel scale by group name, float32 [K]; groups without one are missing.
    """

    plan: QuantPlan
    scales: dict[str, Array]

    def save(self, folder: Path) -> None:
        """Write plan.json and scales.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        self.plan.save(folder / "plan.json")
        save_file(self.scales, folder / "scales.safetensors")

    @staticmethod
    def load_plan(folder: Path) -> QuantPlan:
        """The decisions alone, of whatever model.

        Raises:
            PlanError: Nothing there.
        """
        path = folder / "plan.json"
        if not path.is_file():
            msg = f"{folder} holds no plan ({path.name} is missing); make one with `faq-onnx plan`"
            raise PlanError(msg)
        return QuantPlan.load(path)

    @classmethod
    def load(cls, folder: Path, *, census_fingerprint: str) -> PlannedModel:
        """Read what `save` wrote.

        Raises:
            PlanError: Nothing there, or made for another model.
        """
        plan = cls.load_plan(folder)
        if plan.census_fingerprint != census_fingerprint:
            msg = f"{folder}: the plan was made for another model; run `faq-onnx plan` on this one"
            raise PlanError(msg)
        scales = folder / "scales.safetensors"
        try:
            return cls(plan, load_file(scales))
        except (OSError, SafetensorError) as error:
            msg = f"{scales}: cannot be read ({error}); run `faq-onnx plan` again"
            raise PlanError(msg) from error


def needs_statistics(census: ModelCensus, config: QuantizeConfig) -> list[str]:
    """Names of the groups whose statistics `make_plan`, grids and rounding will read.

    A budget weighs every site's error, so it needs all that can be collected.
    """
    plans = plan_sites(census, config)
    judged = {plan.site for plan in plans if looks_at_activations(plan)}
    scaled = _applications(census, config, plans, plan_embeddings(census, config, plans))
    wanted = [
        group
        for group in census.groups
        if config.budget is not None
        or scaled[group.name] is not ScaleApplication.NONE
        or judged & set(group.sites)
    ]
    in_graph = {site.name for site in census.sites if not site.in_subgraph}
    return [group.name for group in wanted if in_graph & set(group.sites)]


def check_statistics(plan: QuantPlan, census: ModelCensus, stats: CalibrationStats | None) -> None:
    """Make sure that grids and rounding will find their statistics: else they would be plain.

    Raises:
        StatsMismatchError: None were given, or they lack groups that the plan needs.
    """
    judged = {site.site for site in plan.sites if looks_at_activations(site)}
    wanted = [group.name for group in census.groups if judged & set(group.sites)]
    missing = [name for name in wanted if stats is None or not stats.has(name)]
    if missing:
        found = "no statistics were given" if stats is None else f"{stats.folder} lacks some"
        msg = (
            f"the plan judges the weights of {len(wanted)} scale groups on their activations, but "
            f"{found} (first: {missing[0]}); give --stats with the folder that the plan was made "
            "from, or plan with --grid minmax --rounding nearest"
        )
        raise StatsMismatchError(msg)


def _applications(
    census: ModelCensus,
    config: QuantizeConfig,
    sites: Sequence[SitePlan],
    embeddings: Sequence[EmbeddingPlan],
) -> dict[str, ScaleApplication]:
    shared = {plan.shared_with for plan in embeddings if plan.shared_with is not None}
    return scaled_groups(census, config, {plan.site: plan.format for plan in sites}, shared)


def make_plan(  # noqa: PLR0913 - one argument per input of the stage
    census: ModelCensus,
    config: QuantizeConfig,
    stats: CalibrationStats | None,
    read_weight: Callable[[LinearSite], Array],
    progress: Progress = SILENT,
    *,
    sensitivities: Sensitivities | None = None,
    read_table: ReadTable | None = None,
    other_bytes: int = 0,
    judge: Judge = run_anywhere,
) -> PlannedModel:
    """Decide formats and channel scales.

    Args:
        census: Of the model.
        config: The wish.
        stats: Calibration statistics; None is enough for RTN.
        read_weight: The float weight of a site, float32 [N, K].
        progress: Shows the scale search.
        sensitivities: What each weight's error does to the logits; only a budget needs them.
        read_table: The float table of an embedding, float32 [rows, width]; for a budget, too.
        other_bytes: Size of the file without the weights of sites and embeddings.
        judge: Formats that it refuses do not compete under a budget.

    Raises:
        PlanError: The wish cannot be planned, or statistics are missing.
    """
    trade_off = None
    wish, config = config, settle_statistic(config, stats, progress)
    if config.budget is None:
        sites = plan_sites(census, config)
        embeddings = plan_embeddings(census, config, sites)
    elif stats is None or sensitivities is None or read_table is None:
        msg = (
            f"--budget {config.budget} needs statistics and sensitivities; run "
            f"`faq-onnx calibrate --budget {config.budget}` and give --stats"
        )
        raise PlanError(msg)
    else:
        mixer = MixedPlanner(census, config, stats, sensitivities, read_weight, read_table)
        mixer = dataclasses.replace(mixer, other_bytes=other_bytes, judge=judge)
        mixed = mixer.choose(parse_budget(config.budget), progress)
        sites, embeddings = mixed.sites, mixed.embeddings
        trade_off = describe_trade_off(config.budget, mixed)
    choices = _choose_scales(census, config, stats, sites, embeddings, read_weight, progress)
    plan = QuantPlan(
        census_fingerprint=census.fingerprint(),
        method=config.method.value,
        sites=sites,
        groups=tuple(choice.plan for choice in choices),
        embeddings=embeddings,
        config=wish,
        trade_off=trade_off,
        channel_scales=config.axes.scales,
    )
    return PlannedModel(plan, {c.plan.group: c.scale for c in choices if c.scale is not None})


def _choose_scales(  # noqa: PLR0913, PLR0917 - the second half of `make_plan`
    census: ModelCensus,
    config: QuantizeConfig,
    stats: CalibrationStats | None,
    sites: Sequence[SitePlan],
    embeddings: Sequence[EmbeddingPlan],
    read_weight: Callable[[LinearSite], Array],
    progress: Progress,
) -> list[GroupChoice]:
    if stats is None:
        if config.axes.calibrates:
            msg = (
                f"--method {config.method} needs calibration statistics; run `faq-onnx calibrate`"
            )
            raise PlanError(msg)
        return [_identity(group.name) for group in census.groups]
    planner = ScalePlanner(census, config, stats, {s.site: s for s in sites}, read_weight)
    return planner.choose(_applications(census, config, sites, embeddings), progress)


def _identity(group: str) -> GroupChoice:
    return GroupChoice(GroupPlan(group=group, application=ScaleApplication.NONE), None)
