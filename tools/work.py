"""Where a bench works, and which token windows it takes."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from faq_onnx.calibration.corpus import TokenWindows, load_corpus
from faq_onnx.config import CalibrationConfig
from faq_onnx.progress import SILENT, Progress
from faq_onnx.stages import opening

__all__ = ["load_windows", "work_folder"]


def load_windows(
    opened: opening.OpenedModel,
    calibration: CalibrationConfig,
    *,
    pool: int = 0,
    holdout: int = 0,
    progress: Progress = SILENT,
) -> TokenWindows:
    """`samples` windows: the first of the text, or, with a pool, a draw by the seed.

    The seed picks among the first `pool` windows of the text, and a small draw is part of a larger
    one. A model that writes its own text (`self`) writes another one for another seed.
    """
    samples = calibration.count
    draws = pool > samples and calibration.source != "self"
    tokens = load_corpus(
        calibration,
        source=opened.source,
        vocabulary=opened.vocabulary,
        count=pool if draws else samples,
        holdout=holdout,
        progress=progress,
    )
    if not draws:
        return tokens
    order = np.random.default_rng(calibration.seed).permutation(len(tokens.calibration))
    picked = tokens.calibration[np.sort(order[:samples])]
    return TokenWindows(calibration=picked, heldout=tokens.heldout)


@contextlib.contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """A folder to work in: the given one, which is kept, or a temporary one."""
    if given is None:
        with tempfile.TemporaryDirectory(prefix="faq-onnx-bench-") as folder:
            yield Path(folder)
        return
    given.mkdir(parents=True, exist_ok=True)
    yield given
