"""Opening a model takes stock of it, or says why not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.config import QuantizeConfig, Rotation
from faq_onnx.errors import CorruptModelError, NonFiniteError, PlanError, UnsupportedModelError
from faq_onnx.progress import SILENT
from faq_onnx.stages import opening
from faq_onnx.stages.conversion import Run
from faq_onnx.testing import TinyLlama, tiny_llama_onnx, write_tiny_llama


def _open(folder: Path, spec: TinyLlama = TinyLlama()) -> opening.OpenedModel:  # noqa: B008 - frozen
    path = write_tiny_llama(folder / "source", spec)
    return opening.open_model(str(path), folder / "work", SILENT)


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
        prints.append(opening.open_model(str(path), tmp_path / "work", SILENT).fingerprint)
    assert prints[0] != prints[1]


def test_a_model_without_tokens_cannot_be_run_on_text(tmp_path: Path) -> None:
    opened = _open(tmp_path)
    sites = tuple(site for site in opened.census.sites if site.role != "lm_head")
    census = opened.census.model_copy(update={"embeddings": (), "sites": sites})
    bare = opening.OpenedModel(opened.source, opened.model, census, ())
    with pytest.raises(UnsupportedModelError, match="neither a token embedding nor an lm_head"):
        _ = bare.vocabulary


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path)
    (path.parent / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CorruptModelError, match=r"config\.json: not valid JSON"):
        opening.open_model(str(path), tmp_path / "work", SILENT)
    (path.parent / "config.json").write_text(json.dumps([1]), encoding="utf-8")
    assert opening.open_model(str(path), tmp_path / "work", SILENT).census.sites


@pytest.mark.parametrize("rotate", ["none", "residual+heads"])
def test_a_wish_is_judged_before_weights_are_read(tmp_path: Path, rotate: Rotation) -> None:
    model = tiny_llama_onnx(TinyLlama())
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        numbers = value.const_value.numpy()
        if numbers.ndim == 2:
            value.const_value = ir.tensor(np.full_like(numbers, np.nan), name=value.name)
    path = tmp_path / "model.onnx"
    ir.save(model, path)

    def run(budget: str) -> Run:
        config = QuantizeConfig(budget=budget, rotate=rotate, untie_head=True)
        return Run(tmp_path, SILENT, config)

    with pytest.raises(PlanError, match="--budget 1bpw cannot be met"):
        run("1bpw").open(str(path))
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        run("5bpw").open(str(path))
