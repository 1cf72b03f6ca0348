"""Which low-bit formats have a fast kernel on the CPU of a phone.

Measured with onnxruntime 1.31.1 for aarch64 on emulated CPUs (tests/e2e/test_ort_mobile.py does it
again): with the dot product instructions (Armv8.2, phones since about 2018) as on x86; without
them, such as Cortex-A72, only 4 bits. What has no kernel is dequantized on every call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from faq_onnx.artifacts.target import FactTable, ModelOutline, PlannedWeight
from faq_onnx.quant.formats import slow_path_reason

__all__ = ["phone_notes", "phone_table", "slow_reason"]


def slow_reason(
    storage_bits: int,
    block_size: int,
    accuracy_level: int,
    *,
    dot_product: bool,
    float_zero_point: bool = False,
) -> str:
    """Why a phone dequantizes the whole weight on every call; "" if it does not."""
    reason = slow_path_reason(
        storage_bits, block_size, accuracy_level, float_zero_point=float_zero_point
    )
    if reason or dot_product or storage_bits == 4:
        return reason
    return f"{storage_bits}-bit kernels need dot product instructions"


def phone_table(outline: ModelOutline) -> FactTable:
    """A row for each format of the products: how many, and whether they are fast."""
    rows = [
        (
            f"{bits} bits, blocks of {block}, accuracy level {level}",
            count,
            slow_reason(bits, block, level, dot_product=True, float_zero_point=floats) or "fast",
            slow_reason(bits, block, level, dot_product=False, float_zero_point=floats) or "fast",
        )
        for (bits, block, level, floats), count in sorted(_formats(outline).items())
    ]
    header = ("format", "products", "phone with dot product", "phone without")
    return FactTable(title="kernels on the CPU of a phone", header=header, rows=tuple(rows))


def phone_notes(outline: ModelOutline) -> Iterator[str]:
    """A warning for each reason to be slow."""
    for dot_product in (True, False):
        where = "any phone" if dot_product else "phones without dot product instructions"
        reasons: dict[str, list[str]] = {}
        for weight in _products(outline):
            reason = _reason(weight, dot_product=dot_product)
            if reason and not (not dot_product and _reason(weight, dot_product=True)):
                reasons.setdefault(reason, []).append(weight.place)
        for reason, places in reasons.items():
            others = f" and {len(places) - 1} more" if len(places) > 1 else ""
            yield f"slow on {where}: {places[0]}{others}: {reason}; 4 bits are fast everywhere"


def _products(outline: ModelOutline) -> Iterator[PlannedWeight]:
    return (w for w in outline.weights if w.kind == "linear" and w.format is not None)


def _formats(outline: ModelOutline) -> Counter[tuple[int, int, int, bool]]:
    return Counter(_layout(weight) for weight in _products(outline))


def _layout(weight: PlannedWeight) -> tuple[int, int, int, bool]:
    assert weight.format is not None
    fmt = weight.format
    return fmt.storage_bits, fmt.block_size, weight.accuracy_level, weight.float_zero_points


def _reason(weight: PlannedWeight, *, dot_product: bool) -> str:
    bits, block, level, floats = _layout(weight)
    return slow_reason(bits, block, level, dot_product=dot_product, float_zero_point=floats)
