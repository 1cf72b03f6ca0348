"""What only a budget needs of a conversion: refuse a wrong one, measure, plan under it.

The measuring is calibration's and the choice is planning's; neither room knows the other, so they
meet here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.record import fingerprint_bytes
from faq_onnx.artifacts.sensitivity import Sensitivities
from faq_onnx.artifacts.sites import ModelCensus
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.calibration.collect import Collector, corpus_fingerprint
from faq_onnx.calibration.sensitivity import SensitivityWalk, sensitivity_windows
from faq_onnx.config import QuantizeConfig
from faq_onnx.errors import ConfigError
from faq_onnx.fuse_stages import rotary_table_bytes
from faq_onnx.graph.io import INLINE_LIMIT_BYTES
from faq_onnx.planning.budget import BudgetKind, parse_budget
from faq_onnx.planning.planner import PlannedModel, make_plan
from faq_onnx.planning.prediction import COARSE_NAME, CoarseRounding
from faq_onnx.progress import Progress
from faq_onnx.stages import OpenedModel

__all__ = ["check_budget", "measure_sensitivity", "plan_under_budget", "stream_bytes"]

SENSITIVITY_NAME = "sensitivity.json"


def check_budget(config: QuantizeConfig) -> None:
    """Refuse a wrong budget before anything is read.

    Raises:
        ConfigError: It cannot be read, or allows more than verification does.
    """
    if config.budget is None:
        return
    budget = parse_budget(config.budget)
    if budget.kind is BudgetKind.KL and budget.limit > config.verify.max_kl:
        msg = (
            f"--budget {budget} allows more than --max-kl {config.verify.max_kl:g}, so its result "
            "would be refused; ask for less, or raise --max-kl"
        )
        raise ConfigError(msg)


def stream_bytes(census: ModelCensus, calibration: npt.NDArray[np.int64]) -> int:
    """Disk for the hidden states of two layers, once for each weight that is perturbed."""
    tokens = sensitivity_windows(calibration).size
    weights = len(census.sites) + len(census.embeddings)
    width = max((table.width for table in census.embeddings), default=0)
    return 2 * 4 * width * tokens * weights


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
    progress: Progress,
) -> PlannedModel:
    """`make_plan` with the sensitivities beside the statistics.

    Raises:
        StatsMismatchError: They are missing, or of another model.
        PlanError: The budget cannot be met.
    """
    assert config.budget is not None
    sensitivities = Sensitivities.open(
        stats.folder / SENSITIVITY_NAME, model_fingerprint=opened.fingerprint
    )
    budget = parse_budget(config.budget)
    large = budget.kind is BudgetKind.BYTES and budget.limit >= INLINE_LIMIT_BYTES
    other_bytes = opened.other_bytes(config.block_scales, external=config.external_data or large)
    if config.fuse_attention:
        other_bytes += rotary_table_bytes(opened.model, opened.source)
    return make_plan(
        opened.census,
        config,
        stats,
        opened.read,
        progress,
        sensitivities=sensitivities,
        read_table=opened.read_table,
        other_bytes=other_bytes,
    )
