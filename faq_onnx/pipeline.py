"""The stages in order: what every command and the Python API run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from faq_onnx import budget_stages, checks, package_stages, run_report, stages
from faq_onnx.artifacts.package import PackageManifest
from faq_onnx.artifacts.plan import QuantPlan
from faq_onnx.artifacts.record import fingerprint_bytes
from faq_onnx.artifacts.run import EmbeddingRow, RunReport, SiteRow, StageTime, Totals
from faq_onnx.artifacts.sites import ModelCensus
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.artifacts.verification import VerificationReport
from faq_onnx.calibration.collect import Collector
from faq_onnx.calibration.corpus import TokenWindows, load_corpus
from faq_onnx.calibration.walk import ReferenceLogits
from faq_onnx.calibration.windows import path_windows, scale_windows
from faq_onnx.config import Method, QuantizeConfig
from faq_onnx.errors import PackageError
from faq_onnx.export import resolve_source
from faq_onnx.planning.formats import plan_embeddings, plan_sites
from faq_onnx.planning.planner import (
    PlannedModel,
    check_statistics,
    make_plan,
    needs_statistics,
)
from faq_onnx.progress import SILENT, Progress
from faq_onnx.report.rows import embedding_rows, make_totals, site_rows
from faq_onnx.targets.genai import check_generation, write_genai_config
from faq_onnx.targets.package import (
    OutputFolder,
    check_free_space,
    copy_companions,
    name_full_disk,
)

__all__ = [
    "apply",
    "calibrate",
    "convert",
    "export",
    "inspect",
    "package",
    "plan",
    "preview",
    "verify",
]

_LOG = logging.getLogger(__name__)

_AXES = ("grid", "rounding", "path")
_ANEW = ("calibration", "verify", "external_data", "fuse_attention")


@dataclasses.dataclass
class _Run:
    """One conversion: where it works, how long its stages took, whom it tells."""

    work: Path
    progress: Progress
    config: QuantizeConfig
    times: list[StageTime] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Clock a stage."""
        start = time.perf_counter()
        yield
        duration = time.perf_counter() - start
        self.times.append(StageTime(stage=stage, duration_s=round(duration, 3)))
        _LOG.info("%s took %.1f s", stage, duration)


def convert(  # noqa: PLR0913 - the public entry point
    source: str,
    output: Path,
    config: QuantizeConfig,
    *,
    progress: Progress = SILENT,
    force: bool = False,
    work: Path | None = None,
) -> RunReport:
    """Turn a model into a verified low-bit package.

    Args:
        source: ONNX file or folder, Hugging Face folder or id, or GGUF file.
        output: Folder to write; appears complete or not at all.
        config: What to do.
        progress: Receives stages and notes.
        force: Replace `output`; accept a result that verification complains about.
        work: Keeps intermediate artifacts; a later run with the same one resumes.

    Raises:
        FaqOnnxError: See `faq_onnx.errors`.
    """
    origin = Path(source) if Path(source).exists() else None
    with OutputFolder(output, origin, force) as out, _work_folder(work) as folder:
        run = _Run(folder, progress, config)
        opened = _open(run, source)
        windows = _tokens(run, opened)
        stats, reference = _calibrate(run, opened, windows)
        with run.timed("plan"):
            planned = _plan(opened, config, stats, progress)
        return _apply(
            run, opened, planned, stats, reference, windows=windows, folder=out.path, force=force
        )


def inspect(source: str, *, progress: Progress = SILENT) -> ModelCensus:
    """What is in a model, and what would be left alone."""
    with _work_folder(None) as work:
        return stages.open_model(source, work, progress).census


def preview(
    source: str, config: QuantizeConfig, *, progress: Progress = SILENT
) -> tuple[tuple[SiteRow, ...], tuple[EmbeddingRow, ...], Totals]:
    """The formats that `convert` would use, without running the model."""
    budget_stages.check_budget(config)
    if config.budget is not None:
        progress.note(
            f"--dry-run does not run the model, and --budget {config.budget} would have to: these "
            "are the formats of --bits and --block-size"
        )
    with _work_folder(None) as work:
        opened = stages.open_model(source, work, progress)
        plan_sites(opened.census, config)  # a wrong wish is told here as in `convert`
        planned = make_plan(opened.census, _plain(config), None, opened.read)
        sites = site_rows(opened.census, planned.plan, {})
        tables = embedding_rows(opened.census, planned.plan)
        size = run_report.source_bytes(opened)
        return sites, tables, make_totals(sites, tables, source_bytes=size, output_bytes=0)


