"""Finished low-bit weights in the byte layout of com.microsoft.MatMulNBits."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat

__all__ = ["QuantizedWeight"]


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """One weight [N, K] as MatMulNBits stores it.

    Attributes:
        out_features: N.
        in_features: K.
        format: Bits, block size, symmetry.
        packed: uint8 [N, k_blocks, block_size * storage_bits / 8], low bits first.
        scales: float32 or float16 [N, k_blocks].
        zero_points: uint8 [N, ceil(k_blocks * storage_bits / 8)] packed, None if symmetric.
    """

    out_features: int
    in_features: int
    format: BlockFormat
    packed: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.floating]
    zero_points: npt.NDArray[np.uint8] | None

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        zero_points = 0 if self.zero_points is None else self.zero_points.nbytes
        return self.packed.nbytes + self.scales.nbytes + zero_points
