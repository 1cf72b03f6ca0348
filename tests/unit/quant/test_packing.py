"""Byte layout of packed codes."""

from __future__ import annotations

import numpy as np
import pytest

from faq_onnx.errors import UnsupportedFormatError
from faq_onnx.quant.packing import pack_codes, packed_width, unpack_codes


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (2, [3, 0, 1, 2], [0b10_01_00_11]),
        (2, [1, 2, 3, 0, 3], [0b00_11_10_01, 0b11]),
        (4, [1, 2, 15, 0], [0x21, 0x0F]),
        (4, [7, 8, 9], [0x87, 0x09]),
        (8, [0, 255, 7], [0, 255, 7]),
    ],
)
def test_low_bits_come_first(bits: int, codes: list[int], packed: list[int]) -> None:
    result = pack_codes(np.array([codes], np.uint8), bits)
    assert result.tolist() == [packed]


def test_every_row_starts_on_a_byte() -> None:
    packed = pack_codes(np.array([[1, 2, 3], [4, 5, 6]], np.uint8), 4)
    assert packed.tolist() == [[0x21, 0x03], [0x54, 0x06]]


def test_codes_that_are_too_large_do_not_reach_their_neighbours() -> None:
    assert pack_codes(np.array([[0xF1, 0x02]], np.uint8), 4).tolist() == [[0x21]]


def test_unpacking_drops_the_padding() -> None:
    packed = np.array([[0x21, 0xF3]], np.uint8)
    assert unpack_codes(packed, 4, 3).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("bits", [0, 1, 3, 5, 6, 7, 16])
def test_other_widths_are_refused_with_the_way_out(bits: int) -> None:
    with pytest.raises(UnsupportedFormatError, match=f"storage_bits={bits}.*2, 4 or 8"):
        pack_codes(np.zeros((1, 8), np.uint8), bits)
    with pytest.raises(UnsupportedFormatError, match=f"storage_bits={bits}"):
        unpack_codes(np.zeros((1, 8), np.uint8), bits, 8)


def test_rows_that_are_too_short_are_refused() -> None:
    with pytest.raises(UnsupportedFormatError, match=r"have 2 bytes.*need 3"):
        unpack_codes(np.zeros((1, 2), np.uint8), 4, 5)


def test_width_rounds_up_to_bytes() -> None:
    assert [packed_width(count, 2) for count in (0, 1, 4, 5)] == [0, 1, 1, 2]