def export(source: str, output: Path, *, progress: Progress = SILENT, force: bool = False) -> Path:
    """Export a checkpoint to an ONNX folder; returns the folder."""
    with OutputFolder(output, None, force) as out, _work_folder(None) as work:
        resolved = resolve_source(source, work, progress)
        if not resolved.exported:
            msg = f"{source} is ONNX already ({resolved.onnx_path}); convert it as it is"
            raise PackageError(msg)
        for path in sorted(resolved.onnx_path.parent.iterdir()):
            if path.is_file():
                shutil.move(path, out.path / path.name)
    return output


def calibrate(
    source: str,
    output: Path,
    config: QuantizeConfig,
    *,
    progress: Progress = SILENT,
    force: bool = False,
) -> Path:
    """Collect the statistics that `config` needs into a folder, for `plan` and `apply`."""
    with OutputFolder(output, None, force) as out, _work_folder(None) as work:
        run = _Run(work, progress, config)
        opened = _open(run, source)
        stats, _reference = _calibrate(run, opened, _tokens(run, opened))
        for path in sorted(stats.folder.iterdir()):
            shutil.move(path, out.path / path.name)
    return output


def plan(  # noqa: PLR0913 - one argument per input of the stage
    source: str,
    output: Path,
    config: QuantizeConfig,
    *,
    stats: Path | None = None,
    progress: Progress = SILENT,
    force: bool = False,
) -> QuantPlan:
    """Decide formats and channel scales, and write them to a folder for `apply`."""
    budget_stages.check_budget(config)
    with OutputFolder(output, None, force) as out, _work_folder(None) as work:
        opened = stages.open_model(source, work, progress)
        planned = _plan(opened, config, _open_stats(stats, opened), progress)
        planned.save(out.path)
        return planned.plan


def apply(  # noqa: PLR0913 - one argument per input of the stage
    source: str,
    plan: Path,
    output: Path,
    config: QuantizeConfig,
    *,
    stats: Path | None = None,
    progress: Progress = SILENT,
    force: bool = False,
) -> RunReport:
    """Quantize as a saved plan says, verify, and write the package."""
    origin = Path(source) if Path(source).exists() else None
    with OutputFolder(output, origin, force) as out, _work_folder(None) as work:
        opened = stages.open_model(source, work, progress)
        planned = PlannedModel.load(plan, census_fingerprint=opened.census.fingerprint())
        run = _Run(work, progress, _as_planned(config, planned.plan))
        collected = _open_stats(stats, opened)
        check_statistics(planned.plan, opened.census, collected)
        windows = _tokens(run, opened, calibrate=run.config.axes.path == "low-bit")
        with run.timed("reference"):
            reference = _collector(run, opened).logits(windows.heldout, progress, "float model")
        return _apply(
            run,
            opened,
            planned,
            collected,
            reference,
            windows=windows,
            folder=out.path,
            force=force,
        )


def package(  # noqa: PLR0913 - one argument per option of the command
    source: str,
    output: Path,
    *,
    target: str = "genai",
    fuse_attention: bool = True,
    progress: Progress = SILENT,
    force: bool = False,
) -> PackageManifest:
    """Make a folder for a runtime from a finished model, and try it there."""
    origin = Path(source) if Path(source).exists() else None
    with OutputFolder(output, origin, force) as out, _work_folder(None) as work:
        manifest = package_stages.make_package(
            resolve_source(source, work, progress),
            out.path,
            work,
            target=target,
            fuse_attention=fuse_attention,
            progress=progress,
        )
        manifest.save(out.path / package_stages.MANIFEST_NAME)
        return manifest


