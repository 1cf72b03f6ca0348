"""Bits under a budget, from the command line to the bytes of the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.package import PackageManifest
from faq_onnx.artifacts.plan import QuantPlan
from faq_onnx.artifacts.run import RunReport
from faq_onnx.artifacts.sensitivity import Sensitivities
from faq_onnx.artifacts.sites import Tie
from faq_onnx.targets import qnn_runtime
from faq_onnx.testing import TinyLlama

MakeSource = Callable[..., Path]
FIXTURES = Path(__file__).parents[1] / "fixtures" / "exporters"


@pytest.fixture(scope="module")
def small(make_source: MakeSource) -> Path:
    """One layer, where more would show nothing."""
    return make_source(TinyLlama(layers=1))


def _report(folder: Path) -> RunReport:
    return RunReport.load(folder / "report.json")


def _kl(report: RunReport) -> float:
    assert report.verification is not None
    assert report.verification.logits is not None
    return report.verification.logits.kl_nats


def _bits(report: RunReport) -> set[int | None]:
    return {row.code_bits for row in report.sites}


def test_bits_per_weight(cli: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli.quick("convert", source, "-o", out, "--budget", "4.6bpw")
    assert done.code == 0, done.err
    assert "<- 4.6bpw" in done.out
    assert "bits, blocks of" in done.out
    report = _report(out)
    found = report.trade_off
    assert found is not None
    assert report.totals.bits_per_weight <= 4.6
    assert found.chosen.bits_per_weight == report.totals.bits_per_weight
    # no larger step is left over than one weight's from 4 to 8 bits
    assert found.chosen.bits_per_weight > 4.3
    assert len(_bits(report)) > 1  # mixed indeed
    assert report.embeddings[0].storage_bits in {4, 8}
    assert [p.bytes for p in found.curve] == sorted(p.bytes for p in found.curve)
    kls = [point.kl for point in found.curve]
    assert kls == sorted(kls, reverse=True)
    summary = (out / "summary.md").read_text(encoding="utf-8")
    assert summary.splitlines()[0].endswith("FAQ-GPTQ under 4.6bpw")
    assert "## Budget 4.6bpw" in summary
    assert "| **chosen** |" in summary
    assert "nats/token." in summary


@pytest.mark.parametrize("tie", [Tie.SHARED, pytest.param(Tie.DUPLICATE, marks=pytest.mark.slow)])
def test_the_same_size_without_a_number(
    cli: Any, make_source: MakeSource, tmp_path: Path, tie: Tie
) -> None:
    source = make_source(TinyLlama(tie=tie))
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    words = ("--method", "rtn", "--bits", "3", "--block-size", "64")
    assert cli.quick("convert", source, "-o", plain, *words).code == 0
    done = cli.quick("convert", source, "-o", mixed, *words, "--budget", "same")
    assert done.code == 0, done.err
    assert "<- same" in done.out
    assert "NOT kept" not in done.out
    before, after = _report(plain), _report(mixed)
    assert after.trade_off is not None
    assert after.totals.output_bytes <= after.trade_off.limit
    # weights alone; zero points that are left out have no names in the file either
    assert after.totals.bits_per_weight <= before.totals.bits_per_weight
    assert after.totals.output_bytes <= before.totals.output_bytes + 500 * len(after.sites)
    assert _kl(after) < _kl(before)
    summary = (mixed / "summary.md").read_text(encoding="utf-8")
    assert summary.splitlines()[0].endswith("RTN in the size of 3-bit")
    assert "mixed within the size of 3-bit codes, blocks of 64" in summary
    assert "## Budget same" in summary


SLOW_TIES = [pytest.param(tie, marks=pytest.mark.slow) for tie in Tie]


@pytest.mark.parametrize("tie", [None, *SLOW_TIES])
def test_file_within_a_size(
    cli: Any, make_source: MakeSource, tmp_path: Path, tie: Tie | None
) -> None:
    path = make_source(TinyLlama(layers=1, tie=tie))
    out = tmp_path / "out"
    words = ("--method", "rtn", "--budget")
    done = cli.quick("convert", path, "-o", out, *words, "1kB")
    assert done.code == 5
    smallest = done.err.partition("smallest possible value is ")[2].partition("MB")[0]
    limit = 1.3 * float(smallest)
    done = cli.quick("convert", path, "-o", out, *words, f"{limit}MB")
    assert done.code == 0, done.err
    report = _report(out)
    size = (out / "model.onnx").stat().st_size
    assert size == report.totals.output_bytes
    assert report.trade_off is not None
    # the allowance for structure is generous, but not much
    weights = len(report.sites) + len(report.embeddings)
    assert size <= report.trade_off.chosen.bytes <= min(limit * 1e6, size + 500 * weights)
    assert "NOT kept" not in done.out


@pytest.mark.slow
def test_kl_is_predicted_and_then_measured(cli: Any, source: Path, tmp_path: Path) -> None:
    words = ("--method", "rtn", "--budget")
    generous, tight = tmp_path / "generous", tmp_path / "tight"
    assert cli.quick("convert", source, "-o", generous, *words, "kl<=0.5").code == 0
    done = cli.quick("convert", source, "-o", tight, *words, "kl<=0.01")
    assert done.code == 0, done.err
    large, small = _report(tight), _report(generous)
    for report, limit in ((large, 0.01), (small, 0.5)):
        assert report.trade_off is not None
        assert report.verification is not None
        assert report.verification.logits is not None
        assert report.trade_off.chosen.kl <= limit
        kept = report.verification.logits.kl_nats <= limit
        assert kept == all("NOT kept" not in note for note in report.verification.notes)
    assert large.totals.output_bytes > small.totals.output_bytes


@pytest.mark.parametrize("method", ["rtn", pytest.param("faq-gptq", marks=pytest.mark.slow)])
def test_stages_and_a_second_run_give_the_same_bytes(
    cli: Any, source: Path, tmp_path: Path, method: str
) -> None:
    stats, plan, staged, whole = (tmp_path / name for name in ("stats", "plan", "staged", "whole"))
    words = ("--method", method, "--budget", "4bpw")
    # what is measured does not depend on the budget
    measure = (*words[:-1], "kl<=1")
    assert cli.quick("calibrate", source, "-o", stats, *measure).code == 0
    found = Sensitivities.load(stats / "sensitivity.json")
    assert {entry.name for entry in found.entries} >= set(_sites(cli, source))
    done = cli.quick("plan", source, "-o", plan, "--stats", stats, *words)
    assert done.code == 0, done.err
    assert "<- 4bpw" in done.out
    done = cli.quick("apply", source, "--plan", plan, "--stats", stats, "-o", staged)
    assert done.code == 0, done.err
    assert "<- 4bpw" in done.out
    assert cli.quick("convert", source, "-o", whole, *words).code == 0
    assert (staged / "model.onnx").read_bytes() == (whole / "model.onnx").read_bytes()
    assert _report(staged).trade_off == _report(whole).trade_off
    assert _report(staged).config == _report(whole).config


def _sites(cli: Any, source: Path) -> list[str]:
    return [site["name"] for site in _sites_of(cli, source)]


@pytest.mark.slow
def test_a_kept_work_folder_is_not_measured_again(cli: Any, small: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    words = ("--method", "rtn", "--work", work, "--budget")
    assert cli.quick("convert", small, "-o", tmp_path / "a", *words, "4bpw").code == 0
    kept = work / "stats" / "sensitivity.json"
    before = kept.stat().st_mtime_ns
    assert cli.quick("convert", small, "-o", tmp_path / "b", *words, "5bpw").code == 0
    assert kept.stat().st_mtime_ns == before
    assert cli.quick("convert", small, "-o", tmp_path / "c", *words, "5bpw").code == 0
    assert (tmp_path / "b/model.onnx").read_bytes() == (tmp_path / "c/model.onnx").read_bytes()
    more = (*words, "5bpw", "--sequence-length", "40")  # another text: other sensitivities
    assert cli.quick("convert", small, "-o", tmp_path / "d", *more).code == 0
    assert kept.stat().st_mtime_ns != before


def test_what_stays_float_is_told_as_before(cli: Any, small: Path, tmp_path: Path) -> None:
    words = ("--method", "rtn", "--budget", "4bpw", "--lm-head", "keep", "--exclude", "*o_proj*")
    done = cli.quick("convert", small, "-o", tmp_path / "out", *words)
    assert done.code == 0, done.err
    report = _report(tmp_path / "out")
    kept = {row.role for row in report.sites if row.code_bits is None}
    assert kept == {"lm_head", "o_proj"}
    assert all(row.reason for row in report.sites if row.code_bits is None)


def test_a_dry_run_says_that_it_leaves_the_budget_out(cli: Any, small: Path) -> None:
    done = cli.run("convert", small, "--dry-run", "--budget", "3bpw")
    assert done.code == 0
    assert "does not run the model" in done.err
    assert cli.run("convert", small, "--dry-run", "--budget", "3").code == 2


@pytest.mark.parametrize("budget", ["3", "0bpw", "-1MB", "kl<=0", "kl>=1", "many", "nan bpw", ""])
@pytest.mark.parametrize("command", ["convert", "calibrate", "plan"])
def test_a_wrong_budget_is_refused_before_anything_is_read(
    cli: Any, scratch: Path, command: str, budget: str
) -> None:
    nothing = scratch.parent / "nothing-there.onnx"
    done = cli.quick(command, nothing, "-o", scratch / "out", f"--budget={budget}")
    assert (done.code, list(scratch.iterdir())) == (2, [])
    assert "--budget" in done.err
    assert "3.0bpw" in done.err


@pytest.mark.parametrize(
    ("words", "code"),
    [("1bpw", 5), ("kl<=1e-9", 5), ("kl<=2 --max-kl 1", 2)],
)
def test_a_budget_that_cannot_be_kept(
    cli: Any, small: Path, scratch: Path, words: str, code: int
) -> None:
    wish = ("--method", "rtn", "--budget", *words.split())
    done = cli.quick("convert", small, "-o", scratch / "out", *wish)
    assert (done.code, list(scratch.iterdir())) == (code, [])
    assert ("cannot be met" if code == 5 else "--max-kl 1") in done.err


def test_a_plan_needs_sensitivities_of_this_model(
    cli: Any, source: Path, make_source: MakeSource, scratch: Path, tmp_path: Path
) -> None:
    words = ("--method", "rtn", "--budget", "4bpw")
    done = cli.quick("plan", source, "-o", scratch / "out", *words)
    assert (done.code, list(scratch.iterdir())) == (5, [])
    assert "faq-onnx calibrate --budget 4bpw" in done.err
    plain, other = tmp_path / "plain", tmp_path / "other"
    assert cli.quick("calibrate", source, "-o", plain, "--method", "gptq").code == 0
    done = cli.quick("plan", source, "-o", scratch / "out", "--stats", plain, *words)
    assert (done.code, list(scratch.iterdir())) == (4, [])
    assert "faq-onnx calibrate --budget" in done.err

    def double(model: ir.Model) -> None:
        """Another model of the same shape: its census is the same."""
        value = next(v for n, v in model.graph.initializers.items() if "MatMul" in n)
        assert value.const_value is not None
        value.const_value = ir.tensor(2 * value.const_value.numpy(), name=value.name)

    assert cli.quick("calibrate", make_source(change=double), "-o", other, *words).code == 0
    done = cli.quick("plan", source, "-o", scratch / "out", "--stats", other, *words)
    assert (done.code, list(scratch.iterdir())) == (4, [])
    assert "another model" in done.err


def test_json_has_the_curve(cli: Any, small: Path, tmp_path: Path) -> None:
    words = ("--method", "rtn", "--budget", "4bpw", "--json")
    done = cli.quick("convert", small, "-o", tmp_path / "out", *words)
    found = done.json["trade_off"]
    assert found == json.loads((tmp_path / "out/report.json").read_text())["trade_off"]
    assert found["kind"] == "bpw"
    assert found["limit"] == 4
    assert len(found["curve"]) > 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "dynamo20-qwen2-untied-gemm-fp32",  # values between layers are [batch * sequence, width]
        "genai-qwen2-tied-fp32",  # the embedding is the head's weight behind a Transpose
        "mobius-llama-tied-fp16",
        "optimum-llama-tieddup-fp32",
    ],
)
def test_exports_of_other_tools(cli: Any, tmp_path: Path, name: str) -> None:
    source, out = FIXTURES / name, tmp_path / "out"
    settings = ("--samples", "4", "--sequence-length", "32", "--verify-samples", "2", "-q")
    words = (*settings, "--max-kl", "9", "--method", "rtn", "--budget")
    done = cli.run("convert", source, "-o", out, *words, "6.6bpw")
    assert done.code == 0, done.err
    report = _report(out)
    assert report.trade_off is not None
    assert report.verification is not None
    assert report.verification.logits is not None
    assert report.totals.bits_per_weight <= 6.6
    assert report.totals.output_bytes <= report.trade_off.chosen.bytes
    # random weights: the sum of small errors, within what their interaction was seen to add
    assert report.verification.logits.kl_nats < 4 * report.trade_off.chosen.kl


# --- limits of a target --------------------------------------------------------------------

# K is 48, 96 and 48: of all block sizes, Qualcomm's NPU takes 16 at 4 bits, and 32 for one site.
NARROW = TinyLlama(layers=1, hidden=48, heads=3, kv_heads=1, intermediate=96)


def test_only_formats_that_the_target_runs_compete(
    cli: Any, make_source: MakeSource, tmp_path: Path
) -> None:
    narrow = make_source(NARROW)
    stats, plan, padded = (tmp_path / name for name in ("stats", "plan", "padded"))
    words = ("--method", "rtn", "--embedding", "auto", "--budget", "5.8bpw")
    npu = ("--target", "qnn")
    assert cli.quick("calibrate", narrow, "-o", stats, *words, *npu).code == 0
    done = cli.quick("plan", narrow, "-o", plan, "--stats", stats, *words, *npu)
    assert done.code == 0, done.err
    found = QuantPlan.load(plan / "plan.json")
    widths = {site["name"]: site["in_features"] for site in _sites_of(cli, narrow)}
    for site in found.sites:
        assert site.format is not None
        assert widths[site.site] % site.format.block_size == 0
    assert [table.format for table in found.embeddings] == [None]
    done = cli.quick("plan", narrow, "-o", padded, "--stats", stats, *words)
    assert done.code == 0, done.err
    free = QuantPlan.load(padded / "plan.json")
    assert any(p.format and widths[p.site] % p.format.block_size for p in free.sites)
    assert found.trade_off is not None
    assert free.trade_off is not None
    assert found.trade_off.curve[0].bits_per_weight > free.trade_off.curve[0].bits_per_weight


@pytest.mark.parametrize(
    ("spec", "words", "reasons"),
    [
        (
            TinyLlama(layers=1, hidden=40, heads=5, kv_heads=1),  # no block divides 40
            "--budget 5bpw",
            ("would not run on qnn", "K=40", "allowed a float weight", "--exclude"),
        ),
        (
            NARROW,
            "--budget 4bpw",
            ("cannot be met", "smallest possible value is", "formats that qnn does not run"),
        ),
        (TinyLlama(layers=1), "--budget 5bpw --embedding 4", ("--embedding keep",)),
        (
            TinyLlama(layers=1, tie=Tie.SHARED),
            "--budget kl<=0.5 --embedding shared",
            ("an embedding in", "--embedding keep"),
        ),
    ],
    ids=["no format", "no size", "a table", "a shared table"],
)
def test_what_a_target_cannot_run_is_refused_before_measuring(  # noqa: PLR0913, PLR0917 - fixtures
    cli: Any,
    make_source: MakeSource,
    scratch: Path,
    spec: TinyLlama,
    words: str,
    reasons: tuple[str, ...],
) -> None:
    narrow = make_source(spec)
    unread = ("--calibration", scratch / "never-opened.txt")
    npu = ("--target", "qnn", "--method", "rtn", *words.split())
    done = cli.quick("convert", narrow, "-o", scratch / "out", *npu, *unread)
    assert (done.code, list(scratch.iterdir())) == (5, []), done.err
    for reason in reasons:
        assert reason in done.err
    assert "never-opened" not in done.err


def test_the_smallest_size_that_is_named_can_be_had(
    cli: Any, make_source: MakeSource, tmp_path: Path
) -> None:
    """What is said without measuring is what the planner finds afterwards."""
    narrow = make_source(NARROW)
    words = ("--method", "rtn", "--target", "qnn")
    done = cli.quick("calibrate", narrow, "-o", tmp_path / "no", *words, "--budget", "1bpw")
    assert done.code == 5
    smallest = done.err.partition("smallest possible value is ")[2].partition("bpw")[0]
    stats, plan = tmp_path / "stats", tmp_path / "plan"
    wish = (*words, "--budget", f"{smallest}bpw")
    assert cli.quick("calibrate", narrow, "-o", stats, *wish).code == 0
    done = cli.quick("plan", narrow, "-o", plan, "--stats", stats, *wish)
    assert done.code == 0, done.err


def _sites_of(cli: Any, source: Path) -> list[dict[str, Any]]:
    sites: list[dict[str, Any]] = cli.run("inspect", source, "--json", "-q").json["sites"]
    return sites


@pytest.mark.slow
@pytest.mark.skipif(not qnn_runtime.is_here(), reason="onnxruntime-qnn is an extra")
def test_mixed_formats_compile_for_qualcomms_npu(cli: Any, tmp_path: Path) -> None:
    source = FIXTURES / "optimum-qwen3-untied-fp32"
    out, tokens = tmp_path / "out", tmp_path / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(3, 150, (8, 64)))
    words = ("--method", "rtn", "--budget", "5.2bpw", "--calibration", tokens, "--target", "qnn")
    small = ("--target-option", "prompt_tokens=16", "--target-option", "context=64")
    done = cli.quick("convert", source, "-o", out, *words, *small)
    assert done.code == 0, done.err
    proof = PackageManifest.load(out / "package.json").proof
    assert [check.passed for check in proof.checks] == [True, True, True]
    report = _report(out)
    assert len({(row.code_bits, row.block_size) for row in report.sites}) > 1
    assert all(row.in_features % (row.block_size or 1) == 0 for row in report.sites)
