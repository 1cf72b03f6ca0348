"""Tokenizers that genai would misread are mended; others stay byte for byte."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders  # type: ignore[import-untyped]

from faq_onnx.artifacts.source import SourceModel
from faq_onnx.progress import SILENT
from faq_onnx.targets.genai_config import write_genai_config
from faq_onnx.targets.tokenizer import mend_tokenizer
from faq_onnx.testing import tiny_tokenizer, write_tiny_llama

TEXT = "the tin on\n ünder the hat"


def mixed() -> Tokenizer:
    """As transformers makes it of a .gguf file."""
    tokenizer = tiny_tokenizer()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace("▁", " "),
            decoders.ByteLevel(),
        ]
    )
    return tokenizer


def test_a_byte_level_tokenizer_loses_the_steps_of_the_other_kind(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    mixed().save(str(path))
    before = Tokenizer.from_file(str(path)).encode(TEXT).ids
    assert mend_tokenizer(tmp_path)
    after = Tokenizer.from_file(str(path))
    assert after.encode(TEXT).ids == before
    assert after.decode(before) == TEXT
    assert json.loads(path.read_text(encoding="utf-8"))["decoder"]["type"] == "ByteLevel"
    assert not mend_tokenizer(tmp_path)


def test_what_is_plain_stays_byte_for_byte(tmp_path: Path) -> None:
    assert not mend_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    tiny_tokenizer().save(str(path))
    before = path.read_bytes()
    assert not mend_tokenizer(tmp_path)
    assert path.read_bytes() == before


def test_genai_reads_the_mended_tokenizer_as_hugging_face_does(tmp_path: Path) -> None:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai is optional")
    import onnxruntime_genai as og  # type: ignore[import-untyped]  # noqa: PLC0415 - optional

    path = write_tiny_llama(tmp_path / "m")
    source = SourceModel(given="m", onnx_path=path, folder=path.parent)
    mixed().save(str(path.parent / "tokenizer.json"))
    write_genai_config(path.parent, source, SILENT)
    wanted = mixed().encode(TEXT).ids
    model = og.Model(str(path.parent))
    assert [int(token) for token in og.Tokenizer(model).encode(TEXT)] != wanted
    assert mend_tokenizer(path.parent)
    model = og.Model(str(path.parent))
    assert [int(token) for token in og.Tokenizer(model).encode(TEXT)] == wanted
