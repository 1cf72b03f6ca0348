"""`self` calibration: the model writes its own text by sampling, so no data set is needed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

from faq_onnx.config import CalibrationConfig
from faq_onnx.progress import Progress

__all__ = ["SelfText"]


@dataclasses.dataclass(frozen=True)
class SelfText:
    """Writes text with a decoder model.

    Attributes:
        onnx_path: The float model.
        vocabulary: Number of token ids.
    """

    onnx_path: Path
    vocabulary: int

    def write(
        self, config: CalibrationConfig, count: int, progress: Progress
    ) -> npt.NDArray[np.int64]:
        """Sample `count` windows, int64 [count, sequence_length], the same for the same seed."""
        raise NotImplementedError
