"""What an execution provider would not run, by the table of `faq_onnx.quant.formats`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.artifacts.target import PlannedWeight, Refusal
from faq_onnx.quant.formats import PROVIDERS, Provider, ProviderLimits

__all__ = ["nearest", "provider_refusals"]


def provider_refusals(weight: PlannedWeight, provider: Provider) -> tuple[Refusal, ...]:
    """Why a provider has no kernel for a weight of that format; a float one is never refused."""
    if weight.format is None:
        return ()
    refusal = _refusal(weight, weight.format, PROVIDERS[provider], provider.value)
    return () if refusal is None else (refusal,)


def nearest(value: int, allowed: Sequence[int]) -> int:
    """The allowed number nearest to a wish, the smaller one of two."""
    return min(allowed, key=lambda each: (abs(each - value), each))


def _refusal(
    weight: PlannedWeight, fmt: BlockFormat, limits: ProviderLimits, name: str
) -> Refusal | None:
    if weight.kind == "embedding" and not limits.gathers:
        return Refusal(
            place=weight.place,
            found=f"an embedding in {fmt.storage_bits} bits",
            allowed=f"float ones: {name} has no GatherBlockQuantized",
            way_out="--embedding keep",
        )
    if fmt.storage_bits not in limits.storage_bits:
        return Refusal(
            place=weight.place,
            found=f"{fmt.storage_bits} bits",
            allowed=_words(limits.storage_bits),
            way_out=f"--bits {nearest(fmt.storage_bits, limits.storage_bits)}",
        )
    if fmt.block_size not in limits.block_sizes:
        return Refusal(
            place=weight.place,
            found=f"blocks of {fmt.block_size}",
            allowed=_words(limits.block_sizes),
            way_out=f"--block-size {nearest(fmt.block_size, limits.block_sizes)}",
        )
    ragged = limits.ragged and weight.kind == "linear"
    if weight.width % fmt.block_size == 0 or ragged:
        return None
    fitting = [size for size in limits.block_sizes if weight.width % size == 0]
    way_out = f"--exclude {_pattern(weight.place)!r}"
    if weight.kind == "embedding":
        way_out = "--embedding keep"
    if fitting:
        way_out = f"--block-size {nearest(fmt.block_size, fitting)}"
    return Refusal(
        place=weight.place,
        found=f"K={weight.width}, which is no multiple of the block size {fmt.block_size}",
        allowed=f"block sizes {_words(fitting)}" if fitting else "a float weight",
        way_out=way_out,
    )


def _pattern(place: str) -> str:
    """Of the same weight in every layer, so that one option says it for all."""
    return re.sub(r"(?<=\.)\d+(?=[./])", "*", place)


def _words(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
