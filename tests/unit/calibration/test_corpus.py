"""Text, JSON lines and token arrays become windows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers  # type: ignore[import-untyped]
from tokenizers.processors import TemplateProcessing  # type: ignore[import-untyped]

from faq_onnx.artifacts.source import SourceModel
from faq_onnx.calibration.corpus import TokenWindows, load_corpus
from faq_onnx.config import CalibrationConfig
from faq_onnx.errors import CorpusError
from faq_onnx.progress import SILENT, Silent

VOCABULARY = 257
BOS = 256


class _Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def source(tmp_path: Path) -> SourceModel:
    """A model folder whose tokenizer has one token per byte and would prepend a BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<s>": BOS}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return SourceModel(given="m", onnx_path=folder / "model.onnx", folder=folder)


def _load(
    path: Path, source: SourceModel, *, count: int = 2, holdout: int = 1, length: int = 8
) -> TokenWindows:
    config = CalibrationConfig(source=str(path), sequence_length=length)
    return load_corpus(
        config,
        source=source,
        vocabulary=VOCABULARY,
        count=count,
        holdout=holdout,
        progress=SILENT,
    )


def _ids(text: str, source: SourceModel) -> list[int]:
    path = source.companion("tokenizer.json")
    ids = Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids
    return [int(token) for token in ids]


def test_text_is_taken_in_order_without_special_tokens(
    tmp_path: Path, source: SourceModel
) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("abcdefgh\n\n  \nijklmno pqrstuvwxyz\nrest of the file")
    windows = _load(path, source)
    flat = np.concatenate([windows.calibration, windows.heldout]).reshape(-1)
    assert flat.tolist() == _ids("abcdefgh\nijklmno pqrstuvwxyz", source)[:24]
    assert windows.calibration.dtype == np.int64
    assert windows.calibration.shape == (2, 8)
    assert windows.heldout.shape == (1, 8)
    again = load_corpus(
        CalibrationConfig(source=str(path), sequence_length=8),
        source=source,
        vocabulary=VOCABULARY,
        count=2,
        holdout=0,
        progress=SILENT,
    )
    assert (again.calibration == windows.calibration).all()
    assert again.heldout.size == 0


def test_only_what_is_needed_is_read(tmp_path: Path, source: SourceModel) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"x" * 100 + b"\n\xff\xff\n")  # line 2 would be an error
    assert len(_load(path, source).calibration) == 2


def test_a_huge_line_is_read_in_pieces(tmp_path: Path, source: SourceModel) -> None:
    path = tmp_path / "corpus.txt"
    text = "\u00e9" * 200_000  # two bytes each: pieces end inside a character
    path.write_text("a" + text, encoding="utf-8")
    windows = _load(path, source, count=300, holdout=0, length=1000)
    assert windows.calibration.reshape(-1).tolist() == _ids("a" + text[:150_000], source)[:300_000]


def test_json_lines_of_text_and_of_ids(tmp_path: Path, source: SourceModel) -> None:
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": "abc", "url": 1}, {"input_ids": [5, 6, 7, 8]}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    windows = _load(path, source, count=1, holdout=0)
    assert windows.calibration.tolist() == [[*_ids("abc\n", source), 5, 6, 7, 8]]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_token_arrays_in_order_of_name(
    tmp_path: Path, source: SourceModel, dtype: type[np.integer]
) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    np.save(folder / "b.npy", np.arange(16, 24, dtype=dtype))
    np.savez(folder / "a.npz", input_ids=np.arange(16, dtype=dtype).reshape(2, 8), mask=np.ones(3))
    bare = source.model_copy(update={"folder": None})  # arrays need no tokenizer
    windows = _load(folder, bare)
    assert windows.calibration.reshape(-1).tolist() == list(range(16))
    assert windows.heldout.tolist() == [list(range(16, 24))]


