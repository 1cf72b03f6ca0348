"""Token windows in runs of a convenient size, and what a part of a model is fed for one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from faq_onnx.errors import CalibrationError
from faq_onnx.runtime.feeds import decoder_feeds

__all__ = ["Batch", "make_batches", "part_feeds", "store_key"]

# A run of this many tokens keeps both cores busy and activations in the tens of megabytes.
TOKENS_PER_RUN = 2048


@dataclasses.dataclass(frozen=True)
class Batch:
    """Windows that run together.

    Attributes:
        name: Unique in a walk.
        ids: int64 [windows, length].
        collect: Statistics are taken (held-out windows only pass through).
    """

    name: str
    ids: npt.NDArray[np.int64]
    collect: bool


def make_batches(
    windows: npt.NDArray[np.int64], held_out: npt.NDArray[np.int64] | None = None
) -> list[Batch]:
    """Calibration windows several at a time, held-out ones singly.

    Raises:
        CalibrationError: There are none.
    """
    singles = windows[:0] if held_out is None else held_out
    if windows.size == 0 and singles.size == 0:
        msg = "no token windows to run the model on"
        raise CalibrationError(msg)
    rows = max(1, TOKENS_PER_RUN // max(windows.shape[1], 1))
    batches = [
        Batch(f"run{start}", windows[start : start + rows], collect=True)
        for start in range(0, len(windows), rows)
    ]
    held = [
        Batch(f"held{row}", singles[row : row + 1], collect=False) for row in range(len(singles))
    ]
    return batches + held


def part_feeds(
    session: ort.InferenceSession,
    ids: npt.NDArray[np.int64],
    stored: Mapping[str, npt.NDArray[np.generic]],
) -> dict[str, npt.NDArray[np.generic]]:
    """Inputs of a part: stored values by name, the model's own inputs from the ids."""
    inputs = session.get_inputs()
    own = [argument for argument in inputs if argument.name not in stored]
    feeds = dict(decoder_feeds(own, ids))
    names = {argument.name for argument in inputs}
    feeds.update({name: array for name, array in stored.items() if name in names})
    return feeds


def store_key(varying: bool, batch: str, shape: tuple[int, ...]) -> str:
    """Values that do not depend on the ids are kept once per batch shape."""
    return batch if varying else "x".join(map(str, shape))
