"""tools/bench_decode.py measures packages side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from faq_onnx.artifacts.source import SourceModel
from faq_onnx.progress import SILENT
from faq_onnx.targets.genai_config import write_genai_config
from faq_onnx.testing import write_tiny_llama

TOOL = Path(__file__).parents[2] / "tools" / "bench_decode.py"


@pytest.mark.slow
def test_every_package_has_a_row_for_every_prompt(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    path = write_tiny_llama(tmp_path / "tiny")
    source = SourceModel(given="tiny", onnx_path=path, folder=path.parent)
    write_genai_config(path.parent, source, SILENT)
    rows = tmp_path / "rows.json"
    words = [f"a={path.parent}", f"b={path.parent}", "--prompts", "4", "9", "--new", "5"]
    command = [sys.executable, str(TOOL), *words, "--rounds", "2", "--json", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(rows.read_text())
    assert [(row["name"], row["prompt"]) for row in found] == [
        ("a", 4),
        ("b", 4),
        ("a", 9),
        ("b", 9),
    ]
    assert all(row["decode"] > 0 and row["prefill"] > 0 for row in found)
    assert found[0]["decode_ratio"] == 1
    assert done.stdout.startswith("| package | prompt |")
