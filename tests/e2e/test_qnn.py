"""The target qnn in Qualcomm's own compiler and simulator."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.package import PackageManifest
from faq_onnx.artifacts.run import RunReport
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.passes import StaticShapesPass, run_passes
from faq_onnx.targets.qnn_runtime import QnnError, compile_graph, is_here
from faq_onnx.testing import write_tiny_llama

QWEN3 = Path(__file__).parents[1] / "fixtures" / "exporters" / "optimum-qwen3-untied-fp32"
ARCHITECTURES = ("v69", "v73", "v75", "v79", "v81")
SMALL = ("--target-option", "prompt_tokens=16", "--target-option", "context=64")
CALIBRATION = ("--samples", "4", "--sequence-length", "32", "--verify-samples", "2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_here(), reason="onnxruntime-qnn is an extra: faq-onnx[qnn]"),
]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(3, 150, (8, 64)))
    return path


def _proved(manifest: PackageManifest) -> bool:
    return len(manifest.proof.checks) == 3 and all(c.passed for c in manifest.proof.checks)


def test_convert_makes_a_package_that_verify_proves_again(
    cli: Any, tokens: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("convert", QWEN3, "-o", out, "--target", "qnn", *SMALL, *CALIBRATION, "-q")
    done = cli.run(*words, "--method", "rtn", "--calibration", tokens, "--max-kl", "9")
    assert done.code == 0, done.err
    manifest = PackageManifest.load(out / "package.json")
    assert _proved(manifest)
    assert manifest.proof.versions.keys() == {"onnxruntime", "onnxruntime-qnn"}
    (table,) = manifest.tables
    assert [row[0] for row in table.rows] == ["prefill", "decode"]
    assert all(row[4] == 0 for row in table.rows)  # nodes elsewhere
    report = RunReport.load(out / "report.json")
    assert report.config.fuse_attention is False
    assert report.config.embedding == "keep"
    kinds = [node.op_type for node in load_model(out / "prefill_ctx.onnx").graph]
    assert kinds == ["EPContext"]
    again = cli.run("verify", out, "-q", "--json")
    assert again.code == 0, again.err
    assert again.json["changes"] == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_compiles_and_runs(cli: Any, tmp_path: Path, arch: str) -> None:
    source = write_tiny_llama(tmp_path / "source").parent
    out = tmp_path / "out"
    words = ("package", source, "-o", out, "--target", "qnn", *SMALL, "-q")
    done = cli.run(*words, "--target-option", f"arch={arch}")
    assert done.code == 0, done.err
    assert _proved(PackageManifest.load(out / "package.json"))


def test_hidden_states_whose_squares_overflow_float16(cli: Any, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "source")
    model = ir.load(path)
    table = model.graph.initializers["model.embed_tokens.weight"]
    assert table.const_value is not None
    values = table.const_value.numpy()
    # as large as SmolLM2's; with norms as the exporter writes them, logits are off by 1300 %
    grown = values * np.float32(20_000 / np.abs(values).max())
    table.const_value = ir.tensor(grown, name=table.name)
    ir.save(model, path)
    done = cli.run("package", path.parent, "-o", tmp_path / "out", "--target", "qnn", *SMALL, "-q")
    assert done.code == 0, done.err
    assert _proved(PackageManifest.load(tmp_path / "out" / "package.json"))


def test_verify_fails_where_a_binary_is_damaged(cli: Any, tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source").parent
    out = tmp_path / "out"
    assert cli.run("package", source, "-o", out, "--target", "qnn", *SMALL, "-q").code == 0
    binary = out / "decode_ctx_qnn.bin"
    binary.write_bytes(binary.read_bytes()[:1000])
    done = cli.run("verify", out, "-q")
    assert done.code == 7
    assert "logits of the reloaded binaries" in done.err


def test_another_compiler_compiles_again(cli: Any, tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source").parent
    out = tmp_path / "out"
    assert cli.run("package", source, "-o", out, "--target", "qnn", *SMALL, "-q").code == 0
    build = json.loads((out / "qnn.json").read_text())
    build["versions"]["onnxruntime-qnn"] = "0.1"
    build["graphs"]["decode"]["nodes"] = {"CPUExecutionProvider": 1}
    (out / "qnn.json").write_text(json.dumps(build))
    done = cli.run("verify", out, "-q")
    assert done.code == 0, done.err  # what the file says of the old compiler does not count


def test_nodes_that_the_npu_does_not_take_are_named(tmp_path: Path) -> None:
    shutil.copytree(QWEN3, tmp_path / "model")
    model = load_model(tmp_path / "model" / "model.onnx")
    node = next(n for n in model.graph if n.op_type == "Softmax")
    node.op_type, node.name = "Hardmax", "odd"
    shapes = {
        str(value.name): (1, 2, 3, 16) if "past" in str(value.name) else (1, 1)
        for value in model.graph.inputs
    }
    run_passes(model, [StaticShapesPass({**shapes, "attention_mask": (1, 4)})])
    save_model(model, tmp_path / "odd.onnx")
    with pytest.raises(QnnError, match=r"QNN does not take odd \(Hardmax\)"):
        compile_graph(tmp_path / "odd.onnx", "v75")
