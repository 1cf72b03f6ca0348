"""Measure many conversions of one model on the same statistics and the same tokens.

The model is calibrated once with every statistic that any method needs; each configuration is
then planned, applied to a fresh graph, written, run through onnxruntime and compared with the
float model, window by window, so that every figure is paired.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx import stages
from faq_onnx.analysis import canonicalise
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.calibration.collect import Collector
from faq_onnx.calibration.corpus import load_corpus
from faq_onnx.calibration.walk import ReferenceLogits
from faq_onnx.config import CalibrationConfig, Method, QuantizeConfig
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.pipeline import path_windows
from faq_onnx.planning.planner import PlannedModel, make_plan, needs_statistics
from faq_onnx.progress import SILENT, Progress
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.verify.logits import LogitComparison

__all__ = ["Bench", "Figure", "evaluate_file"]

Tokens = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured configuration.

    Attributes:
        name: What it is called in the table.
        accuracy_level: Of the MatMulNBits nodes.
        kl_nats: Mean KL(float || low-bit) over all positions, nats/token.
        kl_windows: The same per window, for paired comparisons.
        top1: Share of positions with the same argmax.
        perplexity: Of the low-bit model.
        perplexity_float: Of the source.
        size_bytes: Of the file.
        plan_s: Seconds that planning took.
        quantize_s: Seconds that folding and quantizing took.
    """

    name: str
    accuracy_level: int
    kl_nats: float
    kl_windows: tuple[float, ...]
    top1: float
    perplexity: float
    perplexity_float: float
    size_bytes: int
    plan_s: float
    quantize_s: float


@dataclasses.dataclass
class Bench:
    """One calibrated model.

    Attributes:
        source: ONNX folder or file.
        opened: The model, as loaded.
        stats: All statistics.
        reference: Float logits of the evaluation windows.
        work: Scratch folder.
        calibrate_s: Seconds that the walk took.
        windows: Calibration ids, int64 [windows, length].
    """

    source: str
    opened: stages.OpenedModel
    stats: CalibrationStats
    reference: ReferenceLogits
    work: Path
    calibrate_s: float
    windows: Tokens

    @classmethod
    def prepare(  # noqa: PLR0913 - a bench has many knobs
        cls,
        source: str,
        work: Path,
        *,
        calibration: CalibrationConfig,
        evaluation: str,
        windows: int,
        progress: Progress = SILENT,
    ) -> Bench:
        """Calibrate once; `evaluation` is a text file, or "heldout" for calibration's own rest."""
        opened = stages.open_model(source, work, progress)
        tokens = load_corpus(
            calibration,
            source=opened.source,
            vocabulary=opened.vocabulary,
            count=calibration.samples,
            holdout=0 if evaluation != "heldout" else windows,
            progress=progress,
        )
        held_out = tokens.heldout
        if evaluation != "heldout":
            settings = calibration.model_copy(update={"source": evaluation})
            held_out = load_corpus(
                settings,
                source=opened.source,
                vocabulary=opened.vocabulary,
                count=windows,
                holdout=0,
                progress=progress,
            ).calibration
        everything = QuantizeConfig(method=Method.AWQ, lm_head="4", embedding="keep")
        groups = needs_statistics(opened.census, everything)
        start = time.perf_counter()
        collector = Collector(opened.model, opened.census, opened.fingerprint, work)
        stats, reference = collector.collect(tokens.calibration, held_out, groups, progress)
        seconds = time.perf_counter() - start
        return cls(source, opened, stats, reference, work, seconds, tokens.calibration)

    def measure(
        self, name: str, config: QuantizeConfig, levels: Sequence[int] = (4, 0)
    ) -> list[Figure]:
        """Convert with `config` and evaluate at each accuracy level."""
        fresh = self.fresh()
        start = time.perf_counter()
        planned = make_plan(fresh.census, config, self.stats, fresh.read)
        plan_s = time.perf_counter() - start
        return self.finish(name, fresh, planned, plan_s, levels)

    def finish(
        self,
        name: str,
        fresh: stages.OpenedModel,
        planned: PlannedModel,
        plan_s: float,
        levels: Sequence[int],
    ) -> list[Figure]:
        """Apply a plan and evaluate the file."""
        start = time.perf_counter()
        if planned.scales:
            stages.fold(fresh, planned)
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            weights = Path(folder) / "weights"
            config = planned.plan.config or QuantizeConfig()
            quantized = stages.quantize(
                fresh,
                planned,
                self.stats if config.axes.calibrates else None,
                {},
                weights,
                SILENT,
                windows=path_windows(config, self.windows),
            )
            stages.rewrite(fresh, planned, quantized.weights)
            quantize_s = time.perf_counter() - start
            figures = []
            for level in levels:
                _set_accuracy_level(fresh.model, level)
                path = Path(folder) / f"model-{level}.onnx"
                size = save_model(fresh.model, path)
                figure = evaluate_file(name, path, self.reference, level)
                figure = dataclasses.replace(
                    figure, size_bytes=size, plan_s=plan_s, quantize_s=quantize_s
                )
                figures.append(figure)
            del quantized, fresh
            gc.collect()
        return figures

    def fresh(self) -> stages.OpenedModel:
        """The model once more: conversions change the graph."""
        model = canonicalise(load_model(self.opened.source.onnx_path))
        return dataclasses.replace(self.opened, model=model)


