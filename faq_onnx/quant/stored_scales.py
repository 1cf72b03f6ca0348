"""Scales of blocks as the file holds them: a float each, or a small multiple of one unit a row.

At 4 bits in blocks of 32 a float32 scale costs a bit a weight, a byte costs a quarter of it: the
second level of quantization of QLoRA ("double quantization", Dettmers et al. 2023) and of
llama.cpp's k-quants. It costs next to nothing: the loss is flat around a block's best scale, and
codes are chosen after scales were rounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat

__all__ = ["LPBQ_MULTIPLES", "ScaleUnit", "storable_scale"]

Floats = npt.NDArray[np.float32]

BYTE_MULTIPLES, SIGNED_BYTE_MULTIPLES = 255, 127
# Of Qualcomm's low-power block quantization: its kernel multiplies by 1 to 16, and has no signs.
LPBQ_MULTIPLES = 16
# Searches and refits also look at scales above the one that covers the block. Sixteen multiples
# are too few for that.
HEADROOM = np.float32(1.2)


@dataclasses.dataclass(frozen=True)
class ScaleUnit:
    """What the scales of a row are multiples of.

    Attributes:
        values: In the dtype of the model's activations, [N, 1], > 0.
        largest: Largest multiple; the smallest is 1. Symmetric formats have multiples of both
            signs, unless their scales are lpbq's.
    """

    values: npt.NDArray[np.floating]
    largest: int

    @classmethod
    def of(cls, scale: Floats, fmt: BlockFormat, dtype: npt.DTypeLike) -> ScaleUnit | None:
        """Units under which scales [N, k_blocks], and somewhat larger ones, can be stored.

        None where the format stores scales as they are.
        """
        if fmt.block_scales == "float":
            return None
        largest = np.float32(_largest(fmt))
        part = (np.float32(1) if largest == LPBQ_MULTIPLES else HEADROOM) / largest
        unit = np.abs(scale).max(axis=1, keepdims=True) * part
        return cls.stored(storable_scale(unit, dtype).astype(dtype), fmt)

    @classmethod
    def stored(cls, values: npt.NDArray[np.floating], fmt: BlockFormat) -> ScaleUnit:
        """Units [N, 1] as a weight of that format has them."""
        return cls(values, _largest(fmt))

    @classmethod
    def join(cls, units: Sequence[ScaleUnit | None]) -> ScaleUnit | None:
        """Units of consecutive rows as one; None where there are none."""
        found = [unit for unit in units if unit is not None]
        if not found:
            return None
        return cls(np.concatenate([unit.values for unit in found]), found[0].largest)

    def rows(self, rows: slice | npt.NDArray[np.intp]) -> ScaleUnit:
        """Units of some rows."""
        return ScaleUnit(self.values[rows], self.largest)

    def round(self, scale: Floats) -> Floats:
        """Nearest storable scales, float32: of whole rows [N, k_blocks], or of one block [N]."""
        unit = self._beside(scale)
        multiple = np.clip(np.rint(np.abs(scale) / unit), np.float32(1), np.float32(self.largest))
        negative = (scale < 0) & (self.largest != LPBQ_MULTIPLES)  # -0 is not: a block of zeros
        return self._value(np.where(negative, -multiple, multiple), unit)

    def multiples(self, scale: Floats) -> npt.NDArray[Any]:
        """Integers that rounded scales [N, k_blocks] stand for: uint8, or int8 where they fit."""
        dtype = np.uint8 if self.largest == BYTE_MULTIPLES else np.int8
        multiples: npt.NDArray[Any] = np.rint(scale / self._beside(scale)).astype(dtype)
        return multiples

    def scales(self, multiples: npt.NDArray[Any]) -> Floats:
        """What `multiples` stand for, float32 [N, k_blocks], as the graph computes it."""
        whole = multiples.astype(np.float32)
        return self._value(whole, self._beside(whole))

    def _beside(self, scale: Floats) -> Floats:
        units = self.values if scale.ndim > 1 else self.values[:, 0]
        return units.astype(np.float32)

    def _value(self, multiple: Floats, unit: Floats) -> Floats:
        value: Floats = (multiple * unit).astype(self.values.dtype).astype(np.float32)
        return value


def _largest(fmt: BlockFormat) -> int:
    if fmt.block_scales == "lpbq":
        return LPBQ_MULTIPLES
    return SIGNED_BYTE_MULTIPLES if fmt.symmetric else BYTE_MULTIPLES


def storable_scale(
    scale: Floats, scale_dtype: npt.DTypeLike, unit: ScaleUnit | None = None
) -> Floats:
    """Round scales to what is stored, keeping them finite, off zero and invertible."""
    if unit is not None:
        return unit.round(scale)
    dtype = np.dtype(scale_dtype)
    limits = np.finfo(np.float16 if dtype == np.float16 else np.float32)
    largest = np.float32(limits.max)
    # float32: 1 / subnormal overflows, so stop at the smallest normal number
    smallest = np.float32(
        limits.smallest_subnormal if dtype == np.float16 else limits.smallest_normal
    )
    magnitude = np.clip(np.abs(scale), smallest, largest)
    rounded = np.copysign(magnitude, scale).astype(dtype).astype(np.float32)
    return np.where(scale == 0, np.float32(1), rounded)
