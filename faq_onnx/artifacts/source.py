"""A resolved source: where the ONNX file and its companions lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from faq_onnx.artifacts.record import Record

__all__ = ["SourceModel", "context_length", "stated_context"]

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_DEFAULT_CONTEXT = 2048


class SourceModel(Record):
    """What `export.resolve_source` found or made.

    Attributes:
        given: The SOURCE as the user wrote it.
        onnx_path: The float model.
        folder: Folder with tokenizer and config, may equal the ONNX file's; None if there is none.
        exported: Made by us just now (in the work folder).
    """

    given: str
    onnx_path: Path
    folder: Path | None
    exported: bool = False

    def companion(self, name: str) -> Path | None:
        """Path of e.g. tokenizer.json or config.json if it exists."""
        if self.folder is None:
            return None
        path = self.folder / name
        return path if path.is_file() else None


def context_length(config: Mapping[str, object] | None) -> int:
    """Positions that a model is made for, by its parsed config.json; 2048 where it is silent."""
    return stated_context(config) or _DEFAULT_CONTEXT


def stated_context(config: Mapping[str, object] | None) -> int | None:
    """Positions that a model is made for, None where its parsed config.json is silent."""
    values = ((config or {}).get(key) for key in _CONTEXT_KEYS)
    return next((v for v in values if isinstance(v, int) and v > 0), None)
