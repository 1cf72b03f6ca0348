"""The model writes its own calibration text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer  # type: ignore[import-untyped]
from tokenizers.processors import TemplateProcessing  # type: ignore[import-untyped]

from faq_onnx.artifacts.source import SourceModel
from faq_onnx.calibration import self_text
from faq_onnx.calibration.corpus import TokenWindows, load_corpus
from faq_onnx.config import CalibrationConfig
from faq_onnx.errors import CorpusError
from faq_onnx.progress import SILENT, Advance, Progress
from faq_onnx.runtime.generate import generate_greedy
from faq_onnx.runtime.session import open_session
from faq_onnx.testing import write_tiny_llama

VOCABULARY, ORDINARY, BOS = 288, 264, 256


class _Count:
    def __init__(self) -> None:
        self.total = self.done = 0.0

    @contextmanager
    def stage(self, title: str, total: float, unit: str) -> Iterator[Advance]:
        assert (title, unit) == ("write calibration text", "tokens")
        self.total += total

        def _advance(steps: float) -> None:
            self.done += steps

        yield _advance

    def note(self, text: str) -> None:
        pytest.fail(text)


@pytest.fixture
def source(tmp_path: Path) -> SourceModel:
    path = write_tiny_llama(tmp_path / "m")
    return SourceModel(given="m", onnx_path=path, folder=path.parent)


def _write(
    source: SourceModel,
    *,
    seed: int = 0,
    length: int = 12,
    count: int = 5,
    progress: Progress = SILENT,
) -> TokenWindows:
    return load_corpus(
        CalibrationConfig(seed=seed, sequence_length=length),
        source=source,
        vocabulary=VOCABULARY,
        count=count,
        holdout=2,
        progress=progress,
    )


def _starts(windows: TokenWindows, column: int = 0) -> npt.NDArray[np.int64]:
    return np.concatenate([windows.calibration, windows.heldout])[:, column]


def test_windows_of_the_wished_size_the_same_for_the_same_seed(source: SourceModel) -> None:
    count = _Count()
    windows = _write(source, progress=count)
    assert windows.calibration.shape == (5, 12)
    assert windows.heldout.shape == (2, 12)
    assert count.done == count.total == 7 * 11
    assert (_write(source).calibration == windows.calibration).all()
    assert (_write(source, seed=1).calibration != windows.calibration).any()
    starts = _starts(windows)
    assert len(set(starts[:5].tolist())) == 5  # distinct texts, also in the held-out part
    assert len(set(starts[5:].tolist())) == 2
    assert starts.max() < ORDINARY


def test_held_out_windows_do_not_depend_on_how_many_are_calibrated_on(
    source: SourceModel,
) -> None:
    found = [_write(source, count=count) for count in (0, 1, 5)]
    for windows in found:
        np.testing.assert_array_equal(windows.heldout, found[0].heldout)
    assert len(found[0].calibration) == 0
    assert not (found[2].calibration[:2] == found[2].heldout).all()


def test_a_long_window_is_several_texts_in_several_batches(
    source: SourceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_bytes = 2 * 2 * 2 * 16 * 4  # layers, key and value, heads, head size, float32
    monkeypatch.setattr(self_text, "_TEXT_TOKENS", 8)
    monkeypatch.setattr(self_text, "_CACHE_BYTES", 3 * 7 * row_bytes)
    count = _Count()
    windows = _write(source, length=20, progress=count)  # 3 texts of 7 tokens, cut to 20
    assert windows.calibration.shape == (5, 20)
    assert count.done == count.total == 21 * 6
    starts = np.stack([_starts(windows, column) for column in (0, 7, 14)])
    assert len(set(starts[:, :5].ravel().tolist())) == 15


def test_a_bos_comes_first_where_the_tokenizer_wants_one(source: SourceModel) -> None:
    path = source.onnx_path.parent / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(path))
    windows = _write(source)
    assert set(_starts(windows).tolist()) == {BOS}
    assert BOS not in _starts(windows, 1)
    assert len(set(_starts(windows, 1).tolist())) == 7


def test_without_a_tokenizer_any_token_starts(source: SourceModel) -> None:
    windows = _write(source.model_copy(update={"folder": None}))
    assert windows.calibration.shape == (5, 12)


def test_the_text_is_the_models(source: SourceModel) -> None:
    """Sampled tokens are likelier under the model than tokens drawn evenly."""
    session = open_session(source.onnx_path)
    windows = _write(source, length=64)
    best = 0
    for row in windows.calibration:
        greedy = [next(iter(generate_greedy(session, row[:n], 1))) for n in range(16, 64, 4)]
        best += sum(g == t for g, t in zip(greedy, row[16:64:4], strict=True))
    # Evenly drawn, 60 tokens would hit the best of 288 with mean 0.2; 6 hits have p < 1e-6.
    assert best >= 6


def test_a_tokenizer_of_another_model(source: SourceModel) -> None:
    config = CalibrationConfig(sequence_length=8)
    writer = self_text.SelfText(source, 0)
    with pytest.raises(CorpusError, match="belongs to another model"):
        writer.write(config, 2, SILENT)
    (source.onnx_path.parent / "tokenizer.json").write_text("[]")
    with pytest.raises(CorpusError, match="not a tokenizer"):
        _write(source)
