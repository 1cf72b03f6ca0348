"""Model files in and out, and every way in which they can be bad."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from faq_onnx.errors import CorruptModelError, PackageError, RewriteError, UnsupportedModelError
from faq_onnx.graph.io import (
    load_model,
    release_weights,
    rest_bytes,
    save_model,
    save_structure,
)
from faq_onnx.testing import TinyLlama, tiny_llama_onnx

ROWS, COLUMNS = 32, 24


def _model(rows: int = ROWS, *, opset: int = 18, ir_version: int = 8) -> ir.Model:
    weight = np.arange(rows * COLUMNS, dtype=np.float32).reshape(rows, COLUMNS)
    return ir.from_onnx_text(
        f"""<ir_version: {ir_version}, opset_import: ["" : {opset}]>
        g (float[1, {rows}] x) => (float[1, {COLUMNS}] y) {{ y = MatMul (x, w) }}""",
        initializers=[ir.tensor(weight, name="w")],
    )


def _write(folder: Path, model: ir.Model | None = None) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(ir.to_proto(model or _model()).SerializeToString())
    return path


def _run(path: Path) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, {"x": np.ones((1, ROWS), np.float32)})[0]
    return output


def test_inline_weights_stay_in_the_file(tmp_path: Path) -> None:
    model = load_model(_write(tmp_path))
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert (tensor.location, tensor.base_dir) == ("model.onnx", str(tmp_path))
    expected = np.arange(ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS)
    np.testing.assert_array_equal(tensor.numpy(), expected)
    release_weights(model)
    assert tensor.raw is None


@pytest.mark.parametrize("external_data", [False, True])
def test_saved_model_computes_the_same(tmp_path: Path, *, external_data: bool) -> None:
    source = _write(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    size = save_model(load_model(source), out / "model.onnx", external_data=external_data)
    files = sorted(path.name for path in out.iterdir())
    assert files == (["model.onnx", "model.onnx.data"] if external_data else ["model.onnx"])
    assert size == sum(path.stat().st_size for path in out.iterdir())
    onnx.checker.check_model(str(out / "model.onnx"))
    np.testing.assert_array_equal(_run(out / "model.onnx"), _run(source))


@pytest.mark.parametrize("external_data", [False, True])
def test_small_external_weights_come_along(tmp_path: Path, *, external_data: bool) -> None:
    """As genai's builder writes them: even a gain of a few bytes lies outside of the file."""
    folder, out = tmp_path / "source", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    model = ir.from_onnx_text(
        f"""<ir_version: 8, opset_import: ["" : 18]>
        g (float[1, {ROWS}] x) => (float[1, {ROWS}] y) {{ y = Mul (x, gain) }}""",
        initializers=[ir.tensor(np.arange(ROWS, dtype=np.float32), name="gain")],
    )
    ir.save(model, folder / "model.onnx", external_data="weights.bin", size_threshold_bytes=0)
    assert (folder / "weights.bin").stat().st_size > 0
    save_model(load_model(folder / "model.onnx"), out / "model.onnx", external_data=external_data)
    np.testing.assert_array_equal(_run(out / "model.onnx")[0], np.arange(ROWS))


@pytest.mark.parametrize("external_data", [False, True])
def test_saving_is_deterministic_and_can_be_repeated(
    tmp_path: Path, *, external_data: bool
) -> None:
    source = _write(tmp_path)
    contents = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        save_model(load_model(source), folder / "model.onnx", external_data=external_data)
        contents.append([path.read_bytes() for path in sorted(folder.iterdir())])
        source = folder / "model.onnx"  # the second round reads what the first wrote
    assert contents[0] == contents[1]


def test_lazy_tensors_are_evaluated_one_at_a_time(tmp_path: Path) -> None:
    model = _model()
    alive, most = 0, 0

    class Counted(ir.Tensor[np.ndarray]):
        def __init__(self, value: np.ndarray) -> None:
            nonlocal alive, most
            super().__init__(value)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    for index in range(5):
        values = np.full((ROWS, COLUMNS), index, np.float32)
        lazy = ir.LazyTensor(
            lambda values=values: Counted(values),  # type: ignore[misc]
            ir.DataType.FLOAT,
            ir.Shape(values.shape),
            name=f"w{index}",
        )
        model.graph.register_initializer(
            ir.Value(name=f"w{index}", shape=lazy.shape, const_value=lazy)
        )
    save_model(model, tmp_path / "model.onnx")
    assert most == 1
    written = ir.load(tmp_path / "model.onnx").graph.initializers
    tensors = [value.const_value for value in written.values()]
    first = [float(tensor.numpy()[0, 0]) for tensor in tensors if tensor is not None]
    assert first == [0, 0, 1, 2, 3, 4]


