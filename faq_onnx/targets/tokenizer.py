"""tokenizer.json in the words that onnxruntime-genai understands.

Tokenizers that transformers makes of .gguf files mix two kinds: byte-level tokens with the decoder
of SentencePiece in front. Hugging Face reads them well; genai 0.18 takes them for SentencePiece,
and every token with a space becomes -1.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer  # type: ignore[import-untyped]

__all__ = ["TOKENIZER_NAME", "mend_tokenizer"]

_LOGGER = logging.getLogger(__name__)
TOKENIZER_NAME = "tokenizer.json"
_SAMPLE = "Hello, world!\n  Zwölf Boxkämpfer 日本 \t1234 (a_b)"


def mend_tokenizer(folder: Path) -> bool:
    """Take SentencePiece's steps out of a byte-level tokenizer; what it computes stays.

    Returns:
        Whether tokenizer.json was changed.
    """
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except ValueError:  # whoever reads it says so; it is only copied here
        return False
    mended = _mended(content) if isinstance(content, dict) else None
    if mended is None:
        return False
    old, new = Tokenizer.from_str(text), Tokenizer.from_str(json.dumps(mended))
    ids = old.encode(_SAMPLE).ids
    if new.encode(_SAMPLE).ids != ids or new.decode(ids) != old.decode(ids):
        _LOGGER.warning("%s: mixes two kinds of tokenizer; genai may misread it", path)
        return False
    path.write_text(json.dumps(mended, ensure_ascii=False), encoding="utf-8")
    _LOGGER.info("%s: took SentencePiece's decoder out of a byte-level tokenizer", path)
    return True


def _mended(content: dict[str, Any]) -> dict[str, Any] | None:
    """The content with one decoder, that of bytes; None where there is nothing to mend."""
    decoder = content.get("decoder") or {}
    steps = decoder.get("decoders", [])
    bytes_steps = [step for step in steps if step.get("type") == "ByteLevel"]
    splitter = content.get("pre_tokenizer") or {}
    splitters = [splitter, *splitter.get("pretokenizers", [])]
    is_byte_level = any(each.get("type") == "ByteLevel" for each in splitters)
    if not is_byte_level or len(steps) < 2 or len(bytes_steps) != 1:
        return None
    model = {**content["model"], "byte_fallback": False}
    return {**content, "decoder": bytes_steps[0], "model": model}
