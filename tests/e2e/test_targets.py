"""`--target`: limits before the work, proofs in the manifest, and the same proofs later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.package import PackageManifest
from faq_onnx.artifacts.run import RunReport
from faq_onnx.artifacts.sites import Tie
from faq_onnx.targets import TARGETS
from faq_onnx.testing import TinyLlama, write_tiny_llama


@pytest.fixture(scope="module")
def low_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted package for genai."""
    import faq_onnx  # noqa: PLC0415 - heavy

    folder = tmp_path_factory.mktemp("low_bit")
    source = write_tiny_llama(folder / "source").parent
    config = faq_onnx.QuantizeConfig(
        method=faq_onnx.Method.RTN,
        lm_head="4",
        embedding="keep",
        symmetric=True,
        calibration=faq_onnx.CalibrationConfig(sequence_length=32),
        verify=faq_onnx.VerifyConfig(samples=2, max_kl=9),
    )
    faq_onnx.convert(str(source), folder / "out", config)
    return folder / "out"


def _spoil_block_size(source: Path, output: Path) -> Path:
    """The same model with blocks that no kernel has."""
    model = ir.load(source / "model.onnx")
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            size = node.attributes["block_size"].as_int()
            node.attributes["block_size"] = ir.AttrInt64("block_size", size // 4)
            packed, scales = node.inputs[1:3]
            assert packed is not None
            assert scales is not None
            _replace(packed, _numpy(packed).reshape(len(_numpy(packed)), -1, size // 8))
            _replace(scales, np.repeat(_numpy(scales), 4, axis=1))
    output.mkdir()
    ir.save(model, output / "model.onnx")
    return output / "model.onnx"


def _numpy(value: ir.Value) -> npt.NDArray[Any]:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy())


def _replace(value: ir.Value, array: npt.NDArray[Any]) -> None:
    value.const_value = ir.tensor(array, name=value.name)
    value.shape = ir.Shape(array.shape)


def test_the_manifest_of_convert_says_what_was_proved(cli: Any, low_bit: Path) -> None:
    manifest = PackageManifest.load(low_bit / "package.json")
    assert manifest.target == "genai"
    assert len(manifest.reference.tokens) == 16
    assert "onnxruntime" in manifest.proof.versions
    assert manifest.files["model.onnx"] == (low_bit / "model.onnx").stat().st_size
    done = cli.run("verify", low_bit, "-q", "--json")
    assert done.code == 0, done.err
    assert done.json["proof"] == manifest.proof.model_dump(mode="json")
    assert done.json["changes"] == []


def test_verify_tells_other_versions_and_files(cli: Any, low_bit: Path, tmp_path: Path) -> None:
    out = _copy(low_bit, tmp_path / "copy")
    manifest = json.loads((out / "package.json").read_text())
    manifest["proof"]["versions"]["onnxruntime"] = "0.1"
    manifest["files"]["gone.bin"] = 3
    (out / "package.json").write_text(json.dumps(manifest))
    done = cli.run("verify", out, "-q")
    assert done.code == 0, done.err
    assert "changed     onnxruntime: 0.1 when it was made" in done.out
    assert "changed     gone.bin: 3 bytes when it was made, missing here" in done.out


def test_verify_fails_where_a_check_no_longer_passes(
    cli: Any, low_bit: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime_genai")
    out = _copy(low_bit, tmp_path / "copy")
    config = json.loads((out / "genai_config.json").read_text())
    config["model"]["type"] = "no_such_type"
    (out / "genai_config.json").write_text(json.dumps(config))
    done = cli.run("verify", out, "-q")
    assert done.code == 7
    assert "greedy tokens: 16 of 16 equal onnxruntime's when it was made" in done.err
    assert "no_such_type" in done.err


def test_inspect_lists_what_would_not_run(cli: Any, low_bit: Path, tmp_path: Path) -> None:
    fine = cli.run("inspect", low_bit, "--target", "genai", "-q")
    assert fine.code == 0, fine.err
    assert fine.out == "genai: nothing here is refused\n"
    planned = cli.run("inspect", low_bit.parent / "source", "--target", "genai", "-q")
    assert "15 linear sites" in planned.out
    assert "genai: nothing here is refused" in planned.out
    bad = _spoil_block_size(low_bit, tmp_path / "bad")
    done = cli.run("inspect", bad, "--target", "genai", "--json", "-q")
    assert done.code == 0, done.err
    assert done.json["target"] == "genai"
    assert done.json["refusals"][0]["way_out"] == "--block-size 16"


def test_package_refuses_what_would_not_run(cli: Any, low_bit: Path, tmp_path: Path) -> None:
    bad = _spoil_block_size(low_bit, tmp_path / "bad")
    done = cli.run("package", bad, "-o", tmp_path / "out", "--target", "genai", "-q")
    assert done.code == 5
    assert "would not run on genai" in done.err
    assert "blocks of 8; allowed 16, 32, 64, 128, 256; --block-size 16" in done.err
    assert not (tmp_path / "out").exists()


def test_the_nearest_block_size_is_named(cli: Any, low_bit: Path, tmp_path: Path) -> None:
    done = cli.run("convert", low_bit, "-o", tmp_path / "out", "--block-size", "100")
    assert done.code == 2
    assert "allowed 16, 32, 64, 128 or 256 (nearest: 128)" in done.err


@pytest.mark.parametrize("command", ["convert", "calibrate", "plan", "apply", "package"])
def test_a_wrong_option_lists_the_right_ones(cli: Any, low_bit: Path, command: str) -> None:
    words = (command, low_bit, "-o", "out", "--target", "ort-mobile", "--target-option", "wings=2")
    done = cli.run(*words, *(("--plan", "none") if command == "apply" else ()))
    assert done.code == 2
    assert "--target-option wings: found '2'" in done.err
    assert "options of the target ort-mobile: none" in done.err


def test_apply_makes_a_proved_package_of_its_target(cli: Any, tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source", TinyLlama(layers=1)).parent
    plan, out, phone = tmp_path / "plan", tmp_path / "out", ("--target", "ort-mobile")
    settings = ("--method", "rtn", "--lm-head", "4")
    assert cli.quick("plan", source, "-o", plan, *settings, *phone).code == 0
    done = cli.quick("apply", source, "--plan", plan, "-o", out, *phone)
    assert done.code == 0, done.err
    assert (out / "model.ort").is_file()
    assert not (out / "model.onnx").exists()
    manifest = PackageManifest.load(out / "package.json")
    assert manifest.target == "ort-mobile"
    assert {check.name: check.passed for check in manifest.proof.checks} == {
        "loads": True,
        "logits": True,
        "greedy tokens": True,
    }
    report = RunReport.load(out / "report.json")
    assert report.totals.output_bytes == manifest.model_bytes
    again = cli.run("verify", out, "-q", "--json")
    assert again.code == 0, again.err
    assert again.json["proof"] == manifest.proof.model_dump(mode="json")


@pytest.mark.slow
def test_apply_hands_options_to_the_target(cli: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    source = write_tiny_llama(tmp_path / "source", TinyLlama(layers=1)).parent
    plan, out = tmp_path / "plan", tmp_path / "out"
    assert cli.quick("plan", source, "-o", plan, "--method", "rtn").code == 0
    words = ("--target-option", "kv_cache=int8", "--max-kl", "99")
    done = cli.quick("apply", source, "--plan", plan, "-o", out, *words)
    assert done.code == 0, done.err
    manifest = PackageManifest.load(out / "package.json")
    assert manifest.options == {"kv_cache": "int8"}
    assert [table.title for table in manifest.tables]


def test_apply_refuses_a_plan_that_its_target_would_not_run(
    cli: Any, scratch: Path, tmp_path: Path
) -> None:
    source = write_tiny_llama(tmp_path / "source", TinyLlama(tie=Tie.SHARED)).parent
    plan, legal = tmp_path / "plan", tmp_path / "legal"
    assert cli.quick("plan", source, "-o", plan, "--method", "rtn").code == 0
    npu = ("--target", "qnn", "--calibration", "not-even-looked-for.txt")
    done = cli.quick("apply", source, "--plan", plan, "-o", scratch / "out", *npu)
    assert (done.code, list(scratch.iterdir())) == (5, [])
    assert "would not run on qnn" in done.err
    assert "an embedding in 8 bits" in done.err
    assert f"formats are those of {plan}; `faq-onnx plan --target qnn`" in done.err
    done = cli.quick("plan", source, "-o", legal, "--method", "rtn", *npu)
    assert done.code == 0, done.err
    done = cli.quick("apply", source, "--plan", legal, "-o", scratch / "out", *npu)
    assert (done.code, "not-even-looked-for.txt" in done.err) == (4, True), done.err


def test_help_lists_all_targets(cli: Any) -> None:
    text = cli.run("package", "--help").out
    for name in TARGETS:
        assert f"  {name}" in text


def _copy(source: Path, output: Path) -> Path:
    output.mkdir()
    for path in source.iterdir():
        (output / path.name).write_bytes(path.read_bytes())
    return output
