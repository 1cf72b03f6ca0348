"""Block formats: what can be stored, and errors that say what to choose."""

from __future__ import annotations

import pytest

from faq_onnx.errors import UnsupportedFormatError
from faq_onnx.quant.formats import (
    BLOCK_SIZES,
    CODE_BITS,
    Provider,
    block_format,
    check_embedding_format,
    check_format,
    slow_path_reason,
)


@pytest.mark.parametrize(("code_bits", "storage_bits"), [(2, 2), (3, 4), (4, 4), (8, 8)])
def test_codes_are_stored_in_what_kernels_read(code_bits: int, storage_bits: int) -> None:
    fmt = block_format(code_bits, 32, symmetric=True)
    assert (fmt.code_bits, fmt.storage_bits) == (code_bits, storage_bits)


@pytest.mark.parametrize("bits", [1, 5, 6, 7, 16])
def test_unknown_bits_name_the_choices(bits: int) -> None:
    with pytest.raises(UnsupportedFormatError, match=f"bits={bits} .*choose one of 2, 3, 4, 8"):
        block_format(bits, 32, symmetric=False)


@pytest.mark.parametrize(
    ("block_size", "choice"),
    [
        (100, "64 or 128"),
        (8, "one of 16, 32"),
        (24, "16 or 32"),
        (512, "one of 16"),
        (0, "one of"),
    ],
)
def test_unknown_block_sizes_name_the_nearest(block_size: int, choice: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=f"block_size={block_size} .*choose {choice}"):
        block_format(4, block_size, symmetric=False)


@pytest.mark.parametrize("code_bits", CODE_BITS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_cpu_takes_every_format_and_ragged_k(code_bits: int, block_size: int) -> None:
    fmt = block_format(code_bits, block_size, symmetric=False)
    check_format(fmt, in_features=block_size + 1, site="q")


def test_qnn_refuses_ragged_k_and_says_which_blocks_fit() -> None:
    fmt = block_format(4, 128, symmetric=True)
    with pytest.raises(UnsupportedFormatError) as error:
        check_format(fmt, in_features=576, site="layer 3 q_proj", provider=Provider.QNN)
    assert str(error.value) == (
        "layer 3 q_proj: K=576 is not a multiple of block_size=128, which qnn requires; "
        "choose 16, 32, 64"
    )


def test_no_block_fits_at_all() -> None:
    fmt = block_format(4, 32, symmetric=True)
    with pytest.raises(UnsupportedFormatError, match="exclude the site"):
        check_format(fmt, in_features=7, site="q", provider=Provider.DIRECTML)


def test_directml_has_no_2_bit_kernel() -> None:
    fmt = block_format(2, 32, symmetric=True)
    with pytest.raises(UnsupportedFormatError, match="directml does not run 2-bit"):
        check_format(fmt, in_features=64, site="q", provider=Provider.DIRECTML)


def test_embeddings_need_whole_blocks() -> None:
    fmt = block_format(4, 128, symmetric=True)
    check_embedding_format(fmt, width=256, embedding="e")
    with pytest.raises(UnsupportedFormatError, match=r"width 576 .*choose block_size 16, 32, 64"):
        check_embedding_format(fmt, width=576, embedding="e")
    with pytest.raises(UnsupportedFormatError, match="qnn has no GatherBlockQuantized"):
        check_embedding_format(fmt, width=256, embedding="e", provider=Provider.QNN)


@pytest.mark.parametrize(
    ("bits", "block_size", "accuracy_level", "reason"),
    [
        (4, 16, 0, ""),
        (4, 256, 4, ""),
        (8, 16, 4, ""),
        (8, 32, 0, "accuracy_level=4"),
        (2, 64, 4, ""),
        (2, 64, 0, "accuracy_level=4"),
        (2, 16, 4, "block_size 32, 64, 128"),
        (2, 256, 4, "block_size 32, 64, 128"),
    ],
)
def test_slow_paths_have_reasons(
    bits: int, block_size: int, accuracy_level: int, reason: str
) -> None:
    found = slow_path_reason(bits, block_size, accuracy_level)
    assert reason in found
    assert bool(found) == bool(reason)


def test_float_zero_points_are_always_slow() -> None:
    assert "uint8" in slow_path_reason(4, 32, 4, float_zero_point=True)
