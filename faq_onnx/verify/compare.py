"""Run the source model and the quantized model on the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.verification import LogitMetrics
from faq_onnx.errors import UnsupportedModelError
from faq_onnx.progress import SILENT, Progress
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.verify.logits import LogitComparison

__all__ = ["compare_models"]

LOGITS = "logits"


def compare_models(
    float_path: Path,
    quantized_path: Path,
    windows: npt.NDArray[np.int64],
    *,
    progress: Progress = SILENT,
    config: Mapping[str, str] | None = None,
) -> LogitMetrics:
    """Compare two decoders window by window; both are open at the same time.

    Args:
        float_path: Source model.
        quantized_path: Result.
        windows: int64 [windows, sequence].
        progress: Receives one stage.
        config: Session entries for the quantized model, such as {"mlas.qnbit.force_fp32": "1"}.

    Raises:
        ModelError: A model does not load, cannot be fed, or has no output "logits".
        NonFiniteError: NaN or infinite logits.
    """
    sessions = (open_session(float_path), open_session(quantized_path, config=config))
    for path, session in zip((float_path, quantized_path), sessions, strict=True):
        names = [value.name for value in session.get_outputs()]
        if LOGITS not in names:
            raise UnsupportedModelError(f"{path}: no output {LOGITS!r}; it has {names}")
    comparison = LogitComparison()
    with progress.stage("Comparing logits", len(windows), "windows") as advance:
        for row in range(len(windows)):
            ids = windows[row : row + 1]
            reference, quantized = (
                run_session(session, decoder_feeds(session.get_inputs(), ids), [LOGITS])[LOGITS]
                for session in sessions
            )
            comparison.add(reference, quantized, ids)
            advance(1)
    return comparison.metrics()