def write_onnxruntime_rtn(
    source: Path, path: Path, bits: int, block_size: int, level: int
) -> None:
    """The same model through onnxruntime's MatMulNBitsQuantizer (DEFAULT, asymmetric)."""
    import onnx  # noqa: PLC0415 - only this reference needs it
    from onnxruntime.quantization.matmul_nbits_quantizer import (  # noqa: PLC0415
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    settings = DefaultWeightOnlyQuantConfig(
        block_size=block_size, is_symmetric=False, accuracy_level=level, bits=bits
    )
    tool = MatMulNBitsQuantizer(onnx.load(str(source)), algo_config=settings)
    tool.process()
    tool.model.save_model_to_file(str(path))


def evaluate_file(name: str, path: Path, reference: ReferenceLogits, level: int) -> Figure:
    """Compare a written model with the float logits."""
    session = open_session(path)
    total, windows = LogitComparison(), []
    for ids, logits in reference:
        output = session.get_outputs()[0].name
        feeds = decoder_feeds(session.get_inputs(), ids)
        ours = np.asarray(run_session(session, feeds, [output])[output], np.float32)
        one = LogitComparison()
        for comparison in (total, one):
            comparison.add(logits, ours, ids)
        windows.append(one.metrics().kl_nats)
    metrics = total.metrics()
    return Figure(
        name=name,
        accuracy_level=level,
        kl_nats=metrics.kl_nats,
        kl_windows=tuple(windows),
        top1=metrics.top1_agreement,
        perplexity=metrics.perplexity,
        perplexity_float=metrics.perplexity_float,
        size_bytes=path.stat().st_size,
        plan_s=0.0,
        quantize_s=0.0,
    )


@contextlib.contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """A folder to work in: the given one, which is kept, or a temporary one."""
    if given is None:
        with tempfile.TemporaryDirectory(prefix="faq-onnx-bench-") as folder:
            yield Path(folder)
        return
    given.mkdir(parents=True, exist_ok=True)
    yield given


def append_results(path: Path | None, figures: Iterable[Figure], **context: object) -> None:
    """Add figures to a JSON-lines file."""
    if path is None:
        return
    with path.open("a", encoding="utf-8") as file:
        for figure in figures:
            file.write(json.dumps({**dataclasses.asdict(figure), **context}) + "\n")


def _set_accuracy_level(model: ir.Model, level: int) -> None:
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