def test_lazy_tensor_of_another_size_is_a_rewrite_error(tmp_path: Path) -> None:
    model = _model()
    value = model.graph.initializers["w"]
    value.const_value = ir.LazyTensor(
        lambda: ir.tensor(np.zeros((ROWS, COLUMNS + 1), np.float32)),
        ir.DataType.FLOAT,
        ir.Shape((ROWS, COLUMNS)),
        name="w",
    )
    with pytest.raises(RewriteError, match=f"'w' wrote {ROWS * (COLUMNS + 1) * 4} bytes"):
        save_model(model, tmp_path / "model.onnx")


def test_rest_of_a_file_is_what_some_weights_leave(tmp_path: Path) -> None:
    """References stand for weights here, so it is a little more than what is in the file."""
    model = tiny_llama_onnx(TinyLlama())
    size = save_model(model, tmp_path / "model.onnx")
    tensors = {name: v.const_value for name, v in model.graph.initializers.items()}
    large = {name: t.nbytes for name, t in tensors.items() if t is not None and t.nbytes >= 4096}
    before = list(tensors.values())
    assert size <= rest_bytes(model, set()) <= size + 100 * len(tensors)
    assert rest_bytes(model, set(large)) == rest_bytes(model, set()) - sum(large.values())
    assert [value.const_value for value in model.graph.initializers.values()] == before


def test_source_is_not_overwritten(tmp_path: Path) -> None:
    source = _write(tmp_path)
    with pytest.raises(PackageError, match="being read"):
        save_model(load_model(source), source)
    np.testing.assert_array_equal(_run(source).shape, (1, COLUMNS))


def test_disk_error_is_a_package_error(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="No such file or directory"):
        save_model(_model(), tmp_path / "missing" / "model.onnx")


@pytest.mark.slow
def test_loading_keeps_memory_small(tmp_path: Path) -> None:
    rows = 700_000  # 67 MB
    path = _write(tmp_path, _model(rows))
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from faq_onnx.graph.io import load_model, save_model\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak(); model = load_model(Path(sys.argv[1]))\n"
        "save_model(model, Path(sys.argv[2])); print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "out.onnx")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 30  # MB; the weight alone has 67
    assert (tmp_path / "out.onnx").stat().st_size >= rows * COLUMNS * 4


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.999])
def test_truncated_file(tmp_path: Path, kept: float) -> None:
    path = _write(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CorruptModelError, match="truncated or damaged"):
        load_model(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GGUF\x03\x00\x00\x00 something else", "not an ONNX"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"{}", "not an ONNX"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "no graph"),
    ],
)
def test_not_a_model(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(CorruptModelError, match=message):
        load_model(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CorruptModelError, match="does not exist"):
        load_model(tmp_path / "model.onnx")
    with pytest.raises(CorruptModelError, match="is a folder"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("opset", "ir_version", "message"),
    [(99, 8, r"opset 99; onnxruntime .* up to \d\d:"), (18, 99, r"IR version 99; .* up to \d\d:")],
)
def test_too_new_for_the_runtime(
    tmp_path: Path, opset: int, ir_version: int, message: str
) -> None:
    path = _write(tmp_path, _model(opset=opset, ir_version=ir_version))
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(path)


def test_sparse_initializers_are_refused(tmp_path: Path) -> None:
    proto = ir.to_proto(_model())
    proto.graph.sparse_initializer.add().values.name = "sparse"
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UnsupportedModelError, match="'sparse'"):
        load_model(path)


def test_node_that_reads_nothing(tmp_path: Path) -> None:
    proto = ir.to_proto(_model())
    proto.graph.node[0].input[1] = "gone"
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(CorruptModelError, match="reads 'gone', which nothing produces"):
        load_model(path)


def test_damaged_name(tmp_path: Path) -> None:
    path = _write(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"MatMul", b"Mat\xfful"))
    with pytest.raises(CorruptModelError, match="not UTF-8"):
        load_model(path)


def test_dims_that_do_not_fit_the_data(tmp_path: Path) -> None:
    proto = ir.to_proto(_model())
    proto.graph.initializer[0].dims[0] = ROWS + 1
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(CorruptModelError, match=r"'w' has 3072 bytes .* need 3168"):
        load_model(path)


def test_undefined_data_type(tmp_path: Path) -> None:
    proto = ir.to_proto(_model())
    proto.graph.initializer[0].data_type = onnx.TensorProto.UNDEFINED
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(CorruptModelError, match="'w' has data type UNDEFINED"):
        load_model(path)


def test_missing_data_is_not_read_as_zeros(tmp_path: Path) -> None:
    proto = ir.to_proto(_model())
    proto.graph.initializer[0].ClearField("raw_data")
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(CorruptModelError, match="'w'"):
        load_model(path)


