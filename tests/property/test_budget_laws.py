"""Laws of bit allocation, against brute force over every combination."""

from __future__ import annotations

import itertools
import math
import re
from typing import get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from faq_onnx.config import BlockScales
from faq_onnx.errors import PlanError
from faq_onnx.planning.budget import (
    Allocation,
    Budget,
    BudgetItem,
    BudgetKind,
    Candidate,
    allocate,
)
from faq_onnx.quant.formats import BLOCK_SIZES, CODE_BITS, block_format
from faq_onnx.quant.uniform import quantize_rtn

pytestmark = pytest.mark.property
FEW = settings(max_examples=150, deadline=None)
EXACT = 1e-9  # sums of at most 5 numbers below 100 are exact to 1e-13

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        format=st.none(),
        bytes=st.integers(1, 60),
        kl=st.integers(0, 1000).map(lambda n: n / 100),
    ),
    min_size=1,
    max_size=5,
)


@st.composite
def item_lists(draw: st.DrawFn) -> list[BudgetItem]:
    """One to five items of one to five candidates, in any order, dominated ones among them."""
    found = draw(st.lists(CANDIDATES, min_size=1, max_size=5))
    return [
        BudgetItem(f"item{n}", draw(st.integers(8, 60)), tuple(candidates))
        for n, candidates in enumerate(found)
    ]


def _totals(items: list[BudgetItem]) -> list[tuple[int, float]]:
    """(bytes, kl) of every combination."""
    return [
        (sum(c.bytes for c in choice), math.fsum(c.kl for c in choice))
        for choice in itertools.product(*(item.candidates for item in items))
    ]


def _kl_gap(found: Allocation, room: int) -> float:
    """KL that the best choice may be below ours: the last hull step that did not fit."""
    points = [point for point in found.curve if point.bytes > room]
    before = [point for point in found.curve if point.bytes <= room]
    return before[-1].kl - points[0].kl if points else 0.0


@FEW
@given(item_lists(), st.integers(1, 320))
def test_size_is_kept_and_kl_is_near_the_best(items: list[BudgetItem], room: int) -> None:
    possible = [total for total in _totals(items) if total[0] <= room]
    budget = Budget(BudgetKind.BYTES, room)
    if not possible:
        with pytest.raises(PlanError, match="smallest possible"):
            allocate(items, budget)
        return
    found = allocate(items, budget)
    best = min(kl for _, kl in possible)
    assert found.total.bytes <= room
    assert best - EXACT <= found.total.kl <= best + _kl_gap(found, room) + EXACT


@FEW
@given(item_lists(), st.floats(0.01, 60))
def test_kl_is_kept_and_size_is_near_the_least(items: list[BudgetItem], limit: float) -> None:
    possible = [total for total in _totals(items) if total[1] <= limit]
    if not possible:
        with pytest.raises(PlanError, match="smallest possible"):
            allocate(items, Budget(BudgetKind.KL, limit))
        return
    found = allocate(items, Budget(BudgetKind.KL, limit))
    assert found.total.kl <= limit * (1 + EXACT)
    reached = next(n for n, p in enumerate(found.curve) if p.kl <= limit)
    gap = found.curve[reached].bytes - found.curve[reached - 1].bytes if reached else 0
    least = min(size for size, _ in possible)
    assert least <= found.total.bytes <= least + gap


@FEW
@given(item_lists(), st.floats(0.5, 60))
def test_bits_add_up_to_the_budget(items: list[BudgetItem], bits: float) -> None:
    weights = sum(item.weights for item in items)
    smallest = min(size for size, _ in _totals(items))
    assume(8 * smallest / weights <= bits)
    found = allocate(items, Budget(BudgetKind.BITS_PER_WEIGHT, bits))
    assert found.total.bytes == sum(choice.bytes for choice in found.choice.values())
    assert found.total.kl == math.fsum(choice.kl for choice in found.choice.values())
    assert 8 * found.total.bytes / weights == found.total.bpw <= bits
    # nothing that still fits would help
    for item in items:
        own = found.choice[item.name]
        for other in item.candidates:
            total = found.total.bytes - own.bytes + other.bytes
            assert other.kl >= own.kl or 8 * total / weights > bits


@FEW
@given(item_lists(), st.integers(1, 320), st.integers(1, 320))
def test_curve_falls_and_is_optimal_at_its_sizes(
    items: list[BudgetItem], first: int, second: int
) -> None:
    totals = _totals(items)
    smallest = min(size for size, _ in totals)
    found = allocate(items, Budget(BudgetKind.BYTES, smallest + first))
    for low, high in itertools.pairwise(found.curve):
        assert low.bytes < high.bytes
        assert low.kl > high.kl
    for point in found.curve:
        best = min(kl for size, kl in totals if size <= point.bytes)
        assert point.kl == pytest.approx(best, abs=EXACT)
    assert found.curve == allocate(items, Budget(BudgetKind.BYTES, smallest + second)).curve


@FEW
@given(item_lists(), st.integers(1, 320))
def test_order_of_candidates_does_not_matter(items: list[BudgetItem], room: int) -> None:
    assume(min(size for size, _ in _totals(items)) <= room)
    budget = Budget(BudgetKind.BYTES, room)
    turned = [BudgetItem(i.name, i.weights, i.candidates[::-1]) for i in items]
    first, second = allocate(items, budget), allocate(turned, budget)
    assert first == allocate(items, budget)
    assert first.curve == second.curve
    assert first.total.bytes == second.total.bytes
    assert first.total.kl == pytest.approx(second.total.kl, abs=EXACT)


@FEW
@given(item_lists(), st.sampled_from(BudgetKind))
def test_the_smallest_value_in_the_message_can_be_met(
    items: list[BudgetItem], kind: BudgetKind
) -> None:
    try:
        allocate(items, Budget(kind, 1e-9))
    except PlanError as error:
        shown = re.search(r"value is (\S+)", str(error))
        assert shown is not None
        allocate(items, Budget.parse(shown[1]))


@FEW
@given(
    st.integers(1, 5),
    st.integers(1, 300),
    st.sampled_from(CODE_BITS),
    st.sampled_from(BLOCK_SIZES),
    st.booleans(),
    st.sampled_from([np.float32, np.float16]),
    st.sampled_from(get_args(BlockScales)),
)
def test_weight_bytes_are_those_of_a_quantized_weight(  # noqa: PLR0913, PLR0917
    rows: int,
    columns: int,
    bits: int,
    block: int,
    symmetric: bool,
    dtype: type,
    scales: BlockScales,
) -> None:
    fmt = block_format(bits, block, symmetric, scales)
    weight = np.random.default_rng(columns).normal(size=(rows, columns))
    packed = quantize_rtn(weight, fmt, dtype)
    assert fmt.weight_bytes(rows, columns, np.dtype(dtype).itemsize) == packed.size_bytes
