"""`faq-onnx opt` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest

from faq_onnx.cli.main import main
from faq_onnx.testing import write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


def _low_bit_nodes(path: Path) -> int:
    return sum(node.op_type == "MatMulNBits" for node in ir.load(path).graph)


def test_passes_run_in_order(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "low.onnx"
    pipeline = "fold-scales{scale=2},matmul-to-nbits{block_size=16}"
    assert main(["opt", str(model), "-p", pipeline, "-o", str(out), "--json", "-q"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [(row["pass"], row["modified"]) for row in result["passes"]] == [
        ("fold-scales", True),
        ("matmul-to-nbits", True),
    ]
    assert result["size_bytes"] == out.stat().st_size < model.stat().st_size
    assert _low_bit_nodes(out) == 15  # 7 in each of 2 layers, and the head
    assert captured.err == ""


def test_external_data_lies_beside_the_model(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "low.onnx"
    words = ["opt", str(model), "-p", "matmul-to-nbits", "-o", str(out), "--external-data"]
    assert main(words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["low.onnx", "low.onnx.data"]
    assert _low_bit_nodes(out) == 15


def test_existing_output_is_kept_without_force(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "low.onnx"
    out.write_text("mine")
    words = ["opt", str(model), "-p", "matmul-to-nbits", "-o", str(out)]
    assert main(words) == 8
    assert "exists; choose another -o, or --force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main([*words, "--force"]) == 0
    assert _low_bit_nodes(out) == 15


def test_model_can_be_replaced_by_its_result(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path)
    assert main(["opt", str(path), "-p", "matmul-to-nbits", "-o", str(path), "--force"]) == 0
    assert _low_bit_nodes(path) == 15


def test_wrong_pipeline_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "low.onnx"
    assert main(["opt", str(model), "-p", "fold,matmul-to-nbits{bit=3}", "-o", str(out)]) == 2
    message = capsys.readouterr().err
    assert "unknown pass 'fold'" in message
    assert "unknown option bit" in message
    assert list(tmp_path.iterdir()) == []
