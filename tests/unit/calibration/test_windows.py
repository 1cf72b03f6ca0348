"""How many windows the channel scales and the low-bit path look at, and which."""

from __future__ import annotations

import numpy as np
import pytest

from faq_onnx.calibration.windows import path_windows, scale_windows
from faq_onnx.config import CalibrationConfig, Method, QuantizeConfig, RoundingConfig


@pytest.mark.parametrize(
    ("config", "scales", "walk"),
    [
        (QuantizeConfig(method=Method.AWQ), 128, None),
        (QuantizeConfig(method=Method.FAQ_GPTQ), 32, 102),
        (QuantizeConfig(method=Method.BEST), 32, 128),
        (QuantizeConfig(rounding=RoundingConfig(path="float")), 128, None),
        (QuantizeConfig(rounding=RoundingConfig(path_share=0.01)), 32, 32),
    ],
    ids=["awq", "default", "best", "float path", "no less than scales see"],
)
def test_windows_for_scales_and_for_the_walk(
    config: QuantizeConfig, scales: int, walk: int | None
) -> None:
    windows = np.arange(128)[:, np.newaxis] * np.ones(512, np.int64)
    assert len(scale_windows(config, windows)) == scales
    found = path_windows(config, windows)
    assert (None if found is None else len(found)) == walk
    if found is not None:  # spread over the corpus, each once
        assert (found[0, 0], found[-1, 0]) == (0, 127)
        assert len(np.unique(found[:, 0])) == walk


@pytest.mark.parametrize(
    ("config", "scales", "walk"),
    [
        (QuantizeConfig(method=Method.AWQ), 256, None),
        (QuantizeConfig(), 32, 307),
        (QuantizeConfig(method=Method.BEST), 32, 512),
        (QuantizeConfig(rounding=RoundingConfig(path_share=0.8)), 32, 410),
        (QuantizeConfig(calibration=CalibrationConfig(samples=512)), 32, 410),
        (
            QuantizeConfig(method=Method.AWQ, calibration=CalibrationConfig(samples=512)),
            512,
            None,
        ),
    ],
    ids=["awq", "default", "best", "share asked for", "windows asked for", "awq, asked for"],
)
def test_of_a_long_text_no_more_than_helps_unless_asked(
    config: QuantizeConfig, scales: int, walk: int | None
) -> None:
    windows = np.zeros((512, 512), np.int64)
    assert len(scale_windows(config, windows)) == scales
    found = path_windows(config, windows)
    assert (None if found is None else len(found)) == walk


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (CalibrationConfig(source="notes.txt"), 512),
        (CalibrationConfig(), 128),
        (CalibrationConfig(source="notes.txt", samples=5), 5),
        (CalibrationConfig(samples=300), 300),
    ],
    ids=["text", "self", "asked for", "asked for of self"],
)
def test_windows_to_take(data: CalibrationConfig, count: int) -> None:
    assert data.count == count


def test_a_small_corpus_walks_whole() -> None:
    windows = np.zeros((5, 64), np.int64)
    found = path_windows(QuantizeConfig(), windows)
    assert found is not None
    assert len(found) == len(scale_windows(QuantizeConfig(), windows)) == 5
