"""Statistics and sensitivities of one model, collected once and kept in the work folder."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.sensitivity import Sensitivities
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.calibration.collect import Collector, corpus_fingerprint
from faq_onnx.calibration.sensitivity import SensitivityWalk, sensitivity_windows
from faq_onnx.config import Method, QuantizeConfig
from faq_onnx.planning.planner import needs_statistics
from faq_onnx.planning.prediction import CoarseRounding
from faq_onnx.progress import SILENT, Progress
from faq_onnx.stages import opening

__all__ = ["Statistics"]

Tokens = npt.NDArray[np.int64]


@dataclasses.dataclass
class Statistics:
    """What configurations of one model need, by calibration windows.

    Attributes:
        opened: The float model.
        work: Holds one folder for each set of windows; a later run finds it again.
        progress: Told what goes on.
        seconds: That collecting took so far.
    """

    opened: opening.OpenedModel
    work: Path
    progress: Progress = SILENT
    seconds: float = 0.0

    def collect(self, windows: Tokens) -> CalibrationStats:
        """Statistics of every group over int64 [windows, length]."""
        census, model = self.opened.census, self.opened.fingerprint[:8]
        home = self.work / f"statistics-{model}-{corpus_fingerprint(windows)[:8]}"
        if (home / "stats" / "stats.json").is_file():
            fingerprint = census.fingerprint()
            return CalibrationStats.open(home / "stats", census_fingerprint=fingerprint)
        everything = QuantizeConfig(method=Method.AWQ, lm_head="4", embedding="keep")
        groups = needs_statistics(census, everything)
        start = time.perf_counter()
        collector = self._collector(home)
        stats, _reference = collector.collect(windows, windows[:0], groups, self.progress)
        self.seconds += time.perf_counter() - start
        shutil.rmtree(home / "walk")
        return stats

    def forget(self) -> None:
        """Remove what was collected; the next to ask collects again."""
        for home in self.work.glob("statistics-*"):
            shutil.rmtree(home)

    def sensitivities(self, stats: CalibrationStats, windows: Tokens) -> Sensitivities:
        """What each weight's error does to the logits, measured on the first windows."""
        path, fingerprint = stats.folder / "sensitivity.json", self.opened.fingerprint
        if path.is_file():
            return Sensitivities.open(path, model_fingerprint=fingerprint)
        opened, first = self.opened, sensitivity_windows(windows)
        coarse = CoarseRounding(opened.census, stats, opened.read, opened.read_table, first)
        folder = stats.folder.parent / "sensitivity"
        walk = SensitivityWalk(
            opened.model, opened.census, self._collector(folder).parts(), folder
        )
        start = time.perf_counter()
        found = Sensitivities(
            model_fingerprint=fingerprint,
            corpus_fingerprint=corpus_fingerprint(first),
            perturbation="see faq_onnx.planning.prediction.COARSE",
            tokens=first.size,
            entries=walk.run(first, coarse, self.progress),
        )
        self.seconds += time.perf_counter() - start
        found.save(path)
        return found

    def _collector(self, folder: Path) -> Collector:
        return Collector(self.opened.model, self.opened.census, self.opened.fingerprint, folder)
