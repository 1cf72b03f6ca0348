"""Stages one by one on the tiny decoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx import quantize_stages, stages
from faq_onnx.artifacts.sites import Tie
from faq_onnx.config import Method, QuantizeConfig
from faq_onnx.errors import CorruptModelError, UnsupportedModelError
from faq_onnx.planning.planner import PlannedModel, make_plan
from faq_onnx.progress import SILENT
from faq_onnx.testing import TinyLlama, tiny_llama_onnx, write_tiny_llama

RTN = QuantizeConfig(method=Method.RTN)


def _open(folder: Path, spec: TinyLlama = TinyLlama()) -> stages.OpenedModel:  # noqa: B008 - frozen
    path = write_tiny_llama(folder / "source", spec)
    return stages.open_model(str(path), folder / "work", SILENT)


def _plan(opened: stages.OpenedModel, config: QuantizeConfig = RTN) -> PlannedModel:
    return make_plan(opened.census, config, None, opened.read)


def test_opening_takes_stock(tmp_path: Path) -> None:
    opened = _open(tmp_path)
    assert opened.vocabulary == TinyLlama().vocabulary
    assert len(opened.census.sites) == 15
    weight = opened.read(opened.census.sites[0])
    assert weight.shape == (64, 64)
    assert weight.dtype == np.float32


def test_the_fingerprint_is_of_the_weights_not_of_the_place(tmp_path: Path) -> None:
    first, second = _open(tmp_path / "a"), _open(tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    other = _open(tmp_path / "c", TinyLlama(seed=1))
    assert other.fingerprint != first.fingerprint
    assert other.census.fingerprint() == first.census.fingerprint()


def test_the_fingerprint_covers_external_data(tmp_path: Path) -> None:
    prints = []
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "model.onnx"
        ir.save(tiny_llama_onnx(TinyLlama(seed=seed)), path, external_data="model.onnx.data")
        prints.append(stages.open_model(str(path), tmp_path / "work", SILENT).fingerprint)
    assert prints[0] != prints[1]


def test_a_model_without_tokens_cannot_be_run_on_text(tmp_path: Path) -> None:
    opened = _open(tmp_path)
    sites = tuple(site for site in opened.census.sites if site.role != "lm_head")
    census = opened.census.model_copy(update={"embeddings": (), "sites": sites})
    bare = stages.OpenedModel(opened.source, opened.model, census, "")
    with pytest.raises(UnsupportedModelError, match="neither a token embedding nor an lm_head"):
        _ = bare.vocabulary


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path)
    (path.parent / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CorruptModelError, match=r"config\.json: not valid JSON"):
        stages.open_model(str(path), tmp_path / "work", SILENT)
    (path.parent / "config.json").write_text(json.dumps([1]), encoding="utf-8")
    assert stages.open_model(str(path), tmp_path / "work", SILENT).census.sites


def test_rtn_codes_are_known_as_such(tmp_path: Path) -> None:
    opened = _open(tmp_path)
    planned = _plan(opened)
    marks = quantize_stages.rtn_marks(opened, planned)
    assert len(marks) == len(set(marks.values())) == 15
    done = quantize_stages.quantize(opened, planned, None, marks, tmp_path / "weights", SILENT)
    assert all(error.equals_rtn for error in done.errors)
    assert [error.site for error in done.errors] == [s.name for s in opened.census.sites]
    # 4 bits cost about 20 dB, the 8-bit head about 24 dB less
    by_bits = [error.sqnr_db for error in done.errors]
    assert all(15 < value < 30 for value in by_bits[:-1])
    assert by_bits[-1] > 40


def test_other_codes_are_not_taken_for_rtn(tmp_path: Path) -> None:
    opened = _open(tmp_path)
    planned = _plan(opened)
    marks = dict.fromkeys(quantize_stages.rtn_marks(opened, planned), "0" * 64)
    done = quantize_stages.quantize(opened, planned, None, marks, tmp_path / "weights", SILENT)
    assert not any(error.equals_rtn for error in done.errors)


@pytest.mark.parametrize("tie", [None, Tie.SHARED, Tie.DUPLICATE])
def test_rewriting_replaces_what_is_planned(tie: Tie | None, tmp_path: Path) -> None:
    opened = _open(tmp_path, TinyLlama(tie=tie))
    planned = _plan(opened)
    done = quantize_stages.quantize(opened, planned, None, {}, tmp_path / "weights", SILENT)
    quantize_stages.rewrite(opened, planned, done.weights)
    count = {"MatMulNBits": 0, "GatherBlockQuantized": 0}
    for node in opened.model.graph:
        if node.op_type in count:
            count[node.op_type] += 1
    assert count == {"MatMulNBits": 15, "GatherBlockQuantized": 0 if tie is None else 1}
