"""genai_config.json, and generation through onnxruntime-genai."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from faq_onnx.artifacts.source import SourceModel
from faq_onnx.artifacts.target import ProofCheck
from faq_onnx.errors import PackageError
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.opt import optimize
from faq_onnx.progress import SILENT, Silent
from faq_onnx.runtime.reference import take_reference
from faq_onnx.runtime.session import open_session
from faq_onnx.targets.genai_config import write_genai_config
from faq_onnx.targets.opening import open_target
from faq_onnx.testing import write_tiny_llama

needs_genai = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is optional"
)
PROMPT = [5, 6, 7, 8]


class _Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def package(tmp_path: Path) -> SourceModel:
    path = write_tiny_llama(tmp_path / "m")
    return SourceModel(given="m", onnx_path=path, folder=path.parent)


def _edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def _write(package: SourceModel) -> dict[str, Any]:
    path = write_genai_config(package.onnx_path.parent, package, SILENT)
    assert path is not None
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _try(package: SourceModel, steps: int) -> ProofCheck:
    reference = take_reference(open_session(package.onnx_path), PROMPT, steps)
    proof = open_target("genai").prove(package.onnx_path.parent, reference, SILENT)
    (check,) = proof.checks
    return check


def test_names_and_sizes_come_from_the_graph(package: SourceModel) -> None:
    content = _write(package)
    decoder = content["model"]["decoder"]
    assert decoder["inputs"] == {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "position_ids": "position_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    assert decoder["outputs"]["present_key_names"] == "present.%d.key"
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"]) == (2, 2)
    assert decoder["head_size"] == 16
    assert content["model"]["pad_token_id"] == content["model"]["eos_token_id"] == 257
    assert content["search"]["past_present_share_buffer"] is False


def test_generation_config_and_unknown_types(package: SourceModel) -> None:
    folder = package.onnx_path.parent
    _edit(folder / "config.json", model_type="brand_new", num_key_value_heads=None)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [3, 4], "do_sample": True, "temperature": 0.6})
    )
    content = _write(package)
    assert content["model"]["type"] == "decoder"
    assert content["model"]["eos_token_id"] == [3, 4]
    assert content["model"]["pad_token_id"] == 3
    assert content["search"]["do_sample"] is True
    assert content["search"]["temperature"] == 0.6


def test_a_config_by_genais_builder_is_kept(package: SourceModel) -> None:
    folder = package.onnx_path.parent
    (folder / "genai_config.json").write_text(
        json.dumps({"model": {"type": "phi3", "decoder": {"filename": "a.onnx", "x": 1}}})
    )
    assert _write(package)["model"] == {
        "type": "phi3",
        "decoder": {"filename": "model.onnx", "x": 1},
    }


@pytest.mark.parametrize("fused", [True, False])
def test_a_kept_config_shares_the_buffer_where_the_graph_can(
    package: SourceModel, fused: bool
) -> None:
    folder = package.onnx_path.parent
    content = _write(package)  # as `convert --no-fuse-attention` leaves it
    content["search"].update(past_present_share_buffer=not fused, top_k=7)
    (folder / "genai_config.json").write_text(json.dumps(content))
    if fused:
        model = load_model(package.onnx_path)
        optimize(model, "fuse-attention{positions=64}")
        save_model(model, folder / "fused.onnx")
        (folder / "fused.onnx").replace(package.onnx_path)
    search = _write(package)["search"]
    assert (search["past_present_share_buffer"], search["top_k"]) == (fused, 7)


def test_what_genai_cannot_run_gets_a_note(package: SourceModel) -> None:
    notes = _Notes()
    folder = package.onnx_path.parent
    bare = package.model_copy(update={"folder": None})
    assert write_genai_config(folder, bare, notes) is None
    model = ir.load(package.onnx_path)
    model.graph.outputs[0].name = "scores"
    ir.save(model, package.onnx_path)
    assert write_genai_config(folder, package, notes) is None
    assert "no config.json" in notes.notes[0]
    assert "logits" in notes.notes[1]
    assert not (folder / "genai_config.json").exists()
    check = _try(package, 3)
    assert check.passed is None
    assert "not tried" in check.value


def test_a_broken_config(package: SourceModel) -> None:
    (package.onnx_path.parent / "config.json").write_text("{")
    with pytest.raises(PackageError, match=r"config\.json: not readable as JSON"):
        write_genai_config(package.onnx_path.parent, package, SILENT)


@needs_genai
@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"model_type": "brand_new"}, {"eos_token_id": None}])
def test_genai_generates_what_onnxruntime_generates(
    package: SourceModel, changes: dict[str, Any]
) -> None:
    folder = package.onnx_path.parent
    _edit(folder / "config.json", **changes)
    _write(package)
    assert _try(package, 12).passed is True


def test_a_symbolic_head_size_comes_from_the_config(package: SourceModel) -> None:
    model = ir.load(package.onnx_path)
    for value in model.graph.inputs:
        if "past" in (value.name or ""):
            value.shape = ir.Shape(["batch", 2, "past", "kv_cache_dim"])  # as genai's builder
    ir.save(model, package.onnx_path)
    decoder = _write(package)["model"]["decoder"]
    assert (decoder["head_size"], decoder["num_key_value_heads"]) == (16, 2)


@needs_genai
@pytest.mark.slow
def test_a_package_that_genai_refuses(
    package: SourceModel, caplog: pytest.LogCaptureFixture
) -> None:
    _write(package)
    folder = package.onnx_path.parent
    content = json.loads((folder / "genai_config.json").read_text())
    content["model"]["type"] = "no_such_type"
    (folder / "genai_config.json").write_text(json.dumps(content))
    check = _try(package, 3)
    assert check.passed is False
    assert "no_such_type" in check.value
    assert "no_such_type" in caplog.text
