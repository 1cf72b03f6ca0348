"""A model is fused into its folder, or written as it came, and the difference is measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.source import SourceModel
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.opt import optimize
from faq_onnx.stages import fusing
from faq_onnx.stages.fusing import (
    fusion_error,
    rotary_table_bytes,
    save_package_model,
    trial_tokens,
)
from faq_onnx.testing import TinyLlama, tiny_llama_onnx, write_tiny_llama


@pytest.fixture
def source(tmp_path: Path) -> SourceModel:
    path = write_tiny_llama(tmp_path / "source")
    return SourceModel(given="source", onnx_path=path, folder=path.parent)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    made = tmp_path / "out", tmp_path / "work"
    for folder in made:
        folder.mkdir()
    return made


def test_the_model_as_it_came_is_kept_beside(
    source: SourceModel, folders: tuple[Path, Path]
) -> None:
    out, work = folders
    saved = save_package_model(load_model(source.onnx_path), source, *folders, fuse_attention=True)
    assert saved.fusion is not None
    assert (saved.fusion.fused, saved.fusion.packed) == (2, 2)
    assert "query, key and value in one product in 2" in saved.fusion.text
    assert saved.plain.is_relative_to(work)
    tokens = trial_tokens({"vocab_size": 288})
    assert saved.fusion.error == fusion_error(saved.plain, out / "model.onnx", tokens)
    assert saved.bytes == (out / "model.onnx").stat().st_size


def test_a_fused_model_that_computes_something_else_is_not_kept(
    source: SourceModel, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusing, "fold_tolerance", lambda *_: -1.0)
    saved = save_package_model(load_model(source.onnx_path), source, *folders, fuse_attention=True)
    out, _ = folders
    assert saved.plain == out / "model.onnx"
    assert saved.fusion is not None
    assert (saved.fusion.fused, saved.fusion.packed) == (0, 0)
    assert "logits differ by" in saved.fusion.text
    kinds = {node.op_type for node in load_model(out / "model.onnx").graph}
    assert "Softmax" in kinds


def test_what_is_fused_already_is_packed(
    source: SourceModel, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    model = load_model(source.onnx_path)
    config = json.loads((source.onnx_path.parent / "config.json").read_text())
    optimize(model, "fuse-attention", config=config)
    save_model(model, tmp_path / "fused.onnx")
    model = load_model(tmp_path / "fused.onnx")
    saved = save_package_model(model, source, *folders, fuse_attention=True)
    assert saved.fusion is not None
    assert (saved.fusion.fused, saved.fusion.packed) == (2, 2)
    assert saved.plain.is_relative_to(folders[1])
    model = load_model(folders[0] / "model.onnx")
    again = tmp_path / "again"
    again.mkdir()
    saved = save_package_model(model, source, again, folders[1], fuse_attention=True)
    assert saved.fusion is not None
    assert (saved.fusion.packed, saved.fusion.error) == (2, None)
    assert saved.plain == again / "model.onnx"


def test_without_a_config_nobody_knows_how_long_texts_may_be(
    source: SourceModel, folders: tuple[Path, Path]
) -> None:
    bare = source.model_copy(update={"folder": None})
    saved = save_package_model(load_model(source.onnx_path), bare, *folders, fuse_attention=True)
    assert saved.fusion is None
    assert saved.plain == folders[0] / "model.onnx"


def test_the_error_is_that_of_logits_with_and_behind_a_cache(tmp_path: Path) -> None:
    paths = []
    for seed in (0, 1):
        model: ir.Model = tiny_llama_onnx(TinyLlama(seed=seed))
        paths.append(tmp_path / f"{seed}.onnx")
        save_model(model, paths[-1])
    tokens = trial_tokens({"vocab_size": 288})
    assert fusion_error(paths[0], paths[0], tokens) == 0
    assert fusion_error(paths[0], paths[1], tokens) > 0.1
    assert np.array_equal(tokens, trial_tokens({"vocab_size": 288}))


def test_the_room_of_rotary_tables_is_known_before(
    source: SourceModel, folders: tuple[Path, Path]
) -> None:
    expected = rotary_table_bytes(load_model(source.onnx_path), source)
    save_package_model(load_model(source.onnx_path), source, *folders, fuse_attention=True)
    fused = load_model(folders[0] / "model.onnx").graph.initializers
    tables = [fused[name].const_value for name in ("cos_cache", "sin_cache")]
    assert sum(tensor.nbytes for tensor in tables if tensor is not None) == expected > 0
    assert rotary_table_bytes(tiny_llama_onnx(), source.model_copy(update={"folder": None})) == 0
