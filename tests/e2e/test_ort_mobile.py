"""`--target ort-mobile`: the .ort file says what its source says, here and on emulated phones."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.package import PackageManifest
from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.artifacts.sites import Tie
from faq_onnx.artifacts.target import ModelOutline, PlannedWeight
from faq_onnx.quant.packing import packed_width
from faq_onnx.runtime.reference import take_reference, token_agreement
from faq_onnx.runtime.session import open_session
from faq_onnx.targets.opening import open_target
from faq_onnx.targets.ort_mobile import INT8_ROUNDING, ort_bytes
from faq_onnx.targets.phone import phone_notes, slow_reason
from faq_onnx.testing import TinyLlama, write_tiny_llama
from faq_onnx.verify.nodes import LowBitSpec, matmul_model

EXPORTERS = Path(__file__).parents[1] / "fixtures" / "exporters"
FILES = {"model.ort", "required_operators.config", "package.json", "config.json"}
ARM_ROOT = os.environ.get("FAQ_ONNX_ARM_ROOT", "")
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
TRIAL = Path(__file__).with_name("arm_trial.py")


def _convert(cli: Any, folder: Path, *words: str, spec: TinyLlama | None = None) -> Path:
    """A tiny decoder converted for phones; folder/source and folder/out."""
    source = write_tiny_llama(folder / "source", spec or TinyLlama()).parent
    out = folder / "out"
    done = cli.quick("convert", source, "-o", out, "--method", "rtn", *words)
    assert done.code == 0, done.err
    return out


def test_convert_writes_an_ort_file_that_says_what_the_source_says(
    cli: Any, tmp_path: Path
) -> None:
    out = _convert(cli, tmp_path, "--target", "ort-mobile", "--lm-head", "4")
    names = {path.name for path in out.iterdir()}
    assert names > FILES
    assert not any(name.startswith("model.onnx") for name in names)
    manifest = PackageManifest.load(out / "package.json")
    assert [check.passed for check in manifest.proof.checks] == [True, True, True]
    assert manifest.model_bytes == manifest.files["model.ort"]
    sizes, phones = manifest.tables
    assert ("model.ort", manifest.model_bytes, "") in sizes.rows
    # a head, and five for each of two layers: q, k and v are one; the embedding shares the head
    assert phones.rows == (("4 bits, blocks of 32, accuracy level 4", 11, "fast", "fast"),)
    config = (out / "required_operators.config").read_text()
    assert "# - model.ort" in config
    assert "com.microsoft;1;GatherBlockQuantized,GroupQueryAttention,MatMulNBits" in config or (
        "com.microsoft;1;GroupQueryAttention,MatMulNBits" in config
    )
    again = cli.run("verify", out, "-q", "--json")
    assert again.code == 0, again.err
    assert again.json["structure"] is None
    compared = cli.run("verify", out, "--source", tmp_path / "source", "-q")
    assert compared.code == 8
    assert "holds no model.onnx to compare" in compared.err
    assert again.json["proof"] == manifest.proof.model_dump(mode="json")


@pytest.mark.slow
def test_verify_sees_another_model(cli: Any, tmp_path: Path) -> None:
    out = _convert(cli, tmp_path / "a", "--target", "ort-mobile")
    other = _convert(cli, tmp_path / "b", "--target", "ort-mobile", spec=TinyLlama(seed=1))
    shutil.copyfile(other / "model.ort", out / "model.ort")
    done = cli.run("verify", out, "-q")
    assert done.code == 7
    assert "logits: differ from the ONNX file's by" in done.err
    (out / "model.ort").write_bytes(b"no model")
    done = cli.run("verify", out, "-q")
    assert done.code == 7
    assert "loads: model.ort in onnxruntime when it was made" in done.err


@pytest.mark.slow
def test_it_is_what_onnxruntimes_converter_writes(cli: Any, tmp_path: Path) -> None:
    low_bit = _convert(cli, tmp_path)
    folders = [tmp_path / "ours", tmp_path / "theirs"]
    for folder in folders:
        folder.mkdir()
        shutil.copyfile(low_bit / "model.onnx", folder / "model.onnx")
    ours = ("faq_onnx.targets._ort_conversion", folders[0], "0")
    options = ("--optimization_style", "Fixed", "--target_platform", "arm")
    theirs = ("onnxruntime.tools.convert_onnx_models_to_ort", *options, folders[1] / "model.onnx")
    for words in (ours, theirs):
        command = [sys.executable, "-m", *map(str, words)]
        subprocess.run(command, check=True, capture_output=True)
    # The bytes differ from one run of that converter to the next, by order and padding.
    sessions = [open_session(folder / "model.ort") for folder in folders]
    said = [take_reference(session, [5, 6, 7], 8) for session in sessions]
    assert said[0] == said[1]
    sizes = [(folder / "model.ort").stat().st_size for folder in folders]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)
    lists = (next(folder.glob("*required_operators.config")) for folder in folders)
    made, expected = (path.read_text().splitlines()[2:] for path in lists)
    assert made == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "dynamo20-qwen2-untied-gemm-fp32",
        "genai-llama-untied-fp32",  # the width of its cache is a name
        "genai-qwen2-untied-fp16",
        "mobius-llama-tied-fp16",
        "optimum-gemma3-untied-fp16",
        "optimum-llama-tied-fp32",
    ],
)
def test_float_models_of_any_exporter(cli: Any, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    done = cli.run("package", EXPORTERS / name, "-o", out, "--target", "ort-mobile", "-q")
    assert done.code == 0, done.err
    manifest = PackageManifest.load(out / "package.json")
    assert [check.passed for check in manifest.proof.checks] == [True, True, True]
    assert any("float16" in note for note in manifest.notes) is name.endswith("fp16")


@pytest.mark.slow
@pytest.mark.parametrize("scales", ["float", "8-bit"])
def test_a_shared_table_is_stored_once_and_sizes_are_known_before(
    cli: Any, tmp_path: Path, scales: str
) -> None:
    spec = TinyLlama(vocabulary=4000, tie=Tie.SHARED)
    words = ("--lm-head", "4", "--block-scales", scales)
    low_bit = _convert(cli, tmp_path, *words, spec=spec)
    kinds = {node.op_type for node in ir.load(low_bit / "model.onnx").graph}
    assert "GatherBlockQuantized" in kinds
    out = tmp_path / "ort"
    assert cli.run("package", low_bit, "-o", out, "--target", "ort-mobile", "-q").code == 0
    table = spec.vocabulary * spec.hidden // 2
    size = (out / "model.ort").stat().st_size
    growth = 0 if scales == "float" else spec.vocabulary * spec.hidden // 32 * 3
    assert size < (low_bit / "model.onnx").stat().st_size + growth + table // 2


def _outline(fmt: BlockFormat, size: int = 1000, **changes: object) -> ModelOutline:
    weight = PlannedWeight(
        place="q", kind="linear", rows=64, width=64, dtype="float32", format=fmt
    ).model_copy(update=changes)
    return ModelOutline(weights=(weight,), model_bytes=size)


def test_files_above_the_limit_are_refused_before_the_work() -> None:
    fmt = BlockFormat(code_bits=4, storage_bits=4, block_size=32, symmetric=True)
    target = open_target("ort-mobile")
    assert target.refusals(_outline(fmt, 2**31 - 1)) == ()
    (refusal,) = target.refusals(_outline(fmt, 2**31))
    assert refusal.place == "the model"
    assert "2.15 GB" in refusal.found
    assert "--target genai" in refusal.way_out
    # scales in 8 bits are multiplied out: 64 rows of two blocks, a float for a byte each
    small = fmt.model_copy(update={"block_scales": "8-bit"})
    assert ort_bytes(_outline(small)) == 1000 + 64 * 2 * 3 - 64 * 4
    assert ort_bytes(_outline(fmt)) == 1000


def test_convert_refuses_a_large_model_in_words(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("faq_onnx.targets.ort_mobile.LARGEST_FILE", 10_000)
    source = write_tiny_llama(tmp_path / "source").parent
    done = cli.quick("convert", source, "-o", tmp_path / "out", "--target", "ort-mobile")
    assert done.code == 5
    assert "the target ort-mobile would not run it" in done.err
    assert "one flatbuffer" in done.err
    assert not (tmp_path / "out").exists()


def test_what_is_slow_on_a_phone_is_said() -> None:
    fmt = BlockFormat(code_bits=8, storage_bits=8, block_size=32, symmetric=True)
    (note,) = phone_notes(_outline(fmt))
    assert note.startswith("slow on phones without dot product instructions: q: 8-bit kernels")
    (note,) = phone_notes(_outline(fmt, accuracy_level=0))
    assert note.startswith("slow on any phone: q: 8-bit kernels need accuracy_level=4")
    four = fmt.model_copy(update={"code_bits": 4, "storage_bits": 4})
    assert not list(phone_notes(_outline(four)))


# --- on an emulated arm64 --------------------------------------------------------------------


def _write_probe(folder: Path, bits: int, block: int, level: int) -> None:
    """One MatMulNBits of a layout, named by it."""
    width, rows = 512, 16
    spec = LowBitSpec(width, bits, block, level, "float32", "uint8")
    blocks = width // block
    packed = np.zeros((rows, blocks, block * bits // 8), np.uint8)
    zero_points = np.zeros((rows, packed_width(blocks, bits)), np.uint8)
    scales = np.ones((rows, blocks), np.float32)
    model = matmul_model(spec, packed, scales, zero_points)
    (folder / f"{bits}-{block}-{level}.onnx").write_bytes(model)


def _run_on_arm(folder: Path, cpu: str) -> tuple[dict[str, Any], dict[str, bool]]:
    """What the trial prints, and whether each probe was slow."""
    root = Path(ARM_ROOT)
    inside = {
        "PYTHONPATH": root / "site",
        "PYTHONHOME": root / "root" / "usr",
        "OPENBLAS_NUM_THREADS": 1,
        "ORT_DISABLE_TELEMETRY": 1,
    }
    settings = [word for name, value in inside.items() for word in ("-E", f"{name}={value}")]
    python = root / "root" / "usr" / "bin" / "python3.11"
    command = [str(QEMU), "-cpu", cpu, "-L", str(root / "root"), *settings, str(python)]
    done = subprocess.run(
        [*command, str(TRIAL), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    parts = done.stderr.split("probe ")[1:]
    slow = {part.split("\n")[0]: "unpacked compute mode" in part for part in parts}
    return json.loads(done.stdout), slow


@pytest.mark.slow
@pytest.mark.parametrize(("cpu", "dot_product"), [("neoverse-n1", True), ("cortex-a72", False)])
def test_on_arm64(cli: Any, tmp_path: Path, cpu: str, dot_product: bool) -> None:
    if QEMU is None or not ARM_ROOT:
        pytest.skip("needs qemu-user and FAQ_ONNX_ARM_ROOT, see tools/make_arm_root.sh")
    out = _convert(cli, tmp_path, "--target", "ort-mobile", "--lm-head", "4")
    layouts = list(itertools.product((2, 4, 8), (16, 32, 64, 128, 256), (0, 4)))
    for layout in layouts:
        _write_probe(out, *layout)
    found, slow = _run_on_arm(out, cpu)
    assert found["machine"] == "aarch64"
    manifest = PackageManifest.load(out / "package.json")
    reference = manifest.reference
    assert found["distance"] < INT8_ROUNDING
    assert token_agreement(reference, found["tokens"], INT8_ROUNDING).passed
    if not dot_product:  # its 4-bit kernel computes in float32, which is not what we ran here
        session = open_session(out / "model.ort", config={"mlas.qnbit.force_fp32": "1"})
        exact = take_reference(session, reference.prompt, len(reference.tokens))
        assert found["tokens"] == list(exact.tokens)
        assert np.allclose(
            [found["logits"][token] for token, _ in exact.logits],
            [value for _, value in exact.logits],
            atol=1e-4,
        )
    said = {
        f"{bits}-{block}-{level}": bool(slow_reason(bits, block, level, dot_product=dot_product))
        for bits, block, level in layouts
    }
    assert slow == said
