"""What a package says about how to run it, run from inside the folder as it stands there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from faq_onnx.artifacts.package import PackageManifest
from faq_onnx.targets import TARGETS
from faq_onnx.targets.opening import open_target
from faq_onnx.testing import write_tiny_llama

NEEDS = {"genai": "onnxruntime_genai", "qnn": "onnxruntime_qnn"}
PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "target", ["genai", "ort-mobile", pytest.param("qnn", marks=pytest.mark.slow)]
)
def test_the_program_runs_in_the_folder(cli: Any, tmp_path: Path, target: str) -> None:
    if target in NEEDS and importlib.util.find_spec(NEEDS[target]) is None:
        pytest.skip(f"{NEEDS[target]} is optional")
    source, out = write_tiny_llama(tmp_path / "source").parent, tmp_path / "out"
    done = cli.run("package", source, "-o", out, "--target", target)
    assert done.code == 0, done.err
    usage = PackageManifest.load(out / "package.json").usage
    assert usage in done.out
    (program,) = PROGRAM.findall(usage)
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=out, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def test_the_summary_of_a_conversion_is_about_its_target(
    cli: Any, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "phone"
    done = cli.quick("convert", source, "-o", out, "--target", "ort-mobile")
    assert done.code == 0, done.err
    summary = (out / "summary.md").read_text()
    assert PackageManifest.load(out / "package.json").usage in summary
    assert "model.ort" in summary
    assert "onnxruntime_genai" not in summary


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_says_how_to_run_its_folder(name: str) -> None:
    assert len(open_target(name, {}).usage) > 100
