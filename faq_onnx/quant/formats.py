"""The one table of what operators and execution providers can store and run fast.

Measured on onnxruntime 1.31.1: com.microsoft.MatMulNBits and GatherBlockQuantized keep 2, 4 or
8 bits per code in blocks of 16 to 256; what is fast depends on provider and accuracy_level.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.config import BlockScales
from faq_onnx.errors import UnsupportedFormatError

__all__ = [
    "BLOCK_SIZES",
    "CODE_BITS",
    "PROVIDERS",
    "Provider",
    "ProviderLimits",
    "block_format",
    "check_embedding_format",
    "check_format",
    "slow_path_reason",
    "storage_bits_for",
]

STORAGE_BITS_OF: Mapping[int, int] = MappingProxyType({2: 2, 3: 4, 4: 4, 8: 8})
CODE_BITS = tuple(STORAGE_BITS_OF)
BLOCK_SIZES = (16, 32, 64, 128, 256)
FAST_2BIT_BLOCKS = (32, 64, 128)  # onnxruntime has no 2-bit kernel for 16 and 256


class Provider(StrEnum):
    """Execution providers that run MatMulNBits."""

    CPU = "cpu"
    CUDA = "cuda"
    DIRECTML = "directml"
    QNN = "qnn"
    WEBGPU = "webgpu"


@dataclasses.dataclass(frozen=True)
class ProviderLimits:
    """What one provider accepts.

    Attributes:
        storage_bits: Bits per code.
        block_sizes: Block sizes.
        ragged: K need not be a multiple of the block size.
        gathers: Runs GatherBlockQuantized, so embeddings can be low-bit.
    """

    storage_bits: tuple[int, ...] = (2, 4, 8)
    block_sizes: tuple[int, ...] = BLOCK_SIZES
    ragged: bool = True
    gathers: bool = True


PROVIDERS: Mapping[Provider, ProviderLimits] = MappingProxyType(
    {
        Provider.CPU: ProviderLimits(),
        Provider.CUDA: ProviderLimits(storage_bits=(4, 8)),
        Provider.DIRECTML: ProviderLimits(storage_bits=(4, 8), ragged=False),
        Provider.QNN: ProviderLimits(ragged=False, gathers=False),
        Provider.WEBGPU: ProviderLimits(),
    }
)


def storage_bits_for(code_bits: int) -> int:
    """Bits per code in the file: 3-bit codes take 4.

    Raises:
        UnsupportedFormatError: For other widths than 2, 3, 4 and 8.
    """
    if code_bits not in STORAGE_BITS_OF:
        msg = f"bits={code_bits} cannot be stored by MatMulNBits; choose one of {_list(CODE_BITS)}"
        raise UnsupportedFormatError(msg)
    return STORAGE_BITS_OF[code_bits]


def block_format(
    code_bits: int, block_size: int, symmetric: bool, block_scales: BlockScales = "float"
) -> BlockFormat:
    """The block format of a bit width and block size.

    Scales of lpbq are for codes stored in 4 bits; others keep floats.

    Raises:
        UnsupportedFormatError: If no kernel stores it.
    """
    storage_bits = storage_bits_for(code_bits)
    if block_scales == "lpbq" and storage_bits != 4:
        block_scales = "float"
    if block_size not in BLOCK_SIZES:
        near = [size for size in BLOCK_SIZES if size / 2 < block_size < size * 2]
        choice = " or ".join(str(size) for size in near) or f"one of {_list(BLOCK_SIZES)}"
        msg = f"block_size={block_size} is not a block size of MatMulNBits; choose {choice}"
        raise UnsupportedFormatError(msg)
    return BlockFormat(
        code_bits=code_bits,
        storage_bits=storage_bits,
        block_size=block_size,
        symmetric=symmetric,
        block_scales=block_scales,
    )


def check_format(
    fmt: BlockFormat, *, in_features: int, site: str, provider: Provider = Provider.CPU
) -> None:
    """Refuse a format that `provider` cannot run for a site.

    Raises:
        UnsupportedFormatError: Names the site, what was found, and what to choose.
    """
    limits = PROVIDERS[provider]
    name = provider.value
    if fmt.storage_bits not in limits.storage_bits:
        msg = (
            f"{site}: {name} does not run {fmt.storage_bits}-bit MatMulNBits; "
            f"choose one of {_list(limits.storage_bits)} bits"
        )
        raise UnsupportedFormatError(msg)
    if fmt.block_size not in limits.block_sizes:
        msg = (
            f"{site}: {name} does not run block_size={fmt.block_size}; "
            f"choose one of {_list(limits.block_sizes)}"
        )
        raise UnsupportedFormatError(msg)
    if in_features % fmt.block_size and not limits.ragged:
        fitting = [size for size in limits.block_sizes if in_features % size == 0]
        way_out = f"choose {_list(fitting)}" if fitting else "exclude the site"
        msg = (
            f"{site}: K={in_features} is not a multiple of block_size={fmt.block_size}, which "
            f"{name} requires; {way_out}"
        )
        raise UnsupportedFormatError(msg)


def check_embedding_format(
    fmt: BlockFormat, *, width: int, embedding: str, provider: Provider = Provider.CPU
) -> None:
    """Refuse a format that GatherBlockQuantized cannot hold for a table of `width` columns.

    Raises:
        UnsupportedFormatError: Names the table and the way out.
    """
    if not PROVIDERS[provider].gathers:
        msg = (
            f"{embedding}: {provider.value} has no GatherBlockQuantized; keep the embedding float"
        )
        raise UnsupportedFormatError(msg)
    # a padded last block would make the packed row longer than the operator expects
    if width % fmt.block_size:
        fitting = [size for size in BLOCK_SIZES if width % size == 0]
        way_out = f"choose block_size {_list(fitting)}, or keep" if fitting else "keep"
        msg = (
            f"{embedding}: width {width} is not a multiple of block_size={fmt.block_size}; "
            f"{way_out} the embedding float"
        )
        raise UnsupportedFormatError(msg)


def slow_path_reason(
    storage_bits: int, block_size: int, accuracy_level: int, *, float_zero_point: bool = False
) -> str:
    """Why the CPU provider dequantizes the whole weight on every call; "" if it does not."""
    if float_zero_point:
        return "float zero points have no kernel; store uint8 zero points"
    if storage_bits == 4:
        return ""
    if accuracy_level != 4:
        return f"{storage_bits}-bit kernels need accuracy_level=4, got {accuracy_level}"
    if storage_bits == 2 and block_size not in FAST_2BIT_BLOCKS:
        return f"2-bit kernels exist for block_size {_list(FAST_2BIT_BLOCKS)}, got {block_size}"
    return ""


def _list(values: tuple[int, ...] | list[int]) -> str:
    return ", ".join(str(value) for value in values)
