"""Byte layout of MatMulNBits and GatherBlockQuantized: pack and unpack codes.

No rounding happens here; see quant.uniform. Low bits come first: with 4 bits, byte j of a row
holds `codes[2j] | codes[2j + 1] << 4`; a row always starts on a byte.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from faq_onnx.errors import UnsupportedFormatError

__all__ = ["pack_codes", "packed_width", "unpack_codes"]

STORAGE_BITS = (2, 4, 8)


def packed_width(count: int, storage_bits: int) -> int:
    """Bytes that hold `count` codes of `storage_bits` bits, the last byte padded."""
    return -(-count * _checked(storage_bits) // 8)


def pack_codes(codes: npt.NDArray[np.uint8], storage_bits: int) -> npt.NDArray[np.uint8]:
    """Pack the last axis into bytes.

    Args:
        codes: uint8 [..., count], each below 2**storage_bits (higher bits are cut off).
        storage_bits: 2, 4 or 8.

    Returns:
        uint8 [..., ceil(count * storage_bits / 8)], contiguous; unused bits are zero.

    Raises:
        UnsupportedFormatError: For other bit widths.
    """
    width = packed_width(codes.shape[-1], storage_bits)
    if storage_bits == 8:
        return np.ascontiguousarray(codes)
    per_byte = 8 // storage_bits
    mask = np.uint8((1 << storage_bits) - 1)
    packed = np.zeros((*codes.shape[:-1], width), np.uint8)
    for position in range(per_byte):
        lane = codes[..., position::per_byte] & mask
        packed[..., : lane.shape[-1]] |= lane << np.uint8(position * storage_bits)
    return packed


def unpack_codes(
    packed: npt.NDArray[np.uint8], storage_bits: int, count: int
) -> npt.NDArray[np.uint8]:
    """Undo `pack_codes`.

    Args:
        packed: uint8 [..., bytes].
        storage_bits: 2, 4 or 8.
        count: Codes per row; the padding behind them is dropped.

    Returns:
        uint8 [..., count], contiguous.

    Raises:
        UnsupportedFormatError: For other bit widths, or a row that is too short.
    """
    if packed.shape[-1] < packed_width(count, storage_bits):
        msg = (
            f"packed rows have {packed.shape[-1]} bytes, but {count} codes of {storage_bits} "
            f"bits need {packed_width(count, storage_bits)}"
        )
        raise UnsupportedFormatError(msg)
    if storage_bits == 8:
        return np.ascontiguousarray(packed[..., :count])
    per_byte = 8 // storage_bits
    mask = np.uint8((1 << storage_bits) - 1)
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * per_byte), np.uint8)
    for position in range(per_byte):
        codes[..., position::per_byte] = (packed >> np.uint8(position * storage_bits)) & mask
    return np.ascontiguousarray(codes[..., :count])


def _checked(storage_bits: int) -> int:
    if storage_bits not in STORAGE_BITS:
        msg = (
            f"storage_bits={storage_bits}: MatMulNBits and GatherBlockQuantized store 2, 4 or 8 "
            "bits per code; 3-bit codes go into 4-bit storage"
        )
        raise UnsupportedFormatError(msg)
    return storage_bits
