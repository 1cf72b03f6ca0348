"""What only a budget needs of a conversion: refuse one that cannot be met, measure, plan under it.

The measuring is calibration's and the choice is planning's; neither room knows the other, so they
meet here.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import EmbeddingPlan, SitePlan
from faq_onnx.artifacts.record import fingerprint_bytes
from faq_onnx.artifacts.sensitivity import Sensitivities
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.calibration.collect import Collector, corpus_fingerprint
from faq_onnx.calibration.sensitivity import SensitivityWalk, sensitivity_windows
from faq_onnx.config import QuantizeConfig
from faq_onnx.errors import ConfigError, PlanError
from faq_onnx.graph.io import INLINE_LIMIT_BYTES
from faq_onnx.planning.budget import Budget, BudgetKind, check_size, parse_budget
from faq_onnx.planning.candidates import FormatCandidates, Judge
from faq_onnx.planning.planner import PlannedModel, make_plan
from faq_onnx.planning.prediction import COARSE_NAME, CoarseRounding
from faq_onnx.progress import Progress
from faq_onnx.stages.fusing import rotary_table_bytes
from faq_onnx.stages.opening import OpenedModel

__all__ = [
    "Outlook",
    "check_budget",
    "look_ahead",
    "measure_sensitivity",
    "plan_under_budget",
]

SENSITIVITY_NAME = "sensitivity.json"


def check_budget(config: QuantizeConfig) -> None:
    """Refuse a wrong budget before anything is read.

    Raises:
        ConfigError: It cannot be read, or allows more than verification does.
    """
    if config.budget is None:
        return
    budget = parse_budget(config.budget)
    if (
        isinstance(budget, Budget)
        and budget.kind is BudgetKind.KL
        and budget.limit > config.verify.max_kl
    ):
        msg = (
            f"--budget {budget} allows more than --max-kl {config.verify.max_kl:g}, so its result "
            "would be refused; ask for less, or raise --max-kl"
        )
        raise ConfigError(msg)


@dataclasses.dataclass(frozen=True)
class Outlook:
    """What a budget can buy, known before anything is measured.

    Attributes:
        budget: The limit; `same` as a size.
        candidates: What competes.
        other_bytes: Of the file that are not weights of sites or embeddings.
    """

    budget: Budget
    candidates: FormatCandidates
    other_bytes: int

    @property
    def sites(self) -> tuple[SitePlan, ...]:
        """Each in its smallest format; where the target runs none, in one that it refuses."""
        return self.candidates.site_plans(self.candidates.smallest())

    @property
    def embeddings(self) -> tuple[EmbeddingPlan, ...]:
        """As `sites`."""
        return self.candidates.table_plans(self.candidates.smallest())

    @property
    def file_bytes(self) -> int:
        """About what the file will have: the budget, where that is a size within reach."""
        sizes, fixed = self.candidates.sizes.values(), self._fixed_bytes
        least, most = (fixed + sum(map(end, sizes)) for end in (min, max))
        wish = {
            BudgetKind.BYTES: self.budget.limit,
            BudgetKind.BITS_PER_WEIGHT: fixed + self.budget.limit * self.candidates.weights / 8,
            BudgetKind.KL: least,
        }[self.budget.kind]
        return int(min(max(wish, least), most))

    def check(self, target: str) -> None:
        """Refuse a size that not even the smallest formats keep.

        Raises:
            PlanError: Says the smallest size, and which formats the target left out.
        """
        sizes = tuple(self.candidates.sizes.values())
        try:
            check_size(self.budget, sizes, self.candidates.weights, self._fixed_bytes)
        except PlanError as error:
            refused = self.candidates.refused()
            if refused:
                error.add_note(
                    f"{len(refused)} formats that {target} does not run were left out; the first: "
                    f"{refused[0].place}: {refused[0].found}"
                )
            raise

    @property
    def _fixed_bytes(self) -> int:
        return self.other_bytes + self.candidates.fixed_bytes


def look_ahead(opened: OpenedModel, config: QuantizeConfig, judge: Judge) -> Outlook:
    """Which formats will compete.

    Args:
        opened: The float model.
        config: With a budget.
        judge: What it refuses does not compete.
    """
    assert config.budget is not None
    census, wish = opened.census, parse_budget(config.budget)
    names = [site.name for site in census.sites if not site.in_subgraph]  # what can be measured
    names += [table.name for table in census.embeddings]
    candidates = FormatCandidates(census, config, frozenset(names), judge=judge)
    about = candidates.limit(wish, other_bytes=0)
    large = about.kind is BudgetKind.BYTES and about.limit >= INLINE_LIMIT_BYTES
    other_bytes = _other_bytes(opened, config, external=config.external_data or large)
    return Outlook(candidates.limit(wish, other_bytes), candidates, other_bytes)


def measure_sensitivity(
    opened: OpenedModel,
    stats: CalibrationStats,
    calibration: npt.NDArray[np.int64],
    work: Path,
    progress: Progress,
) -> None:
    """Write what each weight's error does to the logits beside the statistics.

    Args:
        opened: The float model.
        stats: Of the same model; a measurement in their folder that fits is taken as it is.
        calibration: Token ids, int64 [n, length].
        work: Holds hidden states meanwhile.
        progress: Receives the runs.
    """
    windows = sensitivity_windows(calibration)
    path = stats.folder / SENSITIVITY_NAME
    corpus = corpus_fingerprint(windows)
    identity = (opened.fingerprint, corpus, stats.manifest.corpus_fingerprint)
    wanted = Sensitivities(
        model_fingerprint=opened.fingerprint,
        corpus_fingerprint=fingerprint_bytes("|".join(identity).encode()),
        perturbation=COARSE_NAME,
        tokens=windows.size,
        entries=(),
    )
    if path.is_file() and Sensitivities.load(path).model_copy(update={"entries": ()}) == wanted:
        progress.note(f"taking the sensitivities in {path}")
        return
    folder = work / "sensitivity"
    coarse = CoarseRounding(opened.census, stats, opened.read, opened.read_table, windows)
    parts = Collector(opened.model, opened.census, opened.fingerprint, work).parts()
    walk = SensitivityWalk(opened.model, opened.census, parts, folder)
    entries = walk.run(windows, coarse, progress)
    wanted.model_copy(update={"entries": entries}).save(path)
    shutil.rmtree(folder)


def plan_under_budget(
    opened: OpenedModel,
    config: QuantizeConfig,
    stats: CalibrationStats,
    judge: Judge,
    progress: Progress,
) -> PlannedModel:
    """`make_plan` with the sensitivities beside the statistics, of formats that `judge` allows.

    Raises:
        StatsMismatchError: They are missing, or of another model.
        PlanError: The budget cannot be met.
    """
    assert config.budget is not None
    sensitivities = Sensitivities.open(
        stats.folder / SENSITIVITY_NAME, model_fingerprint=opened.fingerprint
    )
    return make_plan(
        opened.census,
        config,
        stats,
        opened.read,
        progress,
        sensitivities=sensitivities,
        read_table=opened.read_table,
        other_bytes=look_ahead(opened, config, judge).other_bytes,
        judge=judge,
    )


def _other_bytes(opened: OpenedModel, config: QuantizeConfig, *, external: bool) -> int:
    """Of the file that are not weights of sites or embeddings."""
    found = opened.other_bytes(config.block_scales, external=external)
    if config.fuse_attention:
        found += rotary_table_bytes(opened.model, opened.source)
    return found
