"""Measure many conversions of one model on the same statistics and the same tokens.

The model is opened once, and the float logits of the evaluation windows are kept; each
configuration is planned, applied to a fresh graph, written, run through onnxruntime and compared
with the float model, window by window, so that every figure is paired. Statistics are collected
when the first configuration asks for them, over the windows that `convert` would take for it.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from collecting import Statistics
from figures import Figure
from model_files import bits_per_weight, evaluate_file, set_accuracy_level
from work import load_windows

from faq_onnx.analysis import canonicalise
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.calibration.collect import Collector
from faq_onnx.calibration.walk import ReferenceLogits
from faq_onnx.calibration.windows import path_windows, scale_windows
from faq_onnx.config import CalibrationConfig, QuantizeConfig
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.planning.planner import PlannedModel, make_plan
from faq_onnx.progress import SILENT, Progress
from faq_onnx.stages import opening, quantizing

__all__ = ["Bench"]

Tokens = npt.NDArray[np.int64]


@dataclasses.dataclass
class Bench:
    """One model, its calibration windows and its float logits.

    Attributes:
        source: ONNX folder or file.
        opened: The model, as loaded.
        reference: Float logits of the evaluation windows.
        work: Scratch folder.
        windows: Calibration ids, int64 [windows, length].
        statistics: Collects what configurations need.
        progress: Told what goes on.
    """

    source: str
    opened: opening.OpenedModel
    reference: ReferenceLogits
    work: Path
    windows: Tokens
    statistics: Statistics
    progress: Progress = SILENT

    @classmethod
    def prepare(  # noqa: PLR0913 - a bench has many knobs
        cls,
        source: str,
        work: Path,
        *,
        calibration: CalibrationConfig,
        evaluation: str,
        windows: int,
        pool: int = 0,
        progress: Progress = SILENT,
    ) -> Bench:
        """Open; `evaluation` is a text file, or "heldout" for calibration's own rest."""
        opened = opening.open_model(source, work, progress)
        own = windows if evaluation == "heldout" else 0
        tokens = load_windows(opened, calibration, pool=pool, holdout=own, progress=progress)
        held_out = tokens.heldout
        if evaluation != "heldout":
            text = calibration.model_copy(update={"source": evaluation, "samples": windows})
            held_out = load_windows(opened, text, progress=progress).calibration
        collector = Collector(opened.model, opened.census, opened.fingerprint, work)
        name = f"evaluation {opened.fingerprint[:8]}"
        reference = collector.logits(held_out, progress, name)
        statistics = Statistics(opened, work, progress)
        return cls(source, opened, reference, work, tokens.calibration, statistics, progress)

    def recalibrated(self, calibration: CalibrationConfig, *, pool: int = 0) -> Bench:
        """The same model and evaluation windows with other calibration windows."""
        tokens = load_windows(self.opened, calibration, pool=pool, progress=self.progress)
        return dataclasses.replace(self, windows=tokens.calibration)

    @property
    def stats(self) -> CalibrationStats:
        """All statistics, over all calibration windows."""
        return self.statistics.collect(self.windows)

    def stats_for(self, config: QuantizeConfig) -> CalibrationStats | None:
        """What a conversion would have collected; None where it would not calibrate."""
        if config.budget is None and not config.axes.calibrates:
            return None
        return self.statistics.collect(scale_windows(config, self.windows))

    def plan(
        self, fresh: opening.OpenedModel, config: QuantizeConfig, stats: CalibrationStats | None
    ) -> PlannedModel:
        """Formats and channel scales."""
        found = None
        if config.budget is not None and stats is not None:
            found = self.statistics.sensitivities(stats, self.windows)
        return make_plan(
            fresh.census,
            config,
            stats,
            fresh.read,
            self.progress,
            sensitivities=found,
            read_table=fresh.read_table,
            other_bytes=fresh.other_bytes(config.block_scales, external=config.external_data),
        )

    def measure(
        self,
        name: str,
        config: QuantizeConfig,
        levels: Sequence[int] = (4, 0),
        stats: CalibrationStats | None = None,
    ) -> list[Figure]:
        """Convert with `config` and evaluate at each accuracy level; `stats` replace its own."""
        fresh = self.fresh()
        stats = stats or self.stats_for(config)
        if stats is not None and config.budget is not None:
            self.statistics.sensitivities(
                stats, self.windows
            )  # part of calibration, not of planning
        start = time.perf_counter()
        planned = self.plan(fresh, config, stats)
        plan_s = time.perf_counter() - start
        return self.finish(name, fresh, planned, plan_s, levels, stats)

    def finish(  # noqa: PLR0913, PLR0917 - the second half of `measure`
        self,
        name: str,
        fresh: opening.OpenedModel,
        planned: PlannedModel,
        plan_s: float,
        levels: Sequence[int],
        stats: CalibrationStats | None = None,
    ) -> list[Figure]:
        """Apply a plan and evaluate the file."""
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            quantized = self.quantize(fresh, planned, stats, Path(folder) / "weights")
            bits = bits_per_weight(quantized.weights)
            quantizing.rewrite(fresh, planned, quantized.weights)
            quantize_s = time.perf_counter() - start
            figures = []
            for level in levels:
                set_accuracy_level(fresh.model, level)
                path = Path(folder) / f"model-{level}.onnx"
                size = save_model(fresh.model, path)
                figure = evaluate_file(name, path, self.reference, level)
                figure = dataclasses.replace(
                    figure,
                    size_bytes=size,
                    plan_s=plan_s,
                    quantize_s=quantize_s,
                    bits_per_weight=bits,
                )
                figures.append(figure)
            del quantized, fresh
            gc.collect()
        return figures

    def quantize(
        self,
        fresh: opening.OpenedModel,
        planned: PlannedModel,
        stats: CalibrationStats | None,
        folder: Path,
    ) -> quantizing.Quantized:
        """Fold the scales into a fresh model and quantize it as `convert` would."""
        if planned.scales:
            quantizing.fold(fresh, planned)
        config = planned.plan.config or QuantizeConfig()
        if stats is None:
            stats = self.stats_for(config)
        windows = path_windows(config, self.windows)
        return quantizing.quantize(
            fresh, planned, stats, {}, folder, self.progress, windows=windows
        )

    def fresh(self) -> opening.OpenedModel:
        """The model once more: conversions change the graph."""
        model = canonicalise(load_model(self.opened.source.onnx_path))
        return dataclasses.replace(self.opened, model=model)
