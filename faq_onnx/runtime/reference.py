"""What a decoder makes of a prompt: greedy tokens and the largest logits, to compare runtimes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from faq_onnx.artifacts.target import Reference
from faq_onnx.errors import CalibrationError, ModelError
from faq_onnx.runtime.generate import DecoderRun

__all__ = [
    "FLOAT_ROUNDING",
    "TOP_LOGITS",
    "Agreement",
    "logit_distance",
    "take_reference",
    "token_agreement",
]

TOP_LOGITS = 64  # enough to see another model; a whole row would be 600 kB of JSON
# How far logits of one function may be apart, of their size, in float32: 5e-6 were measured.
FLOAT_ROUNDING = 1e-3


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Whether tokens are those of a reference, up to a tie that rounding may decide.

    Attributes:
        passed: They are.
        text: How many, for people.
    """

    passed: bool
    text: str


def take_reference(session: ort.InferenceSession, prompt: Sequence[int], steps: int) -> Reference:
    """Run a prompt and continue it.

    Args:
        session: A decoder; where it cannot be fed, the reference says why.
        prompt: At least one token id.
        steps: Greedy tokens to take.
    """
    given = tuple(int(token) for token in prompt)
    rows: list[npt.NDArray[np.float32]] = []
    ids = np.array([given], np.int64)
    try:
        run = DecoderRun(session)
        for _ in range(steps):
            rows.append(run.step(ids)[0])
            ids = rows[-1].argmax().reshape(1, 1)
    except (ModelError, CalibrationError) as error:  # cannot be fed, or gives NaN
        return Reference(prompt=given, problem=str(error))
    best = np.argsort(-rows[0], kind="stable")[:TOP_LOGITS]
    return Reference(
        prompt=given,
        tokens=tuple(int(row.argmax()) for row in rows),
        margins=tuple(_margin(row) for row in rows),
        logits=tuple((int(token), float(rows[0][token])) for token in best),
    )


def logit_distance(reference: Reference, other: Reference) -> float:
    """Largest difference of the reference's largest logits over the largest of them.

    Infinite where one of the upper half of them is not among the other's.
    """
    found = dict(other.logits)
    count = max(1, len(reference.logits) // 2)
    top = reference.logits[:count]
    if not reference.logits or any(token not in found for token, _ in top):
        return float("inf")
    size = max(abs(value) for _, value in reference.logits) or 1.0
    known = [(value, found[token]) for token, value in reference.logits if token in found]
    return max(abs(value - there) for value, there in known) / size


def token_agreement(reference: Reference, tokens: Sequence[int], rounding: float) -> Agreement:
    """Compare greedy tokens; they may be fewer, where a runtime stops at an end token.

    Args:
        reference: What they should be.
        tokens: What another runtime makes of the same prompt.
        rounding: How far its logits may be off, of their size: two that are nearer than twice
            that are a tie, behind which both texts are right.
    """
    wanted = reference.tokens[: len(tokens)]
    pairs = zip(wanted, tokens, strict=True)
    same = next((n for n, (ours, theirs) in enumerate(pairs) if ours != theirs), len(wanted))
    text = f"{same} of {len(wanted)} equal onnxruntime's"
    if same == len(wanted):
        return Agreement(bool(wanted), text)
    margin = reference.margins[same]
    if margin <= 2 * rounding:
        return Agreement(True, f"{text}, then a tie ({margin:.1g} of the logits' size)")
    return Agreement(False, f"{text}, then token {tokens[same]} instead of {wanted[same]}")


def _margin(row: npt.NDArray[np.float32]) -> float:
    second, first = np.partition(row, -2)[-2:]
    return float((first - second) / (np.abs(row).max() or 1.0))
