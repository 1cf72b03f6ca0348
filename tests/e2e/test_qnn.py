"""The target qnn in Qualcomm's own compiler and simulator."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.package import PackageManifest
from faq_onnx.artifacts.run import RunReport
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.opt import optimize
from faq_onnx.passes import (
    ProductSteps,
    QuantizeActivationsPass,
    StaticShapesPass,
    run_passes,
)
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.packing import pack_codes
from faq_onnx.quant.uniform import (
    BlockGrid,
    dequantize,
    minmax_grid,
    quantize_rtn,
    round_to_grid,
    unpack_weight,
)
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.targets.qnn_runtime import Compiler, QnnError, is_here
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


def _normal(seed: int) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((64, 64)) * 0.1).astype(np.float32)


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


LPBQ = ("--block-scales", "lpbq", "--symmetric", "--block-size", "32")
INTEGERS = ("--target-option", "activations=16-bit")
TOGETHER = ("--target-option", "weights=shared")


def test_products_on_integers_and_both_graphs_in_one_binary(
    cli: Any, tokens: Path, tmp_path: Path
) -> None:
    out, apart = tmp_path / "out", tmp_path / "apart"
    words = ("convert", QWEN3, "--target", "qnn", *CALIBRATION, "-q", *LPBQ, "--lm-head", "4")
    wish = ("--calibration", tokens, "--max-kl", "9", "--target-option", "prompt_tokens=32")
    done = cli.run(*words, *wish, "-o", out, *INTEGERS, *TOGETHER)
    assert done.code == 0, done.err
    manifest = PackageManifest.load(out / "package.json")
    assert _proved(manifest)
    graphs, activations = manifest.tables
    prefill, decode = graphs.rows
    assert decode[-1] == "with prefill"
    assert not (out / "decode_ctx_qnn.bin").exists()
    assert activations.rows[0][:2] == ("16-bit", 15)
    assert cli.run("verify", out, "-q").code == 0
    # the same model with a binary each: what is shared is in it once
    again = cli.run("package", out, "-o", apart, "--target", "qnn", "-q", *wish[4:], *INTEGERS)
    assert again.code == 0, again.err
    sizes = [row[-1] for row in PackageManifest.load(apart / "package.json").tables[0].rows]
    assert int(prefill[-1]) < 0.8 * sum(map(int, sizes))


def test_models_without_weights_of_lpbq_are_refused_at_once(
    cli: Any, tokens: Path, tmp_path: Path
) -> None:
    words = ("convert", QWEN3, "-o", tmp_path / "out", "--target", "qnn", "-q", *INTEGERS)
    done = cli.run(*words, "--calibration", tokens)
    assert done.code == 5, done.err
    assert "--block-scales lpbq --symmetric" in done.err


LPBQ_PROGRAM = """
import sys, numpy as np, onnxruntime as ort, onnxruntime_qnn
name = "QNNExecutionProvider"
ort.register_execution_provider_library(name, onnxruntime_qnn.get_library_path())
options = ort.SessionOptions()
options.log_severity_level = 3
options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
options.add_provider_for_devices(devices, {
    "backend_type": "htp", "htp_arch": "75", "soc_model": "57",
    "enable_block_quant_weight_optimization": "1"})
session = ort.InferenceSession(sys.argv[1], options)
np.save(sys.argv[3], session.run(None, {"x": np.load(sys.argv[2])})[0])
"""


def _write_product(path: Path, codes: npt.NDArray[np.uint8], grid: BlockGrid) -> None:
    """A product between int16 activations, as LPBQ needs it."""
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[1,8,256] x, uint8[128,8,16] B, float[128,8] S) => (float[1,8,128] y)
        <float s_in = {0.000244}, int16 zero = {0}, float s_out = {0.000732}> {
          xq = QuantizeLinear (x, s_in, zero)
          xf = DequantizeLinear (xq, s_in, zero)
          m = com.microsoft.MatMulNBits <K = 256, N = 128, bits = 4, block_size = 32> (xf, B, S)
          mq = QuantizeLinear (m, s_out, zero)
          y = DequantizeLinear (mq, s_out, zero)
        }"""
    )
    packed, scales = model.graph.inputs[1:]
    packed.const_value = ir.tensor(pack_codes(codes, 4), name="B")
    scales.const_value = ir.tensor(grid.scale, name="S")
    for value in (packed, scales):
        model.graph.register_initializer(value)
    del model.graph.inputs[1:]
    ir.save(model, path)


