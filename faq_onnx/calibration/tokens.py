"""Token arrays on disk, and the cutting of token streams into windows."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from faq_onnx.errors import CorpusError

__all__ = ["cut_windows", "read_token_arrays"]

_Tokens = npt.NDArray[np.int64]
_ROW_TOKENS = 1 << 20  # longer arrays are handed on in pieces
_KEY = "input_ids"


def cut_windows(
    pieces: Iterable[_Tokens], count: int, sequence_length: int, place: str
) -> _Tokens:
    """Join token pieces and cut the first `count` windows, int64 [<= count, sequence_length].

    Stops reading as soon as there are enough.

    Raises:
        CorpusError: Not even one window.
    """
    needed = count * sequence_length
    taken: list[_Tokens] = []
    total = 0
    for piece in pieces:
        taken.append(piece)
        total += piece.size
        if total >= needed:
            break
    windows = min(count, total // sequence_length)
    if windows == 0:
        raise CorpusError(
            f"{place}: {total} tokens, fewer than one window of {sequence_length}; "
            f"give more text or a smaller sequence length"
        )
    return np.concatenate(taken)[: windows * sequence_length].reshape(windows, sequence_length)


def read_token_arrays(path: Path) -> Iterator[_Tokens]:
    """Tokens of a .npy or .npz file, or of all of them in a folder in order of name.

    An array may have any shape and is read row by row. In a .npz file `input_ids` is taken where
    there is one, else every array in order of name.

    Raises:
        CorpusError: No such files, not readable, or not integers.
    """
    if path.is_file():
        yield from _read_file(path)
        return
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in {".npy", ".npz"})
    if not files:
        raise CorpusError(f"{path}: no .npy or .npz token arrays in this folder")
    for file in files:
        yield from _read_file(file)


def _read_file(path: Path) -> Iterator[_Tokens]:
    try:
        if path.suffix.lower() == ".npy":
            yield from _pieces(np.load(path, mmap_mode="r", allow_pickle=False), str(path))
            return
        with np.load(path, allow_pickle=False) as archive:
            names = [_KEY] if _KEY in archive.files else sorted(archive.files)
            for name in names:
                yield from _pieces(archive[name], f"{path}[{name}]")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CorpusError(f"{path}: not a readable array of token ids ({error})") from error


def _pieces(array: npt.NDArray[np.generic], place: str) -> Iterator[_Tokens]:
    if array.dtype.kind not in "iu":
        raise CorpusError(f"{place}: dtype {array.dtype}, but token ids are integers")
    flat = array.reshape(-1)
    for start in range(0, flat.size, _ROW_TOKENS):
        yield flat[start : start + _ROW_TOKENS].astype(np.int64)
