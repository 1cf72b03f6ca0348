"""Bad input gets a clear error and no output: every case through the command line.

Each test says which exit code comes (`faq_onnx.errors`), and which words the message has: the
place, what was found, what is allowed, and the way out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from faq_onnx.graph.reading import ReadableVersions
from faq_onnx.testing import TinyLlama

Array = npt.NDArray[np.floating]
Refuse = Callable[..., str]
MakeSource = Callable[..., Path]
WRONG_CALL, MODEL, CALIBRATION, VERIFICATION, PACKAGE, INTERRUPTED = 2, 3, 4, 7, 8, 130
METHODS = ("rtn", "awq", "faq-gptq")
UP_PROJ = "/model/layers.0/mlp/up_proj/MatMul"


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def refuse(cli: Any, scratch: Path) -> Refuse:
    """Convert, expect an exit code and words on stderr, and that nothing is left anywhere."""

    def convert(code: int, source: Path, *words: str | Path, says: tuple[str, ...]) -> str:
        before = tree(scratch)
        done = cli.quick("convert", source, "-o", scratch / "new" / "out", *words)
        assert (done.code, done.out) == (code, ""), done.err
        assert done.err.startswith("error: ")
        missing = [word for word in says if word not in done.err]
        assert not missing, f"{missing} not in: {done.err}"
        assert tree(scratch) == before
        return str(done.err)

    return convert


def weight_of(model: ir.Model, node: str) -> ir.Value:
    value = next(n for n in model.graph if n.name == node).inputs[1]
    assert value is not None
    return value


def edit(node: str, function: Callable[[Array], object]) -> Callable[[ir.Model], None]:
    """A change of the weight of one node; `function` works in place."""

    def change(model: ir.Model) -> None:
        value = weight_of(model, node)
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        function(array)
        value.const_value = ir.tensor(array, name=value.name)

    return change


# --- files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_truncated_protobuf(refuse: Refuse, source: Path, tmp_path: Path, share: float) -> None:
    data = source.read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(len(data) * share)])
    refuse(MODEL, path, says=(str(path), "truncated", "again"))


def test_random_bytes_are_no_protobuf(
    refuse: Refuse, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "noise.onnx"
    path.write_bytes(rng.bytes(5000))
    refuse(MODEL, path, says=(str(path), "damaged", "again"))


def test_missing_external_data(refuse: Refuse, make_source: MakeSource) -> None:
    path = make_source(external=True)
    (path.parent / "weights.bin").unlink()
    refuse(MODEL, path, says=(str(path), "weights.bin", "does not exist", "copy"))


def test_truncated_external_data(refuse: Refuse, make_source: MakeSource) -> None:
    path = make_source(external=True)
    data = path.parent / "weights.bin"
    data.write_bytes(data.read_bytes()[:1000])
    refuse(MODEL, path, says=(str(path), "weights.bin", "only 1000 bytes", "again"))


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "link.bin"])
def test_external_data_outside_of_the_folder(
    refuse: Refuse, make_source: MakeSource, location: str
) -> None:
    path = make_source(external=True)
    outside = path.parent.parent / "weights.bin"
    (path.parent / "weights.bin").replace(outside)
    (path.parent / "link.bin").symlink_to(outside)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    path.write_bytes(proto.SerializeToString())
    try:
        refuse(MODEL, path, says=(str(path), location, "folder", "beside"))
    finally:
        outside.unlink()


# --- numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(
    refuse: Refuse, make_source: MakeSource, method: str, number: float
) -> None:
    def spoil(weight: Array) -> None:
        weight[3, 5] = number

    path = make_source(change=edit(UP_PROJ, spoil))
    says = ("initializer 'onnx::MatMul_", "1 values", "[3, 5]", "export it again")
    refuse(CALIBRATION, path, "--method", method, says=says)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_activations_that_overflow(
    refuse: Refuse, make_source: MakeSource, method: str, dtype: str
) -> None:
    def enlarge(weight: Array) -> None:
        np.multiply(weight, 1e30 if dtype == "float32" else 2e4, out=weight)

    def change(model: ir.Model) -> None:
        edit(UP_PROJ, enlarge)(model)
        edit(UP_PROJ.replace("up", "down"), enlarge)(model)

    path = make_source(TinyLlama(dtype=dtype), change)
    refuse(
        CALIBRATION,
        path,
        "--method",
        method,
        says=("not finite", "source model", "float32", "other text"),
    )


# --- graphs --------------------------------------------------------------------------------


def test_opset_that_the_runtime_refuses(refuse: Refuse, make_source: MakeSource) -> None:
    def change(model: ir.Model) -> None:
        model.graph.opset_imports[""] = 99

    newest = ReadableVersions.installed()
    says = ("opset 99", newest.runtime, f"up to {newest.opset}", "export it with")
    refuse(MODEL, make_source(change=change), says=says)


def test_ir_version_that_the_runtime_refuses(refuse: Refuse, make_source: MakeSource) -> None:
    def change(model: ir.Model) -> None:
        model.ir_version = 99

    newest = ReadableVersions.installed()
    says = ("IR version 99", newest.runtime, f"up to {newest.ir_version}", "export it with")
    refuse(MODEL, make_source(change=change), says=says)


def test_newest_versions_that_are_not_refused_load() -> None:
    newest = ReadableVersions.installed()
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([2]))
    node = ir.node("Relu", [x])
    node.outputs[0].name = "y"
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, x.shape
    opsets = {"": newest.opset}
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports=opsets, name="g")
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=newest.ir_version))
    session = ort.InferenceSession(model.SerializeToString())
    (found,) = session.run(None, {"x": np.array([-1, 1], np.float32)})
    assert np.asarray(found).tolist() == [0, 1]


@pytest.mark.parametrize("method", METHODS)
def test_operator_that_the_runtime_does_not_know(
    refuse: Refuse, make_source: MakeSource, method: str
) -> None:
    def change(model: ir.Model) -> None:
        next(n for n in model.graph if n.op_type == "Softmax").op_type = "Softermax"

    refuse(MODEL, make_source(change=change), "--method", method, says=("Softermax",))


def test_model_without_linear_layers(refuse: Refuse, tmp_path: Path) -> None:
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([2, 64]))
    node = ir.node("Relu", [x], name="relu")
    node.outputs[0].name = "y"
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, x.shape
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 18}, name="g")
    path = tmp_path / "relu.onnx"
    ir.save(ir.Model(graph, ir_version=8), path)
    refuse(MODEL, path, "--method", "rtn", says=(str(path), "no linear layer", "MatMul"))


def test_model_that_is_low_bit_already(
    refuse: Refuse, cli: Any, source: Path, tmp_path: Path
) -> None:
    words = ("--method", "rtn", "--lm-head", "same")
    assert cli.quick("convert", source, "-o", tmp_path / "first", *words).code == 0
    says = ("MatMulNBits", "already", "float")
    refuse(MODEL, tmp_path / "first", *words, says=says)


def test_config_that_is_no_json(refuse: Refuse, make_source: MakeSource) -> None:
    path = make_source()
    (path.parent / "config.json").write_text('{"model_type": ')
    says = (str(path.parent / "config.json"), "not valid JSON", "restore it")
    refuse(MODEL, path, says=says)


# --- calibration ---------------------------------------------------------------------------


def test_tokenizer_of_another_model(refuse: Refuse, make_source: MakeSource) -> None:
    path = make_source(TinyLlama(vocabulary=100))
    refuse(CALIBRATION, path, says=("vocabulary is 0 to 99", "tokenizer", "another model"))


@pytest.mark.parametrize("content", ["", "\n \n\n", "five words are not enough"])
def test_calibration_text_without_a_window(
    refuse: Refuse, source: Path, tmp_path: Path, content: str
) -> None:
    text = tmp_path / "little.txt"
    text.write_text(content)
    refuse(CALIBRATION, source, "--calibration", text, says=(str(text), "32"))


def test_calibration_text_that_is_not_there(refuse: Refuse, source: Path) -> None:
    refuse(CALIBRATION, source, "--calibration", "absent.txt", says=("absent.txt", "no such file"))


# --- the machine ---------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A real file system with little room; skips where it may not be mounted."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
        check=False,
        capture_output=True,
        text=True,
    )
    if mount.returncode:
        pytest.skip(f"no file system can be mounted here: {mount.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is a thing of Linux")
def test_full_disk_for_the_output(cli: Any, source: Path, tmp_path: Path, external: bool) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["--external-data"] if external else []
    with small_disk(disk, "64k"):
        done = cli.quick("convert", source, "-o", disk / "out", "--method", "rtn", *words)
        assert done.code == PACKAGE, done.err
        assert "No space left" in done.err
        assert str(disk) in done.err
        assert tree(disk) == []


@pytest.mark.parametrize("size_kb", [128, *range(440, 841, 100)])
@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is a thing of Linux")
def test_full_disk_for_the_work(
    cli: Any, source: Path, scratch: Path, tmp_path: Path, size_kb: int
) -> None:
    """Full before the start, and in the hands of numpy, onnx_ir and safetensors."""
    out = tmp_path / "out"
    with small_disk(scratch, f"{size_kb}k"):
        done = cli.quick("convert", source, "-o", out, "--method", "awq")
        assert tree(scratch) == []
    if not out.exists():  # a little more room than was needed when this was written is fine
        assert done.code == PACKAGE, done.err
        assert str(scratch) in done.err
        assert "free" in done.err


def test_disk_that_fills_up_while_saving(
    refuse: Refuse, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = ir.ExternalTensor.tofile

    def full(tensor: ir.ExternalTensor, file: object) -> None:
        if "MatMul" not in (tensor.name or ""):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(tensor, file)

    monkeypatch.setattr(ir.ExternalTensor, "tofile", full)
    refuse(
        PACKAGE,
        source,
        "--method",
        "rtn",
        says=("No space left", "free space", "another output folder"),
    )


def test_interrupt_while_calibrating(source: Path, scratch: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.arange(1 << 20, dtype=np.int64) % 200)
    words: list[str | Path] = ["-o", scratch / "out", "--calibration", tokens, "--samples", "4000"]
    command: list[str | Path] = [sys.executable, "-m", "faq_onnx", "convert", source, *words]
    process = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not any(scratch.glob("faq-onnx-*/walk/*.npy")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, err
    assert out == ""
    assert "interrupted; nothing was written" in err
    assert "Traceback" not in err
    assert tree(scratch) == []


def test_output_that_is_there_already(refuse: Refuse, source: Path, scratch: Path) -> None:
    out = scratch / "new" / "out"
    out.mkdir(parents=True)
    (out / "model.onnx").write_text("precious")
    refuse(PACKAGE, source, says=(str(out), "exists", "--force"))
    assert (out / "model.onnx").read_text() == "precious"


def test_work_folder_that_cannot_be_made(refuse: Refuse, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    says = ("--work", str(tmp_path / "file" / "work"), "choose another folder")
    refuse(PACKAGE, source, "--work", tmp_path / "file" / "work", says=says)


# --- the call ------------------------------------------------------------------------------


def test_unknown_recipe_keys_are_all_listed(refuse: Refuse, source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'bit = 4\ncolour = "red"\n[faq]\nfussion = 0.5\n[calibration]\nsamples = 0\n'
    )
    says = ("bit", "did you mean", "colour", "faq.fussion", "calibration.samples", "4 problems")
    refuse(WRONG_CALL, source, "--recipe", recipe, says=(str(recipe), *says))


def test_exclude_that_fits_nothing(refuse: Refuse, source: Path) -> None:
    words = ("--exclude", "*up_proj*", "--exclude", "*mamba*")
    says = ("--exclude *mamba*", "15 sites", "/self_attn/", "inspect")
    assert "*up_proj*" not in refuse(WRONG_CALL, source, *words, says=says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--bits", "5"), ("--bits", "5", "2, 3, 4 or 8")),
        (("--bits", "four"), ("--bits", "four", "2, 3, 4 or 8")),
        (("--block-size", "24"), ("--block-size", "24", "16, 32, 64, 128 or 256")),
        (("--lm-head", "2"), ("--lm-head", "2", "'keep'")),
        (("--samples", "0", "--bits", "7"), ("2 problems", "--samples", "--bits")),
        (("--exclude", "*"), ("nothing to quantize", "--exclude")),
        (
            ("--method", "hqq", "--symmetric"),
            ("--method hqq with --symmetric", "--asymmetric", "k-quant"),
        ),
        (("--grid", "hqq", "--symmetric", "--dry-run"), ("--grid hqq with --symmetric",)),
        (("--embedding", "shared"), ("--embedding shared", "no tied lm_head", "keep")),
    ],
)
def test_settings_that_are_not_allowed(
    refuse: Refuse, source: Path, words: tuple[str, ...], says: tuple[str, ...]
) -> None:
    refuse(WRONG_CALL, source, *words, says=says)


def test_embedding_of_a_width_that_the_block_does_not_divide(refuse: Refuse, source: Path) -> None:
    words = ("--embedding", "4", "--block-size", "128")
    refuse(5, source, *words, says=("width 64", "128", "16, 32, 64"))


# --- the result ----------------------------------------------------------------------------


def test_result_worse_than_max_kl(refuse: Refuse, cli: Any, source: Path, tmp_path: Path) -> None:
    words = ("--method", "rtn", "--bits", "2", "--max-kl", "0.001")
    says = ("nats/token", "--max-kl 0.001", "Worst sites: /", " dB)", "--bits", "--force")
    refuse(VERIFICATION, source, *words, says=says)
    done = cli.quick("convert", source, "-o", tmp_path / "out", *words, "--force", "--json")
    assert done.code == 0
    assert "--max-kl" in done.json["verification"]["notes"][0]


def test_calibrated_result_that_equals_rtn(
    refuse: Refuse, cli: Any, source: Path, tmp_path: Path
) -> None:
    words = ("--method", "awq", "--grid-points", "1", "--grid", "minmax")
    says = ("--method awq changed nothing", "15 sites", "round-to-nearest", "--force")
    refuse(VERIFICATION, source, *words, says=says)
    done = cli.quick("convert", source, "-o", tmp_path / "out", *words, "--force", "--json")
    assert done.code == 0
    assert "changed nothing" in done.json["verification"]["notes"][0]
