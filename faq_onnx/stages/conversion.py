"""The stages of one conversion, with what they pass on to each other.

`faq_onnx.pipeline` has the commands that are made of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from faq_onnx.artifacts.plan import BlockFormat, EmbeddingPlan, SitePlan
from faq_onnx.artifacts.record import fingerprint_bytes
from faq_onnx.artifacts.run import RunReport, StageTime
from faq_onnx.artifacts.sites import EmbeddingSite, LinearSite
from faq_onnx.artifacts.source import stated_context
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.artifacts.target import Refusal
from faq_onnx.artifacts.verification import SiteError
from faq_onnx.calibration.collect import Collector
from faq_onnx.calibration.corpus import TokenWindows, load_corpus
from faq_onnx.calibration.space import disk_space
from faq_onnx.calibration.walk import ReferenceLogits
from faq_onnx.calibration.windows import path_windows, scale_windows
from faq_onnx.config import CalibrationConfig, QuantizeConfig
from faq_onnx.errors import PackageError
from faq_onnx.planning.formats import plan_embeddings, plan_sites
from faq_onnx.planning.planner import PlannedModel, make_plan, needs_statistics
from faq_onnx.progress import Progress
from faq_onnx.stages import budgeting, checks, opening, packaging, quantizing, run_report
from faq_onnx.stages.fusing import MODEL_NAME, save_package_model
from faq_onnx.stages.outline import outline_of_plan, planned_weight
from faq_onnx.stages.rotating import rotate
from faq_onnx.targets.package import check_free_space, name_full_disk
from faq_onnx.targets.protocol import Target

__all__ = ["Run", "open_stats", "work_folder"]

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class Run:
    """One conversion: where it works, for which target, how long its stages took, whom it tells.

    Attributes:
        work: Intermediate artifacts.
        progress: Receives stages and notes.
        config: What to do.
        target: Whose limits hold; None where nothing is packaged.
        force: Accept a result that verification complains about.
        times: Of the stages so far.
    """

    work: Path
    progress: Progress
    config: QuantizeConfig
    target: Target | None = None
    force: bool = False
    times: list[StageTime] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Clock a stage."""
        start = time.perf_counter()
        yield
        duration = time.perf_counter() - start
        self.times.append(StageTime(stage=stage, duration_s=round(duration, 3)))
        _LOG.info("%s took %.1f s", stage, duration)

    def open(self, source: str) -> opening.OpenedModel:
        """Open the source and plan its formats: a wrong wish fails here, not in an hour.

        The model is rotated where that is asked for; weights are computed when they are read.
        """
        budgeting.check_budget(self.config)
        with self.timed("open"):
            loaded = opening.load_source(source, self.work, self.progress)
            opened = opening.understand(*loaded, self.progress)
            if self.target is not None:
                self.target.check_source(opened.source, opened.model)
            opened = rotate(opened, self.config)
            formats = plan_sites(opened.census, self.config)
            tables = plan_embeddings(opened.census, self.config, formats)
            if self.config.budget is None:
                self.check_target(opened, formats, tables)
            else:
                self._look_ahead(opened)
            opening.check_weights(opened.given)
        return opened

    def judge(self, weight: LinearSite | EmbeddingSite, fmt: BlockFormat) -> tuple[Refusal, ...]:
        """Why the target would not run a weight in that format."""
        if self.target is None:
            return ()
        return self.target.weight_refusals(planned_weight(weight, fmt))

    def check_target(
        self,
        opened: opening.OpenedModel,
        sites: Sequence[SitePlan],
        embeddings: Sequence[EmbeddingPlan],
        *,
        file_bytes: int | None = None,
    ) -> None:
        """Refuse what the target would not run.

        Args:
            opened: The float model.
            sites: A plan for each.
            embeddings: A plan for each.
            file_bytes: Of the finished model, where that is not what the plans come to.

        Raises:
            UnsupportedFormatError: See `packaging.check_limits`.
        """
        if self.target is not None:
            fuse = self.config.fuse_attention
            outline = outline_of_plan(opened, sites, embeddings, fuse_attention=fuse)
            if file_bytes is not None:
                outline = outline.model_copy(update={"model_bytes": file_bytes})
            packaging.check_limits(self.target, outline)

    def _look_ahead(self, opened: opening.OpenedModel) -> None:
        """Refuse a budget that no measurement would help.

        Raises:
            UnsupportedFormatError: The target runs no format of a weight, or no model like this.
            PlanError: What it runs is larger than the budget.
        """
        found = budgeting.look_ahead(opened, self.config, self.judge)
        sites, embeddings = found.sites, found.embeddings
        self.check_target(opened, sites, embeddings, file_bytes=found.file_bytes)
        found.check("" if self.target is None else self.target.name)

    def tokens(self, opened: opening.OpenedModel, *, calibrate: bool = True) -> TokenWindows:
        """Calibration and held-out windows; the same held-out ones for every method.

        No window is longer than the model's context.
        """
        settings = self._text_settings(opened)
        written = settings.source == "self"
        needed = calibrate and (self.config.axes.calibrates or self.config.budget is not None)
        with self.timed("tokens"):
            wish = f"{opened.fingerprint} {settings} {self.config.verify.samples} {needed}"
            key = fingerprint_bytes(wish.encode())
            kept = self.work / f"self-text-{key[:16]}.npz"
            if written and kept.is_file():
                self.progress.note(f"taking the calibration text in {kept}")
                return TokenWindows.load(kept)
            windows = load_corpus(
                settings,
                source=opened.source,
                vocabulary=opened.vocabulary,
                count=0 if written and not needed else settings.count,
                holdout=self.config.verify.samples,
                progress=self.progress,
            )
            if written:
                windows.save(kept)
            return windows

    def windows_of(self, text: str, opened: opening.OpenedModel) -> TokenWindows:
        """The first windows of a text, all held out, as many as `verify.samples` says."""
        settings = self._text_settings(opened).model_copy(update={"source": text})
        return load_corpus(
            settings,
            source=opened.source,
            vocabulary=opened.vocabulary,
            count=0,
            holdout=self.config.verify.samples,
            progress=self.progress,
        )

    def _text_settings(self, opened: opening.OpenedModel) -> CalibrationConfig:
        """Those of the configuration, with windows that the model's context holds."""
        settings = self.config.calibration
        context = stated_context(opening.read_config(opened.source))
        if context is None or context >= settings.sequence_length:
            return settings
        self.progress.note(
            f"windows of {context} tokens, which is all that the model's config.json allows; "
            f"{settings.sequence_length} were asked for"
        )
        return settings.model_copy(update={"sequence_length": context})

    def reference(self, opened: opening.OpenedModel, windows: TokenWindows) -> ReferenceLogits:
        """Logits of the float model, as it came, on the held-out windows."""
        collector = self._collector(opened.given)
        return collector.logits(windows.heldout, self.progress, "float model")

    def calibrate(
        self, opened: opening.OpenedModel, windows: TokenWindows
    ) -> tuple[CalibrationStats, ReferenceLogits]:
        """Statistics that the settings need, and the float model's logits."""
        groups = needs_statistics(opened.census, self.config)
        check_free_space(self.work, disk_space(opened.census, self.config, windows, groups))
        unrotated = None
        if opened.unrotated is not None:
            with self.timed("check the rotation"):
                unrotated = self.reference(opened, windows)
                self.check_rewrite(opened, unrotated, "rotation", "check the rotated model")
        with self.timed("calibrate"):
            stats, reference = self._collector(opened).collect(
                scale_windows(self.config, windows.calibration),
                windows.heldout,
                groups,
                self.progress,
            )
        if self.config.budget is not None:
            with self.timed("measure sensitivity"):
                budgeting.measure_sensitivity(
                    opened, stats, windows.calibration, self.work, self.progress
                )
        return stats, unrotated or reference

    def plan(self, opened: opening.OpenedModel, stats: CalibrationStats | None) -> PlannedModel:
        """Formats and channel scales."""
        if self.config.budget is None or stats is None:
            return make_plan(opened.census, self.config, stats, opened.read, self.progress)
        planned = budgeting.plan_under_budget(
            opened, self.config, stats, self.judge, self.progress
        )
        self.check_target(opened, planned.plan.sites, planned.plan.embeddings)
        return planned

    def apply(  # noqa: PLR0913 - joins the artifacts of all stages before it
        self,
        opened: opening.OpenedModel,
        planned: PlannedModel,
        stats: CalibrationStats | None,
        reference: ReferenceLogits,
        *,
        windows: TokenWindows,
        folder: Path,
    ) -> RunReport:
        """Quantize, write, verify and package."""
        assert self.target is not None
        size = opening.source_bytes(opened.source, opened.given.model)
        error, errors = self._quantize(opened, planned, stats, reference, windows)
        with self.timed("save"):
            saved = save_package_model(
                opened.model,
                opened.source,
                folder,
                self.work,
                fuse_attention=self.config.fuse_attention,
                external_data=self.config.external_data,
            )
        with self.timed("verify"):
            logits = checks.compare_to_reference(folder / MODEL_NAME, reference, self.progress)
            path = folder / MODEL_NAME
            report = checks.verify_file(path, logits, errors, error, self.progress)
            notes = [*checks.judge(report, self.config, force=self.force)]
            notes += [checks.slow_note(report.structure), checks.scales_note(self.config)]
            notes += [checks.budget_note(planned.plan.trade_off, logits, saved.bytes)]
        with self.timed("package"):
            finished = packaging.Finished(opened.source, folder, self.work, saved)
            prompt = [int(token) for token in reference.windows[0]]
            manifest = packaging.make_package(
                finished, self.target, prompt, self.progress, force=self.force
            )
        notes = [note for note in (*notes, *manifest.notes) if note]
        news = {"notes": tuple(notes), "proof": manifest.proof, "attention": saved.fusion}
        for note in notes:
            self.progress.note(note)
        result = run_report.make_report(
            opened,
            planned,
            report.model_copy(update=news),
            config=self.config,
            times=self.times,
            totals=(size, manifest.model_bytes),
            calibration_tokens=self._tokens_seen(stats, windows),
        )
        run_report.write_report(result, folder, manifest.usage)
        return result

    def _tokens_seen(self, stats: CalibrationStats | None, windows: TokenWindows) -> int:
        """Tokens of the walk that rounding follows; without one, of the statistics."""
        walked = path_windows(self.config, windows.calibration)
        if walked is not None:
            return walked.size
        return 0 if stats is None else stats.manifest.tokens

    def _quantize(
        self,
        opened: opening.OpenedModel,
        planned: PlannedModel,
        stats: CalibrationStats | None,
        reference: ReferenceLogits,
        windows: TokenWindows,
    ) -> tuple[float | None, tuple[SiteError, ...]]:
        """Low-bit nodes in the graph; errors of folding and of each site."""
        with self.timed("fold"):
            marks = quantizing.rtn_marks(opened, planned)
            error = self._fold(opened, planned, reference)
        with self.timed("quantize"):
            quantized = quantizing.quantize(
                opened,
                planned,
                stats,
                marks,
                self.work / "weights",
                self.progress,
                windows=path_windows(self.config, windows.calibration),
            )
            quantizing.rewrite(opened, planned, quantized.weights)
        return error, quantized.errors

    def _fold(
        self, opened: opening.OpenedModel, planned: PlannedModel, reference: ReferenceLogits
    ) -> float | None:
        """Fold the scales and prove on one window that nothing changed."""
        if not planned.scales and opened.unrotated is None:
            return None
        quantizing.fold(opened, planned)
        what = "folding the channel scales"
        return self.check_rewrite(opened, reference, what, "check the folded model")

    def check_rewrite(
        self, opened: opening.OpenedModel, reference: ReferenceLogits, what: str, title: str
    ) -> float:
        """Prove on one window that the float graph computes what the source does.

        Args:
            opened: The graph, as it was rewritten.
            reference: Logits of the model as it came.
            what: The rewrite, for the message of a failure.
            title: Of the progress.

        Returns:
            Largest change of a logit over the largest logit.

        Raises:
            VerificationError: It does not.
        """
        one = dataclasses.replace(reference, windows=reference.windows[:1])
        collector = self._collector(opened)
        error = checks.fold_error(collector.logits(one.windows, self.progress, title), one)
        dtypes = {site.dtype for site in opened.census.sites}
        checks.check_fold(error, dtypes, opened.census.layer_count, what)
        return error

    def _collector(self, opened: opening.OpenedModel) -> Collector:
        return Collector(opened.model, opened.census, opened.fingerprint, self.work)


def open_stats(folder: Path | None, opened: opening.OpenedModel) -> CalibrationStats | None:
    """Statistics of an earlier `calibrate`, which must be of this model."""
    if folder is None:
        return None
    return CalibrationStats.open(folder, census_fingerprint=opened.census.fingerprint())


@contextlib.contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The folder for intermediate artifacts: the user's, or a temporary one."""
    if given is not None:
        try:
            given.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"--work {given}: cannot be made ({error.strerror}); choose another folder"
            raise PackageError(msg) from error
        with name_full_disk(given):
            yield given
        return
    with tempfile.TemporaryDirectory(prefix="faq-onnx-") as folder, name_full_disk(Path(folder)):
        yield Path(folder)