@pytest.mark.parametrize(
    ("tokens", "calibration", "heldout"), [(8, 1, 0), (16, 1, 1), (50, 4, 2), (80, 6, 3)]
)
def test_a_short_corpus_is_shared_out_and_said(
    tmp_path: Path, source: SourceModel, tokens: int, calibration: int, heldout: int
) -> None:
    path = tmp_path / "t.npy"
    np.save(path, np.arange(tokens))
    notes = _Notes()
    windows = load_corpus(
        CalibrationConfig(source=str(path), sequence_length=8),
        source=source,
        vocabulary=VOCABULARY,
        count=6,
        holdout=3,
        progress=notes,
    )
    assert (len(windows.calibration), len(windows.heldout)) == (calibration, heldout)
    assert bool(notes.notes) == (tokens < 72)
    rows = np.concatenate([windows.calibration, windows.heldout]).reshape(-1)
    assert rows.tolist() == list(range(len(rows)))  # in order, no overlap


@pytest.mark.parametrize(("found", "heldout"), [(4, 1), (20, 2), (32, 3), (40, 3), (256, 3)])
def test_an_eighth_of_a_short_corpus_is_held_out(
    tmp_path: Path, source: SourceModel, found: int, heldout: int
) -> None:
    """However many windows were wished for: three of 500 would leave one of 40."""
    path = tmp_path / "t.npy"
    np.save(path, np.arange(8 * found) % VOCABULARY)
    windows = _load(path, source, count=500, holdout=3, length=8)
    assert (len(windows.calibration), len(windows.heldout)) == (found - heldout, heldout)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "no such file"),
        ("a.csv", b"1,2", "cannot read a '.csv' file"),
        ("a", b"1,2", "cannot read a file without a suffix"),
        ("empty.txt", b"", "0 tokens"),
        ("blank.txt", b"\n \n", "0 tokens"),
        ("short.txt", b"abc\n", "4 tokens, fewer than one window of 8"),
        ("latin.txt", b"good\nna\xefve\n", "line 2 is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
        ("list.jsonl", b"[1, 2]\n", 'line 1: expected an object with "text"'),
        ("number.jsonl", b'{"text": 3}\n', '"text" must be a string'),
        ("float.jsonl", b'{"input_ids": [1.5]}\n', "list of integers"),
        ("bool.jsonl", b'{"input_ids": [true]}\n', "list of integers"),
        ("huge.jsonl", b'{"input_ids": [99999999999999999999]}\n', "does not fit 64 bits"),
        ("out.jsonl", b'{"input_ids": [0, 1, 2, 3, 4, 5, 6, 999]}\n', "token id 999"),
        ("neg.jsonl", b'{"input_ids": [0, 1, 2, 3, 4, 5, 6, -1]}\n', "token id -1"),
        ("cut.npy", b"\x93NUMPY", "not a readable array"),
        ("none.npy", b"", "not a readable array"),
        ("text.npz", b"hello", "not a readable array"),
    ],
)
def test_bad_corpora(
    tmp_path: Path, source: SourceModel, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        _load(path, source)


def test_float_and_object_arrays_are_refused(tmp_path: Path, source: SourceModel) -> None:
    np.save(tmp_path / "f.npy", np.zeros(64, dtype=np.float32))
    with pytest.raises(CorpusError, match="dtype float32, but token ids are integers"):
        _load(tmp_path / "f.npy", source)
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object))
    with pytest.raises(CorpusError, match="not a readable array"):
        _load(tmp_path / "o.npy", source)
    (tmp_path / "none").mkdir()
    with pytest.raises(CorpusError, match=r"no \.npy or \.npz"):
        _load(tmp_path / "none", source)


def test_text_without_or_with_a_broken_tokenizer(tmp_path: Path, source: SourceModel) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("hello world, hello\n")
    with pytest.raises(CorpusError, match=r"needs the model's tokenizer\.json"):
        _load(path, source.model_copy(update={"folder": None}))
    (source.onnx_path.parent / "tokenizer.json").write_text("{}")
    with pytest.raises(CorpusError, match="not a tokenizer"):
        _load(path, source)
