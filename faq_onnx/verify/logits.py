"""How far quantized logits are from float ones: KL divergence, top-1 agreement, perplexities."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.verification import LogitMetrics
from faq_onnx.errors import NonFiniteError, VerificationError
from faq_onnx.quant.divergence import ShiftedLogits, pieces

__all__ = ["LogitComparison"]

Floats = npt.NDArray[np.floating]

# What to do about logits that are not finite, by the model they are of.
WAYS_OUT = {
    "source": "it overflows on this text: check it in float32, or verify on other text",
    "quantized": "try more bits, or --accuracy-level 0",
}


@dataclasses.dataclass
class LogitComparison:
    """Sums over any number of windows; `metrics` gives the means."""

    _positions: int = 0
    _predictions: int = 0
    _kl: float = 0.0
    _agreements: int = 0
    _loss_float: float = 0.0
    _loss: float = 0.0

    def add(self, float_logits: Floats, logits: Floats, input_ids: npt.NDArray[np.int64]) -> None:
        """Add windows.

        Args:
            float_logits: Of the source model, float32 or float16 [B, S, vocabulary].
            logits: Of the quantized model, same shape.
            input_ids: int64 [B, S]; logits at position t are judged by token t + 1.

        Raises:
            VerificationError: The shapes do not fit.
            NonFiniteError: NaN or infinite logits.
        """
        if float_logits.shape != logits.shape or logits.shape[:2] != input_ids.shape:
            msg = (
                f"logits {list(logits.shape)} and float logits {list(float_logits.shape)} do not "
                f"belong to the same model and tokens {list(input_ids.shape)}"
            )
            raise VerificationError(msg)
        for ids, reference, quantized in zip(input_ids, float_logits, logits, strict=True):
            for piece in pieces(len(ids), logits.shape[2]):
                following = ids[piece.start + 1 : piece.stop + 1]
                self._add_piece(following, reference[piece], quantized[piece])

    def metrics(self) -> LogitMetrics:
        """Means over everything added.

        Raises:
            VerificationError: Nothing was added.
            NonFiniteError: A mean is NaN or infinite.
        """
        if not self._predictions:
            raise VerificationError("no positions to compare; give windows of 2 tokens or more")
        kl = self._kl / self._positions
        mean_losses = (self._loss_float / self._predictions, self._loss / self._predictions)
        if not all(math.isfinite(value) for value in (kl, *mean_losses)):
            raise NonFiniteError(f"KL {kl} or losses {mean_losses} are not finite")
        return LogitMetrics(
            tokens=self._positions,
            kl_nats=max(kl, 0.0),  # rounding can leave equal models at -1e-9
            top1_agreement=self._agreements / self._positions,
            perplexity_float=math.exp(mean_losses[0]),
            perplexity=math.exp(mean_losses[1]),
        )

    def _add_piece(
        self, following: npt.NDArray[np.int64], reference: Floats, quantized: Floats
    ) -> None:
        """Add positions; `following` lacks the last one at the end of a window."""
        p, q = _shift(reference, "source"), _shift(quantized, "quantized")
        self._positions += len(p.best)
        self._predictions += len(following)
        self._agreements += int((p.best == q.best).sum())
        rows = np.arange(len(following))
        self._loss_float += float((p.log_sums[rows] - p.values[rows, following]).sum())
        self._loss += float((q.log_sums[rows] - q.values[rows, following]).sum())
        self._kl += float(p.kl(q).sum())


def _shift(logits: Floats, whose: str) -> ShiftedLogits:
    return ShiftedLogits.of(logits, whose=f"the {whose} model's logits", way_out=WAYS_OUT[whose])
