"""Orthogonal rotations of a weight's input and output channels, in float64.

No graph here. The rotations are those of QuaRot (arXiv 2404.00456, sections 3 and 4) that cost
nothing when the model runs: x -> x Q for everything on the residual stream, v -> v O_h for the
values of each key/value head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

__all__ = ["HeadRotation", "RowRotation", "StreamRotation", "rotate_weight"]

Array = npt.NDArray[np.float32]
Exact = npt.NDArray[np.float64]

_LARGEST_FACTOR = 64  # of a Hadamard matrix: larger ones are products of these, and faster so
_CHUNK_ROWS = 4096  # of a weight in float64 at a time


class RowRotation(Protocol):
    """Multiplies the channels of each row by an orthogonal matrix."""

    def rotate(self, rows: npt.NDArray[np.floating]) -> Exact:
        """Rows [..., width], each times the matrix."""


@dataclasses.dataclass(frozen=True, eq=False)
class StreamRotation:
    """x -> x Q with a randomised Hadamard matrix Q [width, width].

    width = m 2^a with m odd, and Q = diag(signs) (R (x) H): R a random orthogonal matrix [m, m]
    (of Haar's measure), H Sylvester's Hadamard matrix over 2^(a/2), itself a Kronecker product of
    factors of at most 64.

    Attributes:
        signs: +1 or -1 for each channel, [width].
        factors: Orthogonal matrices whose Kronecker product follows; their sizes multiply to
            width.
    """

    signs: Exact
    factors: tuple[Exact, ...]

    @classmethod
    def random(cls, width: int, rng: np.random.Generator) -> Self:
        """A rotation drawn by `rng`."""
        power = width & -width  # the largest power of two that divides it
        signs = rng.choice((-1.0, 1.0), width)
        factors = [_random_orthogonal(width // power, rng)] if power < width else []
        while power > 1:
            size = min(power, _LARGEST_FACTOR)
            factors.append(_hadamard(size))
            power //= size
        return cls(signs, tuple(factors))

    def rotate(self, rows: npt.NDArray[np.floating]) -> Exact:
        """Rows [..., width] times Q."""
        sizes = (len(factor) for factor in self.factors)
        signed: Exact = np.multiply(rows, self.signs, dtype=np.float64)
        mixed = signed.reshape(-1, *sizes)
        for axis, factor in enumerate(self.factors, start=1):
            mixed = np.moveaxis(np.tensordot(mixed, factor, axes=(axis, 0)), -1, axis)
        rotated: Exact = mixed.reshape(rows.shape)
        return rotated


@dataclasses.dataclass(frozen=True, eq=False)
class HeadRotation:
    """v -> v O_h on the channels of each head; other channels stay.

    Attributes:
        matrices: O [kv_heads, head_dim, head_dim], orthogonal.
        repeats: Heads next to each other that take the same matrix: query heads of one key/value
            head where the rows are what attention returns, 1 where they are values.
        start: Channel at which the heads begin.
    """

    matrices: Exact
    repeats: int = 1
    start: int = 0

    @classmethod
    def random(cls, kv_heads: int, head_dim: int, rng: np.random.Generator) -> Self:
        """Rotations of values, drawn by `rng`."""
        unit = np.eye(head_dim)
        rotations = [StreamRotation.random(head_dim, rng).rotate(unit) for _ in range(kv_heads)]
        return cls(np.stack(rotations))

    def rotate(self, rows: npt.NDArray[np.floating]) -> Exact:
        """Rows [..., channels], each head times its matrix."""
        heads, width, _ = self.matrices.shape
        end = self.start + heads * self.repeats * width
        result = rows.astype(np.float64)
        values = result[..., self.start : end].reshape(-1, heads, self.repeats, width)
        by_head = values.transpose(1, 0, 2, 3).reshape(heads, -1, width) @ self.matrices
        turned = by_head.reshape(heads, -1, self.repeats, width).transpose(1, 0, 2, 3)
        result[..., self.start : end] = turned.reshape(*rows.shape[:-1], end - self.start)
        return result


def rotate_weight(
    weight: Array,
    *,
    gain: Exact | None = None,
    inputs: RowRotation | None = None,
    outputs: RowRotation | None = None,
) -> Array:
    """W of y = x W^T in rotated coordinates: P^T (W diag(gain)) Q, rounded once.

    With x' = (x / gain) Q and y' = y P, y' = x' W'^T holds for this W'.

    Args:
        weight: float32 [N, K].
        gain: Of the norm that makes x, folded into the weight; [K].
        inputs: Q, over K.
        outputs: P, over N.

    Returns:
        float32 [N, K].
    """

    def read(rows: npt.NDArray[np.floating]) -> Exact:
        scaled = rows.astype(np.float64) if gain is None else np.multiply(rows, gain)
        return scaled if inputs is None else inputs.rotate(scaled)

    if outputs is None:
        return _by_rows(weight, read)
    if inputs is None and gain is None:
        return _by_rows(weight.T, outputs.rotate).T
    return outputs.rotate(read(weight).T).T.astype(np.float32)


def _by_rows(weight: Array, function: Callable[[Array], Exact]) -> Array:
    """Apply `function` to the rows of a matrix, not to all of them at once in float64."""
    result = np.empty(weight.shape, np.float32)
    for start in range(0, len(weight), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        result[rows] = function(weight[rows])
    return result


def _hadamard(size: int) -> Exact:
    """Sylvester's Hadamard matrix of a power of two, divided by sqrt(size)."""
    step = np.array(((1.0, 1.0), (1.0, -1.0)))
    matrix: Exact = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(matrix, step)
    scaled: Exact = matrix / np.sqrt(size)
    return scaled


def _random_orthogonal(size: int, rng: np.random.Generator) -> Exact:
    """Drawn from Haar's measure: QR of a Gaussian, the diagonal of R made positive."""
    found, triangle = np.linalg.qr(rng.normal(size=(size, size)))
    return np.asarray(found * np.sign(np.diag(triangle)), np.float64)