def verify(
    output: Path, source: str | None = None, *, progress: Progress = SILENT
) -> VerificationReport:
    """Check a written package again; against the float model too when its source is given."""
    path = output / "model.onnx" if output.is_dir() else output
    if not path.is_file():
        msg = f"{path}: no such file; give the OUT folder of a conversion or an .onnx file"
        raise PackageError(msg)
    logits = None
    report_path = path.parent / run_report.REPORT_NAME
    if source is not None:
        config = QuantizeConfig()
        if report_path.is_file():
            config = RunReport.load(report_path).config
        with _work_folder(None) as work:
            run = _Run(work, progress, config)
            opened = _open(run, source)
            windows = _tokens(run, opened, calibrate=False)
            reference = _collector(run, opened).logits(windows.heldout, progress, "float model")
            logits = checks.compare_to_reference(path, reference, progress)
    return checks.verify_file(path, logits, (), None, progress)


def _plain(config: QuantizeConfig) -> QuantizeConfig:
    """The same formats with nothing that would have to run the model."""
    plain = {
        "method": Method.RTN,
        "budget": None,
        "scale": config.scale.model_copy(update={"statistic": "method"}),
        "rounding": config.rounding.model_copy(update=dict.fromkeys(_AXES, "method")),
    }
    return config.model_copy(update=plain)


def _as_planned(config: QuantizeConfig, plan: QuantPlan) -> QuantizeConfig:
    """The settings that a plan was made with; how to verify and to write is told anew."""
    if plan.config is None:
        return config
    anew = {name: getattr(config, name) for name in _ANEW}
    return plan.config.model_copy(update=anew)


def _plan(
    opened: stages.OpenedModel,
    config: QuantizeConfig,
    stats: CalibrationStats | None,
    progress: Progress,
) -> PlannedModel:
    if config.budget is None or stats is None:
        return make_plan(opened.census, config, stats, opened.read, progress)
    return budget_stages.plan_under_budget(opened, config, stats, progress)


def _open(run: _Run, source: str) -> stages.OpenedModel:
    budget_stages.check_budget(run.config)
    with run.timed("open"):
        opened = stages.open_model(source, run.work, run.progress)
        formats = plan_sites(opened.census, run.config)  # a wrong wish fails here, not in an hour
        plan_embeddings(opened.census, run.config, formats)
    return opened


def _tokens(run: _Run, opened: stages.OpenedModel, *, calibrate: bool = True) -> TokenWindows:
    """Calibration and held-out windows; the same held-out ones for every method."""
    settings = run.config.calibration
    written = settings.source == "self"
    needed = calibrate and (run.config.axes.calibrates or run.config.budget is not None)
    with run.timed("tokens"):
        wish = f"{opened.fingerprint} {settings} {run.config.verify.samples} {needed}"
        key = fingerprint_bytes(wish.encode())
        kept = run.work / f"self-text-{key[:16]}.npz"
        if written and kept.is_file():
            run.progress.note(f"taking the calibration text in {kept}")
            return TokenWindows.load(kept)
        windows = load_corpus(
            settings,
            source=opened.source,
            vocabulary=opened.vocabulary,
            count=0 if written and not needed else settings.samples,
            holdout=run.config.verify.samples,
            progress=run.progress,
        )
        if written:
            windows.save(kept)
        return windows


def _collector(run: _Run, opened: stages.OpenedModel) -> Collector:
    return Collector(opened.model, opened.census, opened.fingerprint, run.work)


def _calibrate(
    run: _Run, opened: stages.OpenedModel, windows: TokenWindows
) -> tuple[CalibrationStats, ReferenceLogits]:
    groups = needs_statistics(opened.census, run.config)
    room = _work_bytes(opened.census, windows, groups)
    if run.config.budget is not None:
        room += budget_stages.stream_bytes(opened.census, windows.calibration)
    check_free_space(run.work, room)
    with run.timed("calibrate"):
        stats, reference = _collector(run, opened).collect(
            scale_windows(run.config, windows.calibration),
            windows.heldout,
            groups,
            run.progress,
        )
    if run.config.budget is not None:
        with run.timed("measure sensitivity"):
            budget_stages.measure_sensitivity(
                opened, stats, windows.calibration, run.work, run.progress
            )
    return stats, reference


