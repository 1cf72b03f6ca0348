"""The demo on a tiny model: its screen, its cache, and its way out of trouble."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faq_onnx.artifacts.run import RunReport
from faq_onnx.testing import write_tiny_llama

DEMO = Path(__file__).parents[2] / "tools" / "demo.py"
PACKAGES = ("rtn-4bit", "awq-4bit", "faq-gptq-4bit")
SMALL = ("--samples", "4", "--sequence-length", "64", "--max-tokens", "8")


def demo(*arguments: str | Path, columns: int = 100) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DEMO, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": str(columns)},
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def first(source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return demo("--source", source, "--folder", folder, *SMALL)


pytestmark = pytest.mark.slow


def test_table_has_the_figures_of_the_reports(
    first: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert first.returncode == 0, first.stderr
    table = first.stdout.strip().split("\n\n")[0]
    rows = {line.split()[0]: line for line in table.splitlines()}
    for name in PACKAGES:
        report = RunReport.load(folder / name / "report.json")
        assert report.verification is not None
        logits = report.verification.logits
        assert logits is not None
        line = rows[name.removesuffix("-4bit").upper()]
        assert f" {logits.kl_nats:.4f} " in line
        assert f" {logits.perplexity:.2f} " in line
        assert float(line.split()[-1]) > 0  # tokens/s
    assert " 100.0 % " in rows["float"]


def test_all_methods_are_judged_on_the_same_prose_and_calibrated_alike(
    first: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert first.returncode == 0, first.stderr
    reports = [RunReport.load(folder / name / "report.json") for name in PACKAGES]
    judged = {r.verification.logits for r in reports if r.verification is not None}
    floats = {logits.perplexity_float for logits in judged if logits is not None}
    # 32-bit sums in onnxruntime come out alike in every run of one graph
    assert len(floats) == 1
    assert len({r.config.calibration for r in reports}) == 1
    assert [r.config.method.value for r in reports] == ["rtn", "awq", "faq-gptq"]


def test_two_continuations_and_where_things_lie(
    first: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert " | FAQ-GPTQ, 4 bits (" in first.stdout
    assert re.search(r"\((all|the first) \d+ (of 8 )?tokens are the same\)", first.stdout)
    for name in PACKAGES:
        assert f"  {folder / name}\n" in first.stdout
    assert not (folder / "work").exists()


def test_second_run_takes_everything_from_the_first(
    first: subprocess.CompletedProcess[str], source: Path, folder: Path
) -> None:
    assert first.returncode == 0, first.stderr
    paths = [*(folder / name / "model.onnx" for name in PACKAGES), *folder.glob("tokens-*.npy")]
    before = [path.stat().st_mtime_ns for path in paths]
    again = demo("--source", source, "--folder", folder, *SMALL, columns=60)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("taken from") == len(paths) == 4
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert " | FAQ" not in again.stdout  # a narrow terminal: one above the other
    assert "\nFAQ-GPTQ, 4 bits (" in again.stdout


def test_ctrl_c_keeps_what_was_finished(source: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [sys.executable, DEMO, "--source", source, "--folder", tmp_path]
    with subprocess.Popen([*command, *SMALL], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "rtn-4bit").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "the next run goes on there" in error
    assert "Traceback" not in error
    left = {path.name for path in tmp_path.iterdir()}
    assert "rtn-4bit" in left
    assert not any("partial" in name for name in left)
    again = demo("--source", source, "--folder", tmp_path, *SMALL)
    assert again.returncode == 0, again.stderr
    assert "RTN: taken from" in again.stderr


def test_fresh_removes_only_what_the_demo_wrote(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / "rtn-4bit").mkdir()
    (tmp_path / "rtn-4bit" / "report.json").write_text("{}")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    result = demo("--source", broken, "--folder", tmp_path, "--fresh")
    assert result.returncode == 3, result.stderr
    assert "it is no GGUF file" in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "mine.txt").exists()
    assert not (tmp_path / "rtn-4bit").exists()


def test_missing_source_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "rtn-4bit").mkdir()
    result = demo("--source", tmp_path / "typo.gguf", "--folder", tmp_path, "--fresh")
    assert result.returncode == 3, result.stderr
    assert result.stderr.startswith("error: ")
    assert (tmp_path / "rtn-4bit").exists()
