"""Second moments of the float and the low-bit path on the same tokens, in two halves of these."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from faq_onnx.calibration.attention import AttentionMoments

__all__ = ["Halves", "PairedMoments", "PairedSums", "halves_of"]

FEW_BATCHES = 4

Array = npt.NDArray[np.float32]
Accumulator = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class PairedMoments:
    """What one group sees on the low-bit path, and how the float path differs; means over tokens.

    Attributes:
        gram: E[x_q^T x_q], float32 [K, K].
        cross: E[(x - x_q)^T x_q], float32 [K, K]; zeros where every site has a residual.
        residual: By site that adds to the residual stream, E[(r - r_q)^T x_q], float32 [N, K]:
            r is the float stream behind the addition, r_q the low-bit stream in front of it, so
            r - r_q is what the site should add for the streams to meet again.
        tokens: How many the means are over.
        attention: How errors of q, k and v count, by the float model's attention; taken over
            whole sequences, so the same in both halves.
    """

    gram: Array
    cross: Array
    residual: Mapping[str, Array]
    tokens: int
    attention: AttentionMoments = dataclasses.field(default_factory=AttentionMoments)

    @classmethod
    def mean(cls, halves: tuple[PairedMoments, PairedMoments]) -> PairedMoments:
        """Over both halves of the tokens."""
        one, other = halves
        share = np.float32(one.tokens / (one.tokens + other.tokens))
        rest = np.float32(1) - share
        return cls(
            share * one.gram + rest * other.gram,
            share * one.cross + rest * other.cross,
            {
                name: share * one.residual[name] + rest * other.residual[name]
                for name in one.residual
            },
            one.tokens + other.tokens,
            one.attention,
        )


Halves = tuple[PairedMoments, PairedMoments]


@dataclasses.dataclass
class PairedSums:
    """Running float64 sums over some of the tokens."""

    gram: Accumulator
    cross: Accumulator
    residual: dict[str, Accumulator]
    tokens: int = 0

    @classmethod
    def zeros(cls, size: int, rows: Mapping[str, int]) -> PairedSums:
        """Empty ones.

        Args:
            size: K.
            rows: N of the sites that add to the residual stream, by name.
        """
        residual = {name: np.zeros((count, size)) for name, count in rows.items()}
        return cls(np.zeros((size, size)), np.zeros((size, size)), residual)

    def add(self, low: Array, ahead: Array | None, missing: Mapping[str, Array]) -> None:
        """Add tokens: x_q [T, K], x (None where nothing asks for it), r - r_q [T, N] by site."""
        if not len(low):
            return
        self.gram += low.T @ low
        if ahead is not None:
            self.cross += (ahead - low).T @ low
        for name, rows in missing.items():
            self.residual[name] += rows.T @ low
        self.tokens += len(low)

    def means(self) -> PairedMoments:
        """Over what was added."""
        count = max(self.tokens, 1)
        return PairedMoments(
            (self.gram / count).astype(np.float32),
            (self.cross / count).astype(np.float32),
            {name: (total / count).astype(np.float32) for name, total in self.residual.items()},
            self.tokens,
        )


def halves_of(rows: int, batch: int, batches: int) -> tuple[slice, slice]:
    """The rows of a batch that belong to each half of the tokens.

    Batches go to the halves in turn, as large products cost less than small ones; few are split.
    """
    if batches < FEW_BATCHES:
        return slice(rows // 2), slice(rows // 2, rows)
    whole, nothing = slice(rows), slice(0)
    return (nothing, whole) if batch % 2 else (whole, nothing)
