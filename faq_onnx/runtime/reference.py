"""What a decoder makes of a prompt: greedy tokens and the largest logits, to compare runtimes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from faq_onnx.artifacts.target import Reference
from faq_onnx.errors import CalibrationError, ModelError
from faq_onnx.runtime.generate import DecoderRun

__all__ = ["TOP_LOGITS", "logit_distance", "take_reference"]

TOP_LOGITS = 64  # enough to see another model; a whole row would be 600 kB of JSON


def take_reference(session: ort.InferenceSession, prompt: Sequence[int], steps: int) -> Reference:
    """Run a prompt and continue it.

    Args:
        session: A decoder; where it cannot be fed, the reference says why.
        prompt: At least one token id.
        steps: Greedy tokens to take.
    """
    given = tuple(int(token) for token in prompt)
    tokens: list[int] = []
    top: tuple[tuple[int, float], ...] = ()
    try:
        run = DecoderRun(session)
        row = run.step(np.array([given], np.int64))[0]
        best = np.argsort(-row, kind="stable")[:TOP_LOGITS]
        top = tuple((int(token), float(row[token])) for token in best)
        for _ in range(steps):
            tokens.append(int(row.argmax()))
            if len(tokens) < steps:
                row = run.step(np.array([tokens[-1:]], np.int64))[0]
    except (ModelError, CalibrationError) as error:  # cannot be fed, or gives NaN
        return Reference(prompt=given, problem=str(error))
    return Reference(prompt=given, tokens=tuple(tokens), logits=top)


def logit_distance(reference: Reference, other: Reference) -> float:
    """Largest difference of the reference's largest logits over the largest of them.

    Infinite where one of its tokens is not among the other's largest.
    """
    found = dict(other.logits)
    if not reference.logits or any(token not in found for token, _ in reference.logits):
        return float("inf")
    size = max(abs(value) for _, value in reference.logits) or 1.0
    return max(abs(value - found[token]) for token, value in reference.logits) / size