# --- external data -----------------------------------------------------------------------------


def _write_external(folder: Path, location: str = "weights.bin", size: int | None = None) -> Path:
    proto = ir.to_proto(_model())
    tensor = proto.graph.initializer[0]
    data = tensor.raw_data if size is None else tensor.raw_data[:size]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    if "/" not in location:
        (folder / location).write_bytes(data)
    return folder / "model.onnx"


def test_external_data_is_found(tmp_path: Path) -> None:
    path = _write_external(tmp_path)
    assert load_model(path).graph.initializers["w"].const_value is not None
    (tmp_path.parent / f"{tmp_path.name}_link").symlink_to(tmp_path)
    linked = load_model(tmp_path.parent / f"{tmp_path.name}_link" / "model.onnx")
    tensor = linked.graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy()[0, 1] == 1.0


def test_cache_layout_with_linked_files(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    _write_external(blobs)
    snapshot.mkdir()
    for name in ("model.onnx", "weights.bin"):
        (blobs / name).rename(blobs / f"blob-{name}")
        (snapshot / name).symlink_to(blobs / f"blob-{name}")
    tensor = load_model(snapshot / "model.onnx").graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy()[0, 1] == 1.0


def test_hard_linked_data_is_read(tmp_path: Path) -> None:
    path = _write_external(tmp_path)
    os.link(tmp_path / "weights.bin", tmp_path / "other name")
    tensor = load_model(path).graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy()[0, 1] == 1.0


def test_missing_external_data(tmp_path: Path) -> None:
    path = _write_external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(CorruptModelError, match=r"'w'.*weights\.bin.*does not exist"):
        load_model(path)


def test_truncated_external_data(tmp_path: Path) -> None:
    path = _write_external(tmp_path, size=3000)
    with pytest.raises(CorruptModelError, match=r"bytes 0 to 3072 of .* only 3000 bytes"):
        load_model(path)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "a/../../weights.bin", ""])
def test_location_outside_of_the_folder(tmp_path: Path, location: str) -> None:
    path = _write_external(tmp_path / "model", location or "weights.bin")
    if not location:
        proto = onnx.load(path, load_external_data=False)
        proto.graph.initializer[0].external_data[0].value = ""
        path.write_bytes(proto.SerializeToString())
    (tmp_path / "weights.bin").write_bytes(bytes(ROWS * COLUMNS * 4))
    with pytest.raises(CorruptModelError, match="leaves the model's folder"):
        load_model(path)


def test_link_out_of_the_folder(tmp_path: Path) -> None:
    path = _write_external(tmp_path / "model")
    secret = tmp_path / "secret"
    (tmp_path / "model" / "weights.bin").rename(secret)
    (tmp_path / "model" / "weights.bin").symlink_to(secret)
    with pytest.raises(CorruptModelError, match="outside of the model's folder"):
        load_model(path)


def test_a_structure_alone_refers_to_weights_in_its_folder(tmp_path: Path) -> None:
    save_model(_model(), tmp_path / "model.onnx", external_data=True)
    model = load_model(tmp_path / "model.onnx")
    size = save_structure(model, tmp_path / "second.onnx")
    assert size == (tmp_path / "second.onnx").stat().st_size < ROWS * COLUMNS * 4
    np.testing.assert_array_equal(_run(tmp_path / "second.onnx"), _run(tmp_path / "model.onnx"))
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.base_dir == str(tmp_path)  # the model is as it was


def test_a_structure_away_from_its_weights_is_refused(tmp_path: Path) -> None:
    save_model(_model(), tmp_path / "model.onnx", external_data=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(PackageError, match=r"'w' lies in .*weights must lie in the same folder"):
        save_structure(load_model(tmp_path / "model.onnx"), elsewhere / "model.onnx")


def test_weights_go_on_in_another_file_where_one_would_become_too_large(tmp_path: Path) -> None:
    model = tiny_llama_onnx(TinyLlama())
    path = tmp_path / "model.onnx"
    limit = 100_000
    written = save_model(model, path, external_data=True, piece_bytes=limit)
    files = sorted(tmp_path.glob("model.onnx.data*"))
    assert len(files) > 2
    assert files[1].name == "model.onnx.data.1"
    assert written == sum(file.stat().st_size for file in (path, *files))
    loaded = load_model(path)
    tensors = [value.const_value for value in loaded.graph.initializers.values()]
    largest = max(tensor.nbytes for tensor in tensors if tensor is not None)
    assert all(file.stat().st_size <= max(limit, largest) for file in files)
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        again = loaded.graph.initializers[name].const_value
        assert again is not None
        np.testing.assert_array_equal(again.numpy(), value.const_value.numpy())
