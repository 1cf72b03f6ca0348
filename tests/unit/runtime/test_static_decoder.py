"""Graphs of fixed lengths, run on the CPU, say what the model of any length says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from faq_onnx.errors import UnsupportedModelError
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.runtime.static_decoder import StaticDecoder
from faq_onnx.targets.qnn_graphs import Lengths, write_graphs
from faq_onnx.testing import TinyLlama, write_tiny_llama

PROMPT, CONTEXT = 8, 24
# Sums in another order: a few roundings of float32 in each of two layers.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder, its two graphs, and their weights in one file."""
    folder = tmp_path_factory.mktemp("static")
    write_tiny_llama(folder)
    write_graphs(folder, folder / "work", Lengths(PROMPT, CONTEXT))
    return folder


def _session(folder: Path, name: str) -> ort.InferenceSession:
    return open_session(folder / f"{name}.onnx")


def _decoder(folder: Path) -> StaticDecoder:
    return StaticDecoder(_session(folder, "prefill"), _session(folder, "decode"))


def _expected(folder: Path, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    session = _session(folder, "model")
    feeds = decoder_feeds(session.get_inputs(), tokens[np.newaxis])
    logits: npt.NDArray[np.float32] = run_session(session, feeds)["logits"][0]
    return logits


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param((24,), id="three full prompts"),
        pytest.param((5, 1, 1), id="a prompt that does not fill its graph"),
        pytest.param((13, 1, 4, 1), id="a second prompt behind tokens"),
        pytest.param((21, 3), id="no room for the prefill graph at the end"),
        pytest.param((1,) * 6, id="tokens only"),
    ],
)
def test_logits_are_those_of_the_model(folder: Path, pieces: tuple[int, ...]) -> None:
    tokens = np.random.default_rng(0).integers(0, TinyLlama().vocabulary, sum(pieces))
    decoder = _decoder(folder)
    parts = np.split(tokens, np.cumsum(pieces)[:-1])
    found = np.concatenate([decoder.read(part) for part in parts])
    expected = _expected(folder, tokens)
    assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()
    assert decoder.length == len(tokens)


def test_a_text_longer_than_the_context_is_refused(folder: Path) -> None:
    decoder = _decoder(folder)
    decoder.read(np.arange(CONTEXT))
    with pytest.raises(UnsupportedModelError, match=r"24 \+ 1 tokens are more than the context"):
        decoder.read(np.array([1]))


def test_a_model_of_any_length_is_no_static_decoder(folder: Path) -> None:
    session = _session(folder, "model")
    with pytest.raises(UnsupportedModelError, match="has numbers only"):
        StaticDecoder(session, session)