def test_scales_of_lpbq_are_kept_without_loss(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 8, 256)).astype(np.float32)
    blocks = rng.standard_normal((128, 8, 32)).astype(np.float32) * np.float32(0.1)
    fmt = block_format(4, 32, symmetric=True, block_scales="lpbq")
    middle = np.full(blocks.shape[:2], 8, np.float32)
    grids = {
        "lpbq": minmax_grid(blocks, fmt),
        "any": BlockGrid(np.abs(blocks).max(axis=2) / np.float32(7), middle),
    }
    np.save(tmp_path / "x.npy", x)
    errors = {}
    for kind, grid in grids.items():
        codes = round_to_grid(blocks, grid, fmt)
        _write_product(tmp_path / "model.onnx", codes, grid)
        files = [str(tmp_path / name) for name in ("model.onnx", "x.npy", "y.npy")]
        command = [sys.executable, "-c", LPBQ_PROGRAM, *files]
        subprocess.run(command, check=True, capture_output=True)
        expected = x @ dequantize(codes, grid).reshape(128, 256).T
        difference = np.load(tmp_path / "y.npy") - expected
        errors[kind] = np.linalg.norm(difference) / np.linalg.norm(expected)
    # int16 activations cost about 1e-4; scales that QNN must round to sixteenths cost 2e-2
    assert errors["lpbq"] < 5e-4
    assert errors["any"] > 1e-2


@pytest.mark.parametrize("lifted", [False, True])
def test_products_over_a_matrix_are_lifted(tmp_path: Path, lifted: bool) -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["" : 18]>
        g (float[8,64] x) => (float[8,32] y) { y = Gemm (x, w) }""",
        initializers=[ir.tensor(np.ones((64, 32), np.float32), name="w")],
    )
    lift = ",lift-matmul-nbits" if lifted else ""
    save_model(optimize(model, f"matmul-to-nbits{lift}").model, tmp_path / "m.onnx")
    if lifted:
        compiled = Compiler("v75").compile(tmp_path / "m.onnx")
        assert compiled.nodes == {"QNNExecutionProvider": 3}
        return
    with pytest.raises(QnnError, match="assigned to the default CPU EP"):
        Compiler("v75").compile(tmp_path / "m.onnx")


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
        Compiler("v75").compile(tmp_path / "odd.onnx")


@pytest.mark.parametrize(("rows", "misplaced"), [(8, False), (16, True), (32, False)])
def test_rows_of_integer_products_behind_a_norm(
    tmp_path: Path, rows: int, misplaced: bool
) -> None:
    """Why 16-bit activations refuse prompt_tokens=16: if this fails, the compiler is mended."""
    fmt = block_format(4, 32, symmetric=True, block_scales="lpbq")
    weights = {
        name: quantize_rtn(_normal(seed), fmt) for seed, name in enumerate(("gate", "up", "down"))
    }
    product = "com.microsoft.MatMulNBits <K = 64, N = 64, bits = 4, block_size = 32>"
    packed = ", ".join(f"uint8[64,2,16] {n}_B, float[64,2] {n}_S" for n in weights)
    model = ir.from_onnx_text(
        f"""<ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]>
        g (float[1,{rows},64] x, float[64] gain, {packed}) => (float[1,{rows},64] y) {{
          n = SimplifiedLayerNormalization <axis = -1, epsilon = 0.000001> (x, gain)
          g = {product} (n, gate_B, gate_S)
          u = {product} (n, up_B, up_S)
          h = Mul (g, u)
          [down] y = {product} (h, down_B, down_S)
        }}"""
    )
    for value in model.graph.inputs[1:]:
        name, _, part = str(value.name).partition("_")
        array: npt.NDArray[Any] = np.ones(64, np.float32)
        if part:
            scales = unpack_weight(weights[name])[1].scale
            array = weights[name].packed if part == "B" else scales
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    del model.graph.inputs[1:]
    x = np.random.default_rng(9).standard_normal((1, rows, 64)).astype(np.float32)
    save_model(model, tmp_path / "float.onnx")
    expected = run_session(open_session(tmp_path / "float.onnx"), {"x": x}, ["y"])["y"]
    steps = ProductSteps(20 / 32767, 20 / 32767)
    run_passes(model, [QuantizeActivationsPass({"down": steps})])
    save_model(model, tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", x)
    files = [str(tmp_path / name) for name in ("model.onnx", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", LPBQ_PROGRAM, *files], check=True, capture_output=True)
    difference = np.load(tmp_path / "y.npy") - expected
    error = np.linalg.norm(difference) / np.linalg.norm(expected)
    assert (error > 0.5) if misplaced else (error < 0.02)
