"""`faq-onnx package`: the folder runs in onnxruntime-genai and says what its source says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from faq_onnx.artifacts.package import PackageManifest
from faq_onnx.artifacts.run import RunReport
from faq_onnx.graph.io import load_model
from faq_onnx.testing import TinyLlama, tiny_tokenizer, write_tiny_llama

EXPORTERS = Path(__file__).parents[1] / "fixtures" / "exporters"
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")


def genai_source(name: str, folder: Path) -> Path:
    """An exported decoder with a tokenizer, which genai will not do without."""
    shutil.copytree(EXPORTERS / name, folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def kinds(folder: Path) -> set[str]:
    return {node.op_type for node in load_model(folder / "model.onnx").graph}


def shares_buffer(folder: Path) -> bool:
    config = json.loads((folder / "genai_config.json").read_text())
    return bool(config["search"]["past_present_share_buffer"])


def heads_of_24(folder: Path) -> Path:
    """A decoder that RotaryEmbedding rotates outside of the operator."""
    return write_tiny_llama(folder, TinyLlama(hidden=96)).parent


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "phi3", "qwen2-fp16", "heads of 24"])
def test_greedy_tokens_in_genai_equal_the_unfused_model_in_onnxruntime(
    cli: Any, tmp_path: Path, family: str
) -> None:
    pytest.importorskip("onnxruntime_genai")
    if family == "heads of 24":
        source = heads_of_24(tmp_path / "source")
    else:
        architecture, _, dtype = family.partition("-")
        name = f"optimum-{architecture}-untied-{dtype or 'fp32'}"
        place = "../sliced/" if architecture == "phi3" else ""
        source = genai_source(f"{place}{name}", tmp_path / "source")
    done = cli.run("package", source, "-o", tmp_path / "out", "--target", "genai", "-q")
    assert done.code == 0, done.err
    manifest = PackageManifest.load(tmp_path / "out" / "package.json")
    (check,) = manifest.proof.checks
    assert (check.name, check.passed) == ("greedy tokens", True)
    assert manifest.proof.versions.keys() == {"onnxruntime", "onnxruntime-genai"}
    assert manifest.attention is not None
    assert (manifest.attention.fused, manifest.attention.layers) == (2, 2)
    assert manifest.attention.packed == 2
    assert "Softmax" not in kinds(tmp_path / "out")
    assert shares_buffer(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_int8_cache_runs_in_genai(cli: Any, tmp_path: Path, family: str) -> None:
    pytest.importorskip("onnxruntime_genai")
    source = genai_source(f"optimum-{family}-untied-fp32", tmp_path / "source")
    words = ("package", source, "-o", tmp_path / "out", "--target", "genai", "-q", "--json")
    done = cli.run(*words, "--target-option", "kv_cache=int8")
    assert done.code == 0, done.err
    (check,) = done.json["proof"]["checks"]
    assert (check["name"], check["passed"]) == ("greedy tokens", True)
    ((wide, narrow, kl, _, _),) = done.json["tables"][0]["rows"]
    assert wide == 4 * narrow
    assert 0 < kl < 0.1
    model = load_model(tmp_path / "out" / "model.onnx")
    cache = [value for value in model.graph.inputs if "past" in str(value.name)]
    assert {str(value.dtype) for value in cache} == {"INT8"}
    assert shares_buffer(tmp_path / "out")
    assert cli.run("verify", tmp_path / "out", "-q").code == 0


def test_an_int8_cache_needs_fused_attention(cli: Any, tmp_path: Path) -> None:
    source = genai_source("optimum-llama-untied-fp32", tmp_path / "source")
    words = ("package", source, "-o", tmp_path / "out", "--target", "genai", "-q")
    done = cli.run(*words, "--no-fuse-attention", "--target-option", "kv_cache=int8")
    assert done.code == 8
    assert "kv_cache=int8 needs GroupQueryAttention in every layer" in done.err
    assert not (tmp_path / "out").exists()


def test_attention_can_stay(cli: Any, tmp_path: Path) -> None:
    source = genai_source("optimum-llama-untied-fp32", tmp_path / "source")
    words = ("package", source, "-o", tmp_path / "out", "--target", "genai", "-q", "--json")
    done = cli.run(*words, "--no-fuse-attention")
    assert done.code == 0, done.err
    assert done.json["attention"] is None
    assert done.json["proof"]["checks"][0]["passed"] is not False
    assert "Softmax" in kinds(tmp_path / "out")
    assert not shares_buffer(tmp_path / "out")


def test_what_stays_is_said_with_its_reason(cli: Any, tmp_path: Path) -> None:
    source = genai_source("mobius-llama-untied-fp32", tmp_path / "source")
    done = cli.run("package", source, "-o", tmp_path / "out", "--target", "genai", "-q")
    assert done.code == 0, done.err
    assert "0 of 2 layers in GroupQueryAttention" in done.out
    assert "Attention is fused in its own way" in done.out
    assert not shares_buffer(tmp_path / "out")


def test_an_unknown_target_is_a_wrong_call(cli: Any, tmp_path: Path) -> None:
    done = cli.run("package", tmp_path, "-o", tmp_path / "out", "--target", "toaster")
    assert done.code == 2
    assert "invalid choice: 'toaster'" in done.err


@pytest.mark.parametrize("fuse", [True, False])
def test_convert_fuses_unless_told_not_to(cli: Any, tmp_path: Path, fuse: bool) -> None:
    path = write_tiny_llama(tmp_path / "model")
    option = "--fuse-attention" if fuse else "--no-fuse-attention"
    out = tmp_path / "out"
    done = cli.quick("convert", path.parent, "-o", out, "--method", "rtn", option)
    assert done.code == 0, done.err
    report = RunReport.load(out / "report.json").verification
    assert report is not None
    assert report.proof is not None
    assert not report.proof.failed
    assert ("GroupQueryAttention" in kinds(out)) is fuse
    assert ("2 of 2 layers in GroupQueryAttention" in (out / "summary.md").read_text()) is fuse
    assert (report.attention is not None) is fuse
    assert not list(out.glob("unfused*"))
