"""What every command and the Python API run; what they are made of is in `stages`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from faq_onnx.artifacts.package import PackageManifest
from faq_onnx.artifacts.plan import QuantPlan
from faq_onnx.artifacts.run import EmbeddingRow, RunReport, SiteRow, Totals
from faq_onnx.artifacts.sites import ModelCensus
from faq_onnx.artifacts.target import Refusal
from faq_onnx.artifacts.verification import LogitMetrics, VerificationReport
from faq_onnx.config import Method, QuantizeConfig, VerifyConfig
from faq_onnx.errors import (
    ConfigError,
    PackageError,
    UnsupportedFormatError,
    UnsupportedModelError,
)
from faq_onnx.export import resolve_source
from faq_onnx.planning.formats import plan_embeddings, plan_sites
from faq_onnx.planning.planner import PlannedModel, check_statistics, make_plan
from faq_onnx.progress import SILENT, Progress
from faq_onnx.report.rows import embedding_rows, make_totals, site_rows
from faq_onnx.stages import budgeting, checks, opening, packaging, run_report
from faq_onnx.stages.conversion import Run, open_stats, work_folder
from faq_onnx.stages.fusing import MODEL_NAME, save_package_model, trial_tokens
from faq_onnx.stages.outline import outline_of_model, outline_of_plan
from faq_onnx.stages.rotating import rotate
from faq_onnx.targets import DEFAULT_TARGET
from faq_onnx.targets.opening import open_target
from faq_onnx.targets.package import MANIFEST_NAME, OutputFolder

__all__ = [
    "apply",
    "calibrate",
    "convert",
    "export",
    "inspect",
    "inspect_for",
    "package",
    "plan",
    "preview",
    "verify",
]

_AXES = ("grid", "rounding", "path")
_ANEW = ("calibration", "verify", "external_data", "fuse_attention")

Options = Mapping[str, object]
_NO_OPTIONS: Options = {}


def convert(  # noqa: PLR0913 - the public entry point
    source: str,
    output: Path,
    config: QuantizeConfig,
    *,
    target: str = DEFAULT_TARGET,
    target_options: Options = _NO_OPTIONS,
    progress: Progress = SILENT,
    force: bool = False,
    work: Path | None = None,
) -> RunReport:
    """Turn a model into a verified low-bit package.

    Args:
        source: ONNX file or folder, Hugging Face folder or id, or GGUF file.
        output: Folder to write; appears complete or not at all.
        config: What to do.
        target: Runtime that the package is for; what it would not run is refused first.
        target_options: Of that target, by name; texts are read as on the command line.
        progress: Receives stages and notes.
        force: Replace `output`; accept a result that verification complains about.
        work: Keeps intermediate artifacts; a later run with the same one resumes.

    Raises:
        FaqOnnxError: See `faq_onnx.errors`.
    """
    chosen = open_target(target, target_options)
    config = packaging.settle(config, chosen)
    with OutputFolder(output, _origin(source), force) as out, work_folder(work) as folder:
        run = Run(folder, progress, config, chosen, force)
        opened = run.open(source)
        windows = run.tokens(opened)
        stats, reference = run.calibrate(opened, windows)
        with run.timed("plan"):
            planned = run.plan(opened, stats)
        return run.apply(opened, planned, stats, reference, windows=windows, folder=out.path)


def inspect(source: str, *, progress: Progress = SILENT) -> ModelCensus:
    """What is in a model, and what would be left alone."""
    with work_folder(None) as work:
        return opening.open_model(source, work, progress).census


def inspect_for(
    source: str, target: str, *, progress: Progress = SILENT
) -> tuple[ModelCensus | None, tuple[Refusal, ...]]:
    """As `inspect`, and what would not run on a target.

    Of a float model, that is what `convert` makes of it with its defaults; a low-bit one has no
    census and is judged as it is.
    """
    chosen = open_target(target)
    config = packaging.settle(QuantizeConfig(), chosen)
    with work_folder(None) as work:
        resolved, model = opening.load_source(source, work, progress)
        try:
            chosen.check_source(resolved, model)
        except (PackageError, UnsupportedModelError) as error:
            progress.note(str(error))
        outline = outline_of_model(model, opening.source_bytes(resolved, model))
        if outline.weights:
            return None, chosen.refusals(outline)
        opened = opening.understand(resolved, model, progress)
        sites = plan_sites(opened.census, config)
        tables = plan_embeddings(opened.census, config, sites)
        fuse = config.fuse_attention
        outline = outline_of_plan(opened, sites, tables, fuse_attention=fuse)
        opening.check_weights(opened)
        return opened.census, chosen.refusals(outline)


def preview(
    source: str,
    config: QuantizeConfig,
    *,
    target: str = DEFAULT_TARGET,
    target_options: Options = _NO_OPTIONS,
    progress: Progress = SILENT,
) -> tuple[tuple[SiteRow, ...], tuple[EmbeddingRow, ...], Totals]:
    """The formats that `convert` would use, without running the model."""
    if config.budget is not None:
        budgeting.check_budget(config)
        progress.note(
            f"--dry-run does not run the model, and --budget {config.budget} would have to: these "
            "are the formats of --bits and --block-size"
        )
    chosen = open_target(target, target_options)
    config = packaging.settle(config, chosen)
    with work_folder(None) as work:
        # a wrong wish is told here as in `convert`
        opened = Run(work, progress, config, chosen).open(source)
        planned = make_plan(opened.census, _plain(config), None, opened.read)
        formats = planned.plan
        sites = site_rows(opened.census, formats, {})
        tables = embedding_rows(opened.census, formats)
        fuse = config.fuse_attention
        outline = outline_of_plan(opened, formats.sites, formats.embeddings, fuse_attention=fuse)
        size = opening.source_bytes(opened.source, opened.given.model)
        found = make_totals(sites, tables, source_bytes=size, output_bytes=outline.model_bytes)
        return sites, tables, found


def export(source: str, output: Path, *, progress: Progress = SILENT, force: bool = False) -> Path:
    """Export a checkpoint to an ONNX folder; returns the folder."""
    with OutputFolder(output, None, force) as out, work_folder(None) as work:
        resolved = resolve_source(source, work, progress)
        if not resolved.exported:
            msg = f"{source} is ONNX already ({resolved.onnx_path}); convert it as it is"
            raise PackageError(msg)
        _move_files(resolved.onnx_path.parent, out.path)
    return output


def calibrate(  # noqa: PLR0913 - one argument per option of the command
    source: str,
    output: Path,
    config: QuantizeConfig,
    *,
    target: str = DEFAULT_TARGET,
    target_options: Options = _NO_OPTIONS,
    progress: Progress = SILENT,
    force: bool = False,
) -> Path:
    """Collect the statistics that `config` needs into a folder, for `plan` and `apply`.

    What `target` would not run is refused first, as `convert` does it.
    """
    chosen = open_target(target, target_options)
    config = packaging.settle(config, chosen)
    with OutputFolder(output, None, force) as out, work_folder(None) as work:
        run = Run(work, progress, config, chosen)
        opened = run.open(source)
        stats, _reference = run.calibrate(opened, run.tokens(opened))
        _move_files(stats.folder, out.path)
    return output


def plan(  # noqa: PLR0913 - one argument per input of the stage
    source: str,
    output: Path,
    config: QuantizeConfig,
    *,
    stats: Path | None = None,
    target: str = DEFAULT_TARGET,
    target_options: Options = _NO_OPTIONS,
    progress: Progress = SILENT,
    force: bool = False,
) -> QuantPlan:
    """Decide formats and channel scales, and write them to a folder for `apply`.

    Formats are those that `target` runs, else the plan is refused, as `convert` does it.
    """
    chosen = open_target(target, target_options)
    config = packaging.settle(config, chosen)
    with OutputFolder(output, None, force) as out, work_folder(None) as work:
        run = Run(work, progress, config, chosen)
        opened = run.open(source)
        planned = run.plan(opened, open_stats(stats, opened))
        planned.save(out.path)
        return planned.plan


def apply(  # noqa: PLR0913 - one argument per input of the stage
    source: str,
    plan: Path,
    output: Path,
    config: QuantizeConfig,
    *,
    stats: Path | None = None,
    target: str = DEFAULT_TARGET,
    target_options: Options = _NO_OPTIONS,
    progress: Progress = SILENT,
    force: bool = False,
) -> RunReport:
    """Quantize as a saved plan says, verify, and write the package of a target.

    Raises:
        UnsupportedFormatError: The target would not run what was planned.
    """
    chosen = open_target(target, target_options)
    with OutputFolder(output, _origin(source), force) as out, work_folder(None) as work:
        opened = opening.understand(*opening.load_source(source, work, progress), progress)
        chosen.check_source(opened.source, opened.model)
        opened = rotate(opened, PlannedModel.load_plan(plan).config or QuantizeConfig())
        planned = PlannedModel.load(plan, census_fingerprint=opened.census.fingerprint())
        config = packaging.settle(_as_planned(config, planned.plan), chosen)
        run = Run(work, progress, config, chosen, force)
        try:
            run.check_target(opened, planned.plan.sites, planned.plan.embeddings)
        except UnsupportedFormatError as error:
            error.add_note(
                f"formats are those of {plan}; `faq-onnx plan --target {target}` makes others"
            )
            raise
        opening.check_weights(opened.given)
        collected = open_stats(stats, opened)
        check_statistics(planned.plan, opened.census, collected)
        windows = run.tokens(opened, calibrate=run.config.axes.path == "low-bit")
        with run.timed("reference"):
            reference = run.reference(opened, windows)
        return run.apply(opened, planned, collected, reference, windows=windows, folder=out.path)


def package(  # noqa: PLR0913 - one argument per option of the command
    source: str,
    output: Path,
    *,
    target: str = DEFAULT_TARGET,
    target_options: Options = _NO_OPTIONS,
    fuse_attention: bool = True,
    progress: Progress = SILENT,
    force: bool = False,
) -> PackageManifest:
    """Make a folder for a runtime from a finished model, and try it there."""
    chosen = open_target(target, target_options)
    fuse = fuse_attention and chosen.fuses_attention
    with OutputFolder(output, _origin(source), force) as out, work_folder(None) as work:
        resolved, model = opening.load_source(source, work, progress)
        chosen.check_source(resolved, model)
        outline = outline_of_model(model, opening.source_bytes(resolved, model))
        packaging.check_limits(chosen, outline, finished=True)
        with progress.stage("save", 1, "models") as advance:
            saved = save_package_model(model, resolved, out.path, work, fuse_attention=fuse)
            advance(1)
        finished = packaging.Finished(resolved, out.path, work, saved)
        prompt = [int(token) for token in trial_tokens(opening.read_config(resolved))]
        return packaging.make_package(finished, chosen, prompt, progress, force=force)


def verify(
    output: Path,
    source: str | None = None,
    *,
    text: str | None = None,
    samples: int | None = None,
    progress: Progress = SILENT,
) -> VerificationReport:
    """Check a written package again; against the float model too when its source is given.

    Args:
        output: The package, or an .onnx file.
        source: The float model.
        text: What both read, from its beginning; by default the windows that `convert` held out.
        samples: How many windows of it; by default as many as `convert` held out.
        progress: Receives stages and notes.

    Raises:
        PackageError: Nothing there, or a text and no source to compare on it.
        ConfigError: Fewer than one window.
        CorpusError: A text that cannot be read, or not with the source's tokenizer.
        VerificationError: The file is wrong, or its target's runtime no longer runs it as it did.
    """
    path = output / MODEL_NAME if output.is_dir() else output
    manifest = _manifest(path.parent)
    if not path.is_file() and manifest is None:
        msg = f"{path}: no such file; give the OUT folder of a conversion or an .onnx file"
        raise PackageError(msg)
    if not path.is_file() and source is not None:
        msg = f"--source {source}: {output} holds no {MODEL_NAME} to compare; leave --source out"
        raise PackageError(msg)
    if samples is not None and samples < 1:
        raise ConfigError(f"--verify-samples: found {samples}; allowed 1 or more")
    if source is None and (text is not None or samples is not None):
        named = f"--verify-samples {samples}" if text is None else f"--text {text}"
        msg = f"{named}: nothing to compare {output} with; name the float model with --source"
        raise PackageError(msg)
    report = VerificationReport(structure=None, kernels=None, logits=None, sites=())
    if path.is_file():
        logits = None
        if source is not None:
            logits = _compare(path, source, text, samples, progress)
        report = checks.verify_file(path, logits, (), None, progress)
        if manifest is None and report.kernels is not None and not report.kernels.nodes:
            progress.note(
                f"{path}: nothing in low bits to check, and no {MANIFEST_NAME} beside it"
            )
    if manifest is None or not output.is_dir():
        return report
    proof, changes = packaging.prove_again(output, manifest, progress)
    return report.model_copy(update={"proof": proof, "changes": changes})


def _compare(
    path: Path, source: str, text: str | None, samples: int | None, progress: Progress
) -> LogitMetrics:
    """Logits of a written model against those of its source, on held-out text or on another."""
    report = path.parent / run_report.REPORT_NAME
    config = RunReport.load(report).config if report.is_file() else QuantizeConfig()
    if samples is not None:
        config = config.model_copy(update={"verify": VerifyConfig(samples=samples)})
    with work_folder(None) as work:
        run = Run(work, progress, config)
        opened = opening.open_model(source, work, progress)
        if text is None:
            windows = run.tokens(opened, calibrate=False)
        else:
            if report.is_file() and _same_file(text, config.calibration.source):
                progress.note(
                    f"{text}: the text that {path.parent} was calibrated on, which flatters it; "
                    "without --text, windows of it are taken that were held out"
                )
            windows = run.windows_of(text, opened)
        return checks.compare_to_reference(path, run.reference(opened, windows), progress)


def _manifest(folder: Path) -> PackageManifest | None:
    path = folder / MANIFEST_NAME
    return PackageManifest.load(path) if path.is_file() else None


def _same_file(one: str, other: str) -> bool:
    return Path(one).exists() and Path(other).exists() and Path(one).samefile(other)


def _origin(source: str) -> Path | None:
    """The source as a path, None where it is the name of a model."""
    return Path(source) if Path(source).exists() else None


def _move_files(folder: Path, output: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_file():
            shutil.move(path, output / path.name)


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
