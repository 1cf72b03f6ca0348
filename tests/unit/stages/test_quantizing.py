"""Planned weights become low-bit, and the graph reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from faq_onnx.artifacts.sites import Tie
from faq_onnx.config import Method, QuantizeConfig, RoundingConfig
from faq_onnx.planning.planner import PlannedModel, make_plan
from faq_onnx.progress import SILENT
from faq_onnx.quant.shrinkage import shrinkage_of
from faq_onnx.stages import opening, quantizing
from faq_onnx.testing import TinyLlama, write_tiny_llama

RTN = QuantizeConfig(method=Method.RTN)


def _open(folder: Path, spec: TinyLlama = TinyLlama()) -> opening.OpenedModel:  # noqa: B008 - frozen
    path = write_tiny_llama(folder / "source", spec)
    return opening.open_model(str(path), folder / "work", SILENT)


def _plan(opened: opening.OpenedModel, config: QuantizeConfig = RTN) -> PlannedModel:
    return make_plan(opened.census, config, None, opened.read)


def test_rtn_codes_are_known_as_such(tmp_path: Path) -> None:
    opened = _open(tmp_path)
    planned = _plan(opened)
    marks = quantizing.rtn_marks(opened, planned)
    assert len(marks) == len(set(marks.values())) == 15
    done = quantizing.quantize(opened, planned, None, marks, tmp_path / "weights", SILENT)
    assert all(error.equals_rtn for error in done.errors)
    assert [error.site for error in done.errors] == [s.name for s in opened.census.sites]
    # 4 bits cost about 20 dB, the 8-bit head about 24 dB less
    by_bits = [error.sqnr_db for error in done.errors]
    assert all(15 < value < 30 for value in by_bits[:-1])
    assert by_bits[-1] > 40
    assert {error.shrinkage for error in done.errors} == {None}  # nothing looks at activations


@pytest.mark.parametrize("wish", [None, 0.25])
def test_short_texts_are_believed_less(wish: float | None, tmp_path: Path) -> None:
    opened = _open(tmp_path, TinyLlama(layers=1))
    config = QuantizeConfig(
        method=Method.GPTQ, rounding=RoundingConfig(path="low-bit", shrinkage=wish)
    )
    planned = _plan(opened)
    sites = tuple(
        plan.model_copy(update={"rounding": "gptq" if number % 2 else "nearest"})
        for number, plan in enumerate(planned.plan.sites)
    )
    plan = planned.plan.model_copy(update={"sites": sites, "config": config})
    planned = dataclasses.replace(planned, plan=plan)
    windows = np.random.default_rng(0).integers(opened.vocabulary, size=(3, 16))
    done = quantizing.quantize(
        opened, planned, None, {}, tmp_path / "weights", SILENT, windows=windows
    )
    for site, own, error in zip(opened.census.sites, sites, done.errors, strict=True):
        asked = shrinkage_of(windows.size, site.in_features) if wish is None else wish
        expected = round(asked, 3) if own.rounding == "gptq" else None
        assert error.shrinkage == expected


def test_other_codes_are_not_taken_for_rtn(tmp_path: Path) -> None:
    opened = _open(tmp_path)
    planned = _plan(opened)
    marks = dict.fromkeys(quantizing.rtn_marks(opened, planned), "0" * 64)
    done = quantizing.quantize(opened, planned, None, marks, tmp_path / "weights", SILENT)
    assert not any(error.equals_rtn for error in done.errors)


@pytest.mark.parametrize("tie", [None, Tie.SHARED, Tie.DUPLICATE])
def test_rewriting_replaces_what_is_planned(tie: Tie | None, tmp_path: Path) -> None:
    opened = _open(tmp_path, TinyLlama(tie=tie))
    planned = _plan(opened)
    done = quantizing.quantize(opened, planned, None, {}, tmp_path / "weights", SILENT)
    quantizing.rewrite(opened, planned, done.weights)
    count = {"MatMulNBits": 0, "GatherBlockQuantized": 0}
    for node in opened.model.graph:
        if node.op_type in count:
            count[node.op_type] += 1
    assert count == {"MatMulNBits": 15, "GatherBlockQuantized": 0 if tie is None else 1}
