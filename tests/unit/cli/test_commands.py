"""The commands on a tiny model with random weights, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from faq_onnx.artifacts.run import RunReport
from faq_onnx.cli.main import main
from faq_onnx.testing import write_tiny_llama

# What random weights say is noise, so their KL says nothing.
QUICK = (
    *("--samples", "4", "--sequence-length", "32", "--verify-samples", "2", "--max-kl", "9"),
    "--quiet",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny")).parent


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_dry_run_lists_every_site_and_writes_nothing(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(model.iterdir())
    plan = _json(capsys, "convert", str(model), "--dry-run", "--bits", "3", "--lm-head", "keep")
    bits = {row["role"]: (row["code_bits"], row["storage_bits"]) for row in plan["sites"]}
    assert bits.pop("lm_head") == (None, None)
    assert set(bits.values()) == {(3, 4)}
    assert plan["totals"]["quantized_sites"] == 14
    assert sorted(model.iterdir()) == before


def test_dry_run_for_people(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(model), "--dry-run", "--bits", "3"]) == 0
    out = capsys.readouterr().out
    assert "3 in 4" in out
    assert "3-bit codes in 4-bit storage" in out


def test_inspect(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    census = _json(capsys, "inspect", str(model))
    assert (census["family"], census["layer_count"], len(census["sites"])) == ("llama", 2, 15)
    assert main(["inspect", str(model)]) == 0
    assert "family llama, 2 layers, 15 linear sites" in capsys.readouterr().out


def test_source_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "absent.onnx")]) == 3
    captured = capsys.readouterr()
    assert "absent.onnx" in captured.err
    assert captured.out == ""


def test_existing_output_is_refused_before_any_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert main(["convert", str(model), "-o", str(tmp_path / "out"), *QUICK]) == 8
    assert "--force" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_convert_prints_the_report_that_it_writes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    printed = _json(capsys, "convert", str(model), "-o", str(out), *QUICK)
    report = RunReport.load(out / "report.json")
    assert RunReport.model_validate(printed) == report
    assert report.totals.quantized_sites == 15
    assert report.verification is not None
    summary = (out / "summary.md").read_text(encoding="utf-8")
    assert "FAQ-GPTQ 4-bit" in summary
    assert "Worst sites" in summary


@pytest.mark.slow
def test_stages_one_by_one_give_the_model_of_convert(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats, plan = str(tmp_path / "stats"), str(tmp_path / "plan")
    source, staged, whole = str(model), tmp_path / "staged", tmp_path / "whole"
    assert main(["calibrate", source, "-o", stats, *QUICK]) == 0
    assert main(["plan", source, "-o", plan, "--stats", stats, *QUICK]) == 0
    words = ["--plan", plan, "--stats", stats]
    assert main(["apply", source, *words, "-o", str(staged), *QUICK]) == 0
    assert main(["convert", source, "-o", str(whole), *QUICK]) == 0
    assert (staged / "model.onnx").read_bytes() == (whole / "model.onnx").read_bytes()
    capsys.readouterr()
    found = _json(capsys, "verify", str(staged), "--source", source, "-q")
    report = RunReport.load(staged / "report.json")
    assert report.verification is not None
    assert report.verification.logits is not None
    assert found["logits"]["kl_nats"] == pytest.approx(report.verification.logits.kl_nats)


@pytest.mark.slow
def test_a_model_that_is_too_bad_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(model), "-o", str(tmp_path / "out"), *QUICK, "--max-kl", "1e-6"]
    assert main(words) == 7
    assert "--force" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--force"]) == 0