def _work_bytes(census: ModelCensus, windows: TokenWindows, groups: list[str]) -> int:
    """Disk that calibration takes: Gram matrices, and hidden states of two layers.

    The walk on the low-bit path keeps as much for each path: streams and one group's activations.
    """
    named = set(groups)
    grams = sum(4 * group.in_features**2 for group in census.groups if group.name in named)
    width = max((group.in_features for group in census.groups), default=0)
    tokens = windows.calibration.size + windows.heldout.size
    return grams + 2 * 2 * 4 * width * tokens


def _apply(  # noqa: PLR0913 - joins the artifacts of all stages before it
    run: _Run,
    opened: stages.OpenedModel,
    planned: PlannedModel,
    stats: CalibrationStats | None,
    reference: ReferenceLogits,
    *,
    windows: TokenWindows,
    folder: Path,
    force: bool,
) -> RunReport:
    source_bytes = run_report.source_bytes(opened)
    with run.timed("fold"):
        marks = stages.rtn_marks(opened, planned)
        error = _fold(run, opened, planned, reference)
    with run.timed("quantize"):
        quantized = stages.quantize(
            opened,
            planned,
            stats,
            marks,
            run.work / "weights",
            run.progress,
            windows=path_windows(run.config, windows.calibration),
        )
        stages.rewrite(opened, planned, quantized.weights)
    with run.timed("save"):
        saved = package_stages.save_package_model(
            opened.model,
            opened.source,
            folder,
            run.work,
            fuse_attention=run.config.fuse_attention,
            external_data=run.config.external_data,
        )
        copy_companions(opened.source, folder)
        write_genai_config(folder, opened.source, run.progress)
    with run.timed("verify"):
        logits = checks.compare_to_reference(folder / "model.onnx", reference, run.progress)
        report = checks.verify_file(
            folder / "model.onnx", logits, quantized.errors, error, run.progress
        )
        notes = [*checks.judge(report, run.config, force=force)]
        matches = _try_genai(run, folder, reference, saved.plain)
        notes += [checks.slow_note(report.structure), checks.generation_note(matches)]
        notes += [checks.scales_note(run.config)]
        notes += [checks.budget_note(planned.plan.trade_off, logits, saved.bytes)]
        notes = [note for note in notes if note]
        report = report.model_copy(
            update={
                "notes": tuple(notes),
                "generation_matches": matches,
                "attention": saved.fusion,
            }
        )
        for note in notes:
            run.progress.note(note)
    result = run_report.make_report(
        opened,
        planned,
        report,
        config=run.config,
        times=run.times,
        totals=(source_bytes, saved.bytes),
    )
    run_report.write_report(result, folder)
    return result


def _fold(
    run: _Run, opened: stages.OpenedModel, planned: PlannedModel, reference: ReferenceLogits
) -> float | None:
    """Fold the scales and prove on one window that nothing changed."""
    if not planned.scales:
        return None
    stages.fold(opened, planned)
    one = dataclasses.replace(reference, windows=reference.windows[:1])
    folded = _collector(run, opened).logits(one.windows, run.progress, "check the folded model")
    error = checks.fold_error(folded, one)
    dtypes = {site.dtype for site in opened.census.sites}
    checks.check_fold(error, dtypes, opened.census.layer_count)
    return error


def _try_genai(run: _Run, folder: Path, reference: ReferenceLogits, plain: Path) -> bool | None:
    prompt = [int(token) for token in reference.windows[0, :8]]
    with run.progress.stage("try onnxruntime-genai", 1, "runs") as advance:
        matches = check_generation(folder, prompt, package_stages.GENERATION_STEPS, plain)
        advance(1)
    return matches


def _open_stats(folder: Path | None, opened: stages.OpenedModel) -> CalibrationStats | None:
    if folder is None:
        return None
    return CalibrationStats.open(folder, census_fingerprint=opened.census.fingerprint())


@contextlib.contextmanager
def _work_folder(given: Path | None) -> Iterator[Path]:
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
