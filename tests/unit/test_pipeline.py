"""The stages apart give what the whole gives, and what was proved was proved on this model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from faq_onnx import pipeline
from faq_onnx.artifacts.run import RunReport
from faq_onnx.config import (
    CalibrationConfig,
    Method,
    QuantizeConfig,
    ScaleConfig,
    VerifyConfig,
)
from faq_onnx.errors import ConfigError, PackageError, PlanError
from faq_onnx.testing import TinyLlama, write_tiny_llama

SPEC = TinyLlama()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    path = write_tiny_llama(folder)
    tokens = np.random.default_rng(0).integers(0, SPEC.vocabulary, (12, 16))
    (folder / "tokens").mkdir()
    np.save(folder / "tokens" / "ids.npy", tokens)
    # without it nothing is tried in onnxruntime-genai, which costs seconds
    (folder / "config.json").unlink(missing_ok=True)
    return path


def _config(source: Path, method: Method) -> QuantizeConfig:
    tokens = str(source.parent / "tokens")
    return QuantizeConfig(
        method=method,
        calibration=CalibrationConfig(source=tokens, samples=6, sequence_length=16),
        scale=ScaleConfig(grid_points=4),
        verify=VerifyConfig(samples=2, max_kl=9),
    )


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunReport]:
    out = tmp_path_factory.mktemp("converted") / "out"
    return out, pipeline.convert(str(source), out, _config(source, Method.FAQ))


def test_the_fold_is_proved_with_numbers(converted: tuple[Path, RunReport]) -> None:
    _, report = converted
    assert report.verification is not None
    assert report.verification.fold_error is not None
    # nothing at all would mean that a model was compared with itself
    assert 0 < report.verification.fold_error < 1e-5


def test_stages_apart_give_the_bytes_of_convert(
    source: Path, converted: tuple[Path, RunReport], tmp_path: Path
) -> None:
    config, given = _config(source, Method.FAQ), str(source)
    stats = pipeline.calibrate(given, tmp_path / "stats", config)
    plan = pipeline.plan(given, tmp_path / "plan", config, stats=stats)
    assert any(group.exponent for group in plan.groups)
    out = tmp_path / "out"
    report = pipeline.apply(given, tmp_path / "plan", out, config, stats=stats)
    expected = (converted[0] / "model.onnx").read_bytes()
    assert (out / "model.onnx").read_bytes() == expected
    assert report.verification is not None
    assert converted[1].verification is not None
    assert report.verification.logits == converted[1].verification.logits
    # the proof ran on the folded model here, too, not on what the float model had left behind
    assert report.verification.fold_error == converted[1].verification.fold_error


def test_a_work_folder_is_resumed_by_any_method(source: Path, tmp_path: Path) -> None:
    """The second run takes the statistics of the first, and proves its own fold."""
    work = tmp_path / "work"
    awq = _config(source, Method.AWQ)
    first = pipeline.convert(str(source), tmp_path / "first", awq, work=work)
    again = pipeline.convert(str(source), tmp_path / "again", awq, work=work)
    left, right = ((tmp_path / name / "model.onnx").read_bytes() for name in ("first", "again"))
    assert left == right
    assert first.verification is not None
    assert again.verification is not None
    assert again.verification.fold_error == first.verification.fold_error


def test_preview_shows_the_formats_that_convert_uses(
    source: Path, converted: tuple[Path, RunReport]
) -> None:
    sites, tables, totals = pipeline.preview(str(source), _config(source, Method.FAQ))
    found = converted[1]
    assert [(r.site, r.storage_bits, r.size_bytes) for r in sites] == [
        (r.site, r.storage_bits, r.size_bytes) for r in found.sites
    ]
    assert tables == found.embeddings
    assert totals.bits_per_weight == found.totals.bits_per_weight


def test_the_report_is_what_was_returned(converted: tuple[Path, RunReport]) -> None:
    out, report = converted
    assert RunReport.load(out / "report.json") == report
    assert report.totals.output_bytes == (out / "model.onnx").stat().st_size
    assert report.source.endswith("model.onnx")


def test_verify_gives_the_same_numbers_again(
    source: Path, converted: tuple[Path, RunReport]
) -> None:
    found = pipeline.verify(converted[0], str(source))
    assert converted[1].verification is not None
    assert found.logits == converted[1].verification.logits
    assert pipeline.verify(converted[0]).logits is None


def test_a_plan_without_statistics_is_for_rtn_only(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="needs calibration statistics"):
        pipeline.plan(str(source), tmp_path / "a", _config(source, Method.AWQ))
    assert not (tmp_path / "a").exists()
    plan = pipeline.plan(str(source), tmp_path / "b", _config(source, Method.RTN))
    assert all(group.exponent == 0 for group in plan.groups)


def test_a_wrong_wish_fails_before_anything_runs(source: Path, tmp_path: Path) -> None:
    config = _config(source, Method.FAQ).model_copy(update={"exclude": ("nothing*",)})
    with pytest.raises(ConfigError, match="fits none"):
        pipeline.convert(str(source), tmp_path / "out", config)
    assert list(tmp_path.iterdir()) == []


def test_onnx_is_not_exported(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="is ONNX already"):
        pipeline.export(str(source), tmp_path / "out")


def test_verify_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="no such file"):
        pipeline.verify(tmp_path)
