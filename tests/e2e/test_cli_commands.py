"""Stages one by one, interrupted and resumed runs, and the commands around a conversion."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import faq_onnx
from faq_onnx.artifacts.run import RunReport
from faq_onnx.artifacts.stats import StatsManifest
from faq_onnx.config import CalibrationConfig, QuantizeConfig, VerifyConfig
from faq_onnx.progress import Advance
from faq_onnx.runtime.session import open_session
from faq_onnx.testing import TinyLlama, tiny_feeds

MakeSource = Callable[..., Path]


def model_bytes(out: Path) -> bytes:
    return (out / "model.onnx").read_bytes()


# --- stages --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["rtn", pytest.param("awq", marks=pytest.mark.slow), "faq", "hqq", "faq-gptq"]
)
def test_stages_give_the_bytes_of_convert(
    cli: Any, source: Path, tmp_path: Path, method: str
) -> None:
    stats, plan, staged, whole = (tmp_path / name for name in ("stats", "plan", "staged", "whole"))
    words = ("--method", method, "--bits", "3", "--lm-head", "4")
    assert cli.quick("calibrate", source, "-o", stats, *words).code == 0
    assert cli.quick("plan", source, "-o", plan, "--stats", stats, *words).code == 0
    # apply is not told method and bits again: the plan knows them
    done = cli.quick("apply", source, "--plan", plan, "--stats", stats, "-o", staged)
    assert done.code == 0, done.err
    assert cli.quick("convert", source, "-o", whole, *words).code == 0
    assert model_bytes(staged) == model_bytes(whole)
    found, wanted = (RunReport.load(out / "report.json") for out in (staged, whole))
    assert found.config == wanted.config
    assert found.sites == wanted.sites
    assert found.verification == wanted.verification
    assert found.fingerprints == wanted.fingerprints


def test_statistics_and_plans_of_another_model_are_refused(
    cli: Any, source: Path, make_source: MakeSource, scratch: Path, tmp_path: Path
) -> None:
    other = make_source(TinyLlama(layers=1))
    stats, plan = tmp_path / "stats", tmp_path / "plan"
    assert cli.quick("calibrate", other, "-o", stats).code == 0
    assert cli.quick("plan", other, "-o", plan, "--stats", stats).code == 0
    done = cli.quick("plan", source, "-o", scratch / "out", "--stats", stats)
    assert (done.code, list(scratch.iterdir())) == (4, [])
    assert "another model" in done.err
    done = cli.quick("apply", source, "-o", scratch / "out", "--plan", plan, "--stats", stats)
    assert (done.code, list(scratch.iterdir())) == (5, [])
    assert "another model" in done.err
    done = cli.quick("apply", other, "-o", scratch / "out", "--plan", stats)
    assert (done.code, list(scratch.iterdir())) == (5, [])
    assert "plan.json is missing" in done.err


def test_a_plan_is_not_carried_out_by_halves(
    cli: Any, source: Path, scratch: Path, tmp_path: Path
) -> None:
    """Without statistics grids and rounding would be plain, though the plan says otherwise."""
    stats, plan, empty = tmp_path / "stats", tmp_path / "plan", tmp_path / "empty"
    assert cli.quick("calibrate", source, "-o", stats).code == 0
    assert cli.quick("calibrate", source, "-o", empty, "--method", "rtn").code == 0
    assert cli.quick("plan", source, "-o", plan, "--stats", stats).code == 0
    for words in ((), ("--stats", empty)):
        done = cli.quick("apply", source, "-o", scratch / "out", "--plan", plan, *words)
        assert (done.code, list(scratch.iterdir())) == (4, [])
        assert "--stats" in done.err
    done = cli.quick("plan", source, "-o", scratch / "out")
    assert (done.code, list(scratch.iterdir())) == (5, [])
    assert "needs calibration statistics" in done.err


@pytest.mark.parametrize(
    ("name", "code"),
    [("stats/stats.json", 8), ("stats/part-*", 4), ("plan/plan.json", 8), ("plan/scales*", 5)],
)
def test_damaged_artifacts(  # noqa: PLR0913, PLR0917 - fixtures
    cli: Any, source: Path, scratch: Path, tmp_path: Path, name: str, code: int
) -> None:
    stats, plan = tmp_path / "stats", tmp_path / "plan"
    words: tuple[str | Path, ...] = ("--path", "float")  # the low-bit one takes its own moments
    assert cli.quick("calibrate", source, "-o", stats, *words).code == 0
    assert cli.quick("plan", source, "-o", plan, "--stats", stats, *words).code == 0
    for path in tmp_path.glob(name):
        path.write_bytes(path.read_bytes()[:50])
    words = ("--plan", plan, "--stats", stats)
    done = cli.quick("apply", source, "-o", scratch / "out", *words)
    assert (done.code, list(scratch.iterdir())) == (code, []), done.err
    assert str(tmp_path / name.partition("*")[0]) in done.err
    assert "again" in done.err


def test_config_without_what_genai_needs(
    cli: Any, make_source: MakeSource, tmp_path: Path
) -> None:
    path = make_source()
    (path.parent / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    done = cli.quick("convert", path, "-o", tmp_path / "out", "--method", "rtn")
    assert done.code == 0, done.err
    assert not (tmp_path / "out" / "genai_config.json").exists()


# --- interrupted and resumed ---------------------------------------------------------------


class PullThePlug:
    """Progress that interrupts at the given step of one stage, as Ctrl-C would."""

    def __init__(self, title: str, step: int) -> None:
        self.title, self.left, self.pulled = title, step, False

    @contextlib.contextmanager
    def stage(self, title: str, total: float, unit: str) -> Iterator[Advance]:
        """Count the steps of the one stage."""
        del total, unit

        def advance(_steps: float) -> None:
            if title == self.title and not self.pulled:
                self.left -= 1
                self.pulled = self.left < 0
                if self.pulled:
                    raise KeyboardInterrupt

        yield advance

    def note(self, text: str) -> None:
        """Nobody reads it."""


INTERRUPTIONS = [
    ("calibrate", 0),
    ("calibrate", 1),
    ("calibrate", 2),
    ("choose scales", 3),
    ("check the folded model", 1),
    ("round layer by layer", 0),
    ("round layer by layer", 5),
    ("quantize", 0),
    ("compare with the float model", 0),
]


@pytest.mark.parametrize("place", INTERRUPTIONS, ids=lambda place: f"{place[0]} {place[1]}")
def test_a_resumed_run_gives_the_same_bytes(
    whole: Path, source: Path, calibration_text: Path, tmp_path: Path, place: tuple[str, int]
) -> None:
    config = settings(calibration_text)
    out, work = tmp_path / "out", tmp_path / "work"
    plug = PullThePlug(*place)
    with pytest.raises(KeyboardInterrupt):
        faq_onnx.convert(str(source), out, config, work=work, progress=plug)
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    faq_onnx.convert(str(source), out, config, work=work)
    assert model_bytes(out) == model_bytes(whole)
    reports = [RunReport.load(folder / "report.json") for folder in (out, whole)]
    assert reports[0].verification == reports[1].verification


def test_a_work_folder_of_other_settings_is_no_harm(
    whole: Path, source: Path, make_source: MakeSource, calibration_text: Path, tmp_path: Path
) -> None:
    work, config = tmp_path / "work", settings(calibration_text)
    other = make_source(TinyLlama(layers=1, seed=1))
    faq_onnx.convert(str(other), tmp_path / "a", config, work=work)
    longer = config.calibration.model_copy(update={"sequence_length": 48})
    changed = config.model_copy(update={"calibration": longer})
    faq_onnx.convert(str(source), tmp_path / "b", changed, work=work)
    faq_onnx.convert(str(source), tmp_path / "c", config, work=work)
    assert model_bytes(tmp_path / "c") == model_bytes(whole)
    assert model_bytes(tmp_path / "b") != model_bytes(whole)


def settings(text: Path) -> QuantizeConfig:
    calibration = CalibrationConfig(source=str(text), samples=4, sequence_length=32)
    return QuantizeConfig(calibration=calibration, verify=VerifyConfig(samples=2, max_kl=9))


@pytest.fixture(scope="module")
def whole(source: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package that was made in one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    faq_onnx.convert(str(source), out, settings(calibration_text))
    return out


# --- around a conversion -------------------------------------------------------------------


def test_verify_finds_what_convert_found(cli: Any, whole: Path, source: Path) -> None:
    found = cli.run("verify", whole, "--source", source, "--json", "-q").json
    report = RunReport.load(whole / "report.json").verification
    assert report is not None
    assert report.logits is not None
    assert report.structure is not None
    assert found["logits"] == report.logits.model_dump()
    assert found["structure"] == report.structure.model_dump(mode="json")
    assert cli.run("verify", whole, "-q").code == 0


def test_verify_on_another_text(
    cli: Any, whole: Path, source: Path, calibration_text: Path, tmp_path: Path
) -> None:
    """The first windows of it, all of them, and no note where the text is a new one."""
    held_out = cli.run("verify", whole, "--source", source, "--json", "-q").json["logits"]
    other = tmp_path / "mine.txt"
    other.write_text("".join(reversed(calibration_text.read_text("utf-8").splitlines(True))))
    done = cli.run("verify", whole, "--source", source, "--text", other, "--verify-samples", 3)
    assert "3 windows" in done.err
    assert "flatters" not in done.err
    told = ("verify", whole, "--source", source, "--text", other, "--json", "-q")
    found = cli.run(*told, "--verify-samples", 3).json["logits"]
    assert found["tokens"] == 3 * 32
    assert found["kl_nats"] != held_out["kl_nats"]
    assert cli.run(*told).json["logits"]["tokens"] == held_out["tokens"]  # as convert's
    more = cli.run("verify", whole, "--source", source, "--verify-samples", 3, "--json", "-q")
    assert more.json["logits"]["tokens"] == 3 * 32


def test_verify_on_the_calibration_text_says_that_it_flatters(
    cli: Any, whole: Path, source: Path, calibration_text: Path
) -> None:
    done = cli.run("verify", whole, "--source", source, "--text", calibration_text)
    assert done.code == 0
    assert "which flatters it" in done.err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--text", "absent.txt"), (8, "name the float model with --source")),
        (("--verify-samples", 2), (8, "name the float model with --source")),
        (("--source", "{source}", "--text", "absent.txt"), (4, "text 'absent.txt': no such file")),
        (("--source", "{source}", "--verify-samples", 0), (2, "found 0; allowed 1 or more")),
    ],
)
def test_verify_refuses_a_text_that_it_cannot_use(
    cli: Any, whole: Path, source: Path, options: tuple[object, ...], expected: tuple[int, str]
) -> None:
    code, message = expected
    done = cli.run("verify", whole, "-q", *(str(text).format(source=source) for text in options))
    assert done.code == code
    assert message in done.err


def test_verify_sees_that_weights_have_changed(
    cli: Any, whole: Path, source: Path, tmp_path: Path
) -> None:
    model = ir.load(whole / "model.onnx")
    node = next(node for node in model.graph if node.op_type == "MatMulNBits")
    scales = node.inputs[2]
    assert scales is not None
    assert scales.const_value is not None
    scales.const_value = ir.tensor(scales.const_value.numpy() * 3, name=scales.name)
    (tmp_path / "report.json").write_bytes((whole / "report.json").read_bytes())
    ir.save(model, tmp_path / "model.onnx")
    good = cli.run("verify", whole, "--source", source, "--json", "-q").json
    bad = cli.run("verify", tmp_path, "--source", source, "--json", "-q").json
    assert bad["logits"]["kl_nats"] > 2 * good["logits"]["kl_nats"]


def test_verify_of_a_damaged_package(cli: Any, whole: Path, tmp_path: Path) -> None:
    done = cli.run("verify", tmp_path / "absent", "-q")
    assert done.code == 8
    assert "OUT folder" in done.err
    (tmp_path / "model.onnx").write_bytes(model_bytes(whole)[:5000])
    done = cli.run("verify", tmp_path, "-q", "--json")
    assert done.code == 3
    assert done.json["error"]["type"] == "CorruptModelError"
    assert str(tmp_path / "model.onnx") in done.json["error"]["message"]


def test_recipe_says_the_same_as_options(cli: Any, source: Path, tmp_path: Path) -> None:
    words = ("--method", "rtn", "--bits", "8", "--block-size", "64", "--exclude", "*down*")
    recipe = tmp_path / "mine.toml"
    recipe.write_text(cli.run("recipe", *words).out)
    assert cli.quick("convert", source, "-o", tmp_path / "a", *words).code == 0
    assert cli.quick("convert", source, "-o", tmp_path / "b", "--recipe", recipe).code == 0
    assert model_bytes(tmp_path / "a") == model_bytes(tmp_path / "b")
    winning = ("--recipe", recipe, "--bits", "4")
    assert cli.quick("convert", source, "-o", tmp_path / "c", *winning).code == 0
    assert RunReport.load(tmp_path / "c" / "report.json").config.bits == 4


def test_float_model_with_folded_scales_is_the_same_function(
    cli: Any, source: Path, tmp_path: Path
) -> None:
    """`opt` folds a saved plan into the float model."""
    stats, plan, folded = tmp_path / "stats", tmp_path / "plan", tmp_path / "folded.onnx"
    words = ("--method", "awq", "--lm-head", "same")
    assert cli.quick("calibrate", source, "-o", stats, *words).code == 0
    assert cli.quick("plan", source, "-o", plan, "--stats", stats, *words).code == 0
    pipeline = f"fold-scales{{plan={plan}}}"
    done = cli.run("opt", source, "-p", pipeline, "-o", folded, "-q")
    assert done.code == 0, done.err
    names = {value.name for value in ir.load(source).graph.initializers.values()}
    before, after = (_tensors(path) for path in (source, folded))
    changed = [name for name in names if not np.array_equal(before[name], after[name])]
    assert len(changed) > 10
    # Not the cache: its values are scaled for o_proj.
    feeds = tiny_feeds()
    wanted, got = (open_session(path).run(["logits"], feeds)[0] for path in (source, folded))
    # 2 layers of 7 products of at most 128 float32 terms, logits around 10
    tolerance = 500 * 10 * float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)


def _tensors(path: Path) -> dict[str | None, Any]:
    values = ir.load(path).graph.initializers.values()
    return {v.name: v.const_value.numpy() for v in values if v.const_value is not None}


def test_stdout_is_the_result_and_stderr_the_progress(
    source: Path, calibration_text: Path, tmp_path: Path
) -> None:
    words = ["--samples", "4", "--sequence-length", "32", "--verify-samples", "2", "--json"]
    words += ["--calibration", str(calibration_text), "--max-kl", "9"]
    done = subprocess.run(
        [sys.executable, "-m", "faq_onnx", "convert", source, "-o", "out", *words],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    report = json.loads(done.stdout)
    assert report["totals"]["quantized_sites"] == 15
    stages = ("calibrate", "choose scales", "round layer by layer", "quantize")
    for stage in (*stages, "compare with the float model"):
        assert stage in done.stderr
    # onnxruntime, too, leaves nothing behind (its telemetry would)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("context", "length"), [(20, 20), (400, 32)])
def test_windows_are_no_longer_than_the_context(
    cli: Any, source: Path, tmp_path: Path, context: int, length: int
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(source.parent, folder)
    (folder / "config.json").write_text(f'{{"max_position_embeddings": {context}}}')
    words = ["--samples", "4", "--sequence-length", "32", "--calibration", cli.text]
    done = cli.run("calibrate", folder / source.name, "-o", tmp_path / "stats", *words)
    assert done.code == 0, done.err
    manifest = StatsManifest.load(tmp_path / "stats" / "stats.json")
    assert manifest.tokens == 4 * length
    assert (f"windows of {context} tokens" in done.err) == (context < 32)


def test_report_says_how_much_text_was_looked_at(cli: Any, source: Path, tmp_path: Path) -> None:
    """Not how much was asked for: the text has fewer windows."""
    words = ("--method", "best", "--samples", "100000", "--sequence-length", "32")
    assert cli.quick("convert", source, "-o", tmp_path / "out", *words).code == 0
    report = RunReport.load(tmp_path / "out" / "report.json")
    assert 32 * 64 < report.calibration_tokens < 32 * 1000
    assert f"{report.calibration_tokens:,} tokens in windows of up to 32" in (
        tmp_path / "out" / "summary.md"
    ).read_text(encoding="utf-8")


def test_export_of_what_is_onnx_already(cli: Any, source: Path, scratch: Path) -> None:
    done = cli.run("export", source, "-o", scratch / "out", "-q")
    assert (done.code, list(scratch.iterdir())) == (8, [])
    assert "is ONNX already" in done.err
