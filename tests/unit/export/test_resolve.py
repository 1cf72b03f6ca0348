"""What SOURCE may be, and what is said when it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from faq_onnx.errors import CorruptModelError, ExportError, UnsupportedModelError
from faq_onnx.export import resolve_source
from faq_onnx.progress import SILENT


def _write(path: Path, content: bytes = b"\x08\x0a") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_file_is_taken_with_the_companions_beside_it(tmp_path: Path) -> None:
    model = _write(tmp_path / "m" / "net.onnx")
    config = _write(tmp_path / "m" / "config.json", b"{}")
    source = resolve_source(str(model), tmp_path, SILENT)
    assert source.onnx_path == model
    assert source.companion("config.json") == config
    assert source.companion("tokenizer.json") is None
    assert not source.exported


def test_a_bare_file_has_no_companion_folder(tmp_path: Path) -> None:
    model = _write(tmp_path / "net.onnx")
    assert resolve_source(str(model), tmp_path, SILENT).folder is None


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["net.onnx"], "net.onnx"),
        (["model.onnx", "model_fp16.onnx", "decoder_model.onnx"], "model.onnx"),
        (["decoder_model.onnx", "decoder_with_past_model.onnx"], "decoder_model.onnx"),
        (["encoder.onnx", "text_decoder.onnx"], "text_decoder.onnx"),
        (["onnx/model.onnx", "onnx/model_q4.onnx", "model.safetensors"], "onnx/model.onnx"),
    ],
)
def test_the_model_of_a_folder(tmp_path: Path, files: list[str], chosen: str) -> None:
    for name in [*files, "config.json"]:
        _write(tmp_path / "m" / name)
    source = resolve_source(str(tmp_path / "m"), tmp_path, SILENT)
    assert source.onnx_path == tmp_path / "m" / chosen
    assert source.companion("config.json") == tmp_path / "m" / "config.json"


def test_several_files_without_a_choice_are_listed(tmp_path: Path) -> None:
    _write(tmp_path / "m" / "vision.onnx")
    _write(tmp_path / "m" / "text.onnx")
    with pytest.raises(UnsupportedModelError, match=r"text\.onnx, vision\.onnx"):
        resolve_source(str(tmp_path / "m"), tmp_path, SILENT)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "empty"), (b"version https://git-lfs.x/v1\n", "git lfs pull")]
)
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes, message: str) -> None:
    model = _write(tmp_path / "model.onnx", content)
    with pytest.raises(CorruptModelError, match=message):
        resolve_source(str(model), tmp_path, SILENT)


def test_what_is_not_there(tmp_path: Path) -> None:
    for name in ("gone.onnx", "gone", "gone/model", "a/b/c", str(tmp_path / "owner")):
        with pytest.raises(ExportError, match="no such file or folder"):
            resolve_source(str(tmp_path / name), tmp_path, SILENT)


def test_a_mistyped_path_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("models/llama", "owner/model.gguf", "llama", "../x/y"):
        with pytest.raises(ExportError, match="no such file or folder"):
            resolve_source(name, tmp_path, SILENT)


def test_an_empty_folder_and_a_strange_file(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(ExportError, match="found: no files"):
        resolve_source(str(tmp_path / "m"), tmp_path, SILENT)
    weights = _write(tmp_path / "m" / "model.safetensors")
    with pytest.raises(ExportError, match="did you mean its folder"):
        resolve_source(str(weights), tmp_path, SILENT)


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    model = _write(tmp_path / "model.gguf", b"<html>")
    with pytest.raises(CorruptModelError, match="it is no GGUF file"):
        resolve_source(str(model), tmp_path, SILENT)
