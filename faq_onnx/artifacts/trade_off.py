"""What a budget bought: the trade-off of size against quality, and the point that was chosen."""

from __future__ import annotations

from typing import Literal

from faq_onnx.artifacts.record import Record

__all__ = ["TradeOff", "TradeOffPoint"]


class TradeOffPoint(Record):
    """The best that one size allows.

    Attributes:
        bytes: Of the file: low-bit weights, and everything that stays as it is.
        bits_per_weight: Over the weights that compete, scales and zero points included.
        kl: Predicted KL divergence to the source model, nats/token.
    """

    bytes: int
    bits_per_weight: float
    kl: float


class TradeOff(Record):
    """The outcome of a budget.

    Attributes:
        budget: The wish, as it was given.
        kind: What is limited: "bpw", "bytes" or "kl".
        limit: Bits per weight, bytes, or nats per token.
        fixed_bytes: Of the file without the weights that compete; part of all `bytes`.
        chosen: The choice.
        curve: From the smallest size to the smallest KL, thinned out.
    """

    budget: str
    kind: Literal["bpw", "bytes", "kl"]
    limit: float
    fixed_bytes: int
    chosen: TradeOffPoint
    curve: tuple[TradeOffPoint, ...]
