"""Calibration corpus -> token windows, in the order of the file. No model runs here.

Documents keep their order and nothing is shuffled: "lines 1-384 of a file" always means the same
windows. Calibration takes the first windows and verification the ones that follow, so that the
two never overlap. Only as much of a file is read and tokenised as the windows need.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from faq_onnx.artifacts.source import SourceModel
from faq_onnx.calibration.self_text import SelfText
from faq_onnx.calibration.tokens import cut_windows, read_token_arrays
from faq_onnx.config import CalibrationConfig
from faq_onnx.errors import CorpusError
from faq_onnx.progress import Progress

__all__ = ["TokenWindows", "load_corpus"]

_Tokens = npt.NDArray[np.int64]
_PIECE_BYTES = 1 << 16  # a line longer than this is tokenised in pieces
_ACCEPTED = "`self`, a .txt or .jsonl file, or a .npy/.npz file or folder of token arrays"


@dataclasses.dataclass(frozen=True)
class TokenWindows:
    """Token ids for calibration and, apart from them, for verification.

    Attributes:
        calibration: int64 [windows, sequence_length].
        heldout: int64 [windows, sequence_length], may have no rows.
    """

    calibration: _Tokens
    heldout: _Tokens

    def save(self, path: Path) -> None:
        """Keep both in one .npz file; it appears complete or not at all."""
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, calibration=self.calibration, heldout=self.heldout)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> TokenWindows:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(calibration=arrays["calibration"], heldout=arrays["heldout"])


def load_corpus(  # noqa: PLR0913 - keyword-only, one call site
    config: CalibrationConfig,
    *,
    source: SourceModel,
    vocabulary: int,
    count: int,
    holdout: int,
    progress: Progress,
) -> TokenWindows:
    """The first `count` windows for calibration, the `holdout` that follow for verification.

    A shorter corpus is shared out in the same proportion and a note says so; as much as an eighth
    of it is held out all the same.

    Args:
        config: Source of the corpus, sequence length and seed (which only `self` uses).
        source: The model, for its tokenizer and, with `self`, to write the text.
        vocabulary: Rows of the embedding; every id must be below.
        count: Windows wished for calibration.
        holdout: Windows wished for verification.
        progress: Receives the notes, and the tokens that `self` writes.

    Raises:
        CorpusError: Nothing there, not even one window in it, unreadable, no tokenizer, or a
            tokenizer of another model.
    """
    wished = count + holdout
    if config.source == "self":
        # apart: every method is verified on the same windows, however many it calibrates on
        writer = SelfText(source, vocabulary)
        return TokenWindows(
            calibration=writer.write(config, count, progress),
            heldout=writer.write(config, holdout, progress, held_out=True),
        )
    path = Path(config.source).expanduser()
    pieces = _token_pieces(path, source)
    windows = cut_windows(pieces, wished, config.sequence_length, str(path))
    _check_vocabulary(windows, vocabulary, path)
    if len(windows) < wished:
        progress.note(
            f"{path}: {len(windows)} windows of {config.sequence_length} tokens, "
            f"{wished} were asked for; using those"
        )
    return _share_out(windows, count, holdout)


def _share_out(windows: _Tokens, count: int, holdout: int) -> TokenWindows:
    found = len(windows)
    if found < count + holdout:
        held = max(holdout * found // (count + holdout), min(holdout, found // 8))
        held = max(held, min(holdout, 1)) if found > 1 else 0
        count = found - held
    return TokenWindows(calibration=windows[:count], heldout=windows[count : count + holdout])


def _check_vocabulary(windows: _Tokens, vocabulary: int, path: Path) -> None:
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocabulary:
        raise CorpusError(
            f"{path}: token id {low if low < 0 else high}, but the model's vocabulary is 0 to "
            f"{vocabulary - 1}; the tokenizer or the arrays belong to another model"
        )


def _token_pieces(path: Path, source: SourceModel) -> Iterator[_Tokens]:
    if not path.exists():
        raise CorpusError(f"text {str(path)!r}: no such file; it is {_ACCEPTED}")
    suffix = path.suffix.lower()
    if path.is_dir() or suffix in {".npy", ".npz"}:
        return read_token_arrays(path)
    if suffix == ".txt":
        return _encode_text(path, _load_tokenizer(source))
    if suffix == ".jsonl":
        return _read_jsonl(path, source)
    kind = f"a {suffix!r} file" if suffix else "a file without a suffix"
    raise CorpusError(f"text {str(path)!r}: cannot read {kind}; it is {_ACCEPTED}")


def _load_tokenizer(source: SourceModel) -> Tokenizer:
    path = source.companion("tokenizer.json")
    if path is None:
        place = source.folder if source.folder is not None else source.onnx_path.parent
        raise CorpusError(
            f"{place}: a text needs the model's tokenizer.json there; put it beside the model, "
            f"or give token arrays (.npy) or `self`"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise CorpusError(f"{path}: not a tokenizer ({error})") from error


def _encode(tokenizer: Tokenizer, text: str) -> _Tokens:
    # No special tokens: converted tokenizers prepend a BOS that their model never saw.
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _encode_text(path: Path, tokenizer: Tokenizer) -> Iterator[_Tokens]:
    """Tokens line by line; the line break belongs to its line."""
    for _number, text in _read_lines(path):
        if text.strip():
            yield _encode(tokenizer, text)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines; a very long line comes in several pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    number = 1
    with path.open("rb") as file:
        while piece := file.readline(_PIECE_BYTES):
            try:
                text = decoder.decode(piece)
            except UnicodeDecodeError as error:
                raise CorpusError(
                    f"{path}: line {number} is not UTF-8 ({error.reason}); convert the file"
                ) from error
            yield number, text.removeprefix("\ufeff") if number == 1 else text
            number += piece.endswith(b"\n")


def _read_jsonl(path: Path, source: SourceModel) -> Iterator[_Tokens]:
    """Tokens of each record: its `input_ids`, or its `text` and a line break."""
    tokenizer: Tokenizer | None = None
    for number, record in _read_records(path):
        place = f"{path}: line {number}"
        if not isinstance(record, dict) or not record.keys() & {"text", "input_ids"}:
            raise CorpusError(f'{place}: expected an object with "text" or "input_ids"')
        if "input_ids" in record:
            yield _parse_ids(record["input_ids"], place)
            continue
        if not isinstance(record["text"], str):
            raise CorpusError(f'{place}: "text" must be a string')
        tokenizer = tokenizer or _load_tokenizer(source)
        yield _encode(tokenizer, record["text"] + "\n")


def _read_records(path: Path) -> Iterator[tuple[int, Any]]:
    pieces: list[str] = []
    for number, text in _read_lines(path):
        pieces.append(text)
        if text.endswith("\n"):
            yield from _parse_line("".join(pieces), number, path)
            pieces.clear()
    yield from _parse_line("".join(pieces), number if pieces else 0, path)


def _parse_line(line: str, number: int, path: Path) -> Iterator[tuple[int, Any]]:
    if not line.strip():
        return
    try:
        yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{path}: line {number} is not JSON ({error})") from error


def _parse_ids(ids: Any, place: str) -> _Tokens:
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise CorpusError(f'{place}: "input_ids" must be a list of integers')
    try:
        return np.asarray(ids, dtype=np.int64)
    except OverflowError as error:
        raise CorpusError(f"{place}: a token id does not fit 64 bits") from error
