"""Records go to JSON and back, refuse what they do not know, and have fingerprints."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from pydantic import ValidationError

from faq_onnx.artifacts.plan import BlockFormat, EmbeddingPlan
from faq_onnx.artifacts.record import fingerprint_bytes, fingerprint_file
from faq_onnx.artifacts.sites import ModelCensus, Tie
from faq_onnx.artifacts.source import SourceModel
from faq_onnx.errors import PackageError
from faq_onnx.testing import TinyLlama, tiny_llama_census

CENSUS = tiny_llama_census(TinyLlama(tie=Tie.SHARED, qkv_bias=True))


def test_a_census_comes_back_equal(tmp_path: Path) -> None:
    CENSUS.save(tmp_path / "census.json")
    again = ModelCensus.load(tmp_path / "census.json")
    assert again == CENSUS
    assert again.fingerprint() == CENSUS.fingerprint()


def test_another_census_has_another_fingerprint() -> None:
    site = CENSUS.sites[0].model_copy(update={"in_features": 63})
    other = CENSUS.model_copy(update={"sites": (site, *CENSUS.sites[1:])})
    assert other.fingerprint() != CENSUS.fingerprint()


def test_records_are_frozen_and_strict(tmp_path: Path) -> None:
    plan = EmbeddingPlan(embedding="table", format=None)
    with pytest.raises(ValidationError, match="frozen"):
        plan.embedding = "other"
    with pytest.raises(ValidationError, match="Extra inputs"):
        BlockFormat.model_validate(
            {"code_bits": 4, "storage_bits": 4, "block_size": 32, "symmetric": True, "x": 1}
        )
    (tmp_path / "plan.json").write_text('{"embedding": "table"}', encoding="utf-8")
    with pytest.raises(
        PackageError, match=r"plan\.json: no EmbeddingPlan .*format: Field required"
    ):
        EmbeddingPlan.load(tmp_path / "plan.json")


def test_sites_are_found_by_name() -> None:
    for site in CENSUS.sites:
        assert CENSUS.site(site.name) is site
    with pytest.raises(KeyError, match="nowhere"):
        CENSUS.site("nowhere")


def test_fingerprints_are_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000  # more than one piece
    (tmp_path / "data").write_bytes(data)
    assert fingerprint_file(tmp_path / "data") == fingerprint_bytes(data)
    assert fingerprint_bytes(data) == hashlib.sha256(data).hexdigest()


def test_companions_are_files_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "folder.json").mkdir()
    source = SourceModel(given="x", onnx_path=tmp_path / "model.onnx", folder=tmp_path)
    assert source.companion("config.json") == tmp_path / "config.json"
    assert source.companion("folder.json") is None
    assert source.companion("nothing.json") is None
    alone = source.model_copy(update={"folder": None})
    assert alone.companion("config.json") is None
