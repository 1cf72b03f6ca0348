"""What a budget may look like, and what it chooses in cases that can be seen at a glance."""

from __future__ import annotations

import pytest

from faq_onnx.errors import ConfigError, PlanError
from faq_onnx.planning.budget import (
    Budget,
    BudgetItem,
    BudgetKind,
    Candidate,
    SameSize,
    allocate,
    parse_budget,
)


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        ("3.0bpw", BudgetKind.BITS_PER_WEIGHT, 3.0),
        (" 2.5 BPW ", BudgetKind.BITS_PER_WEIGHT, 2.5),
        ("80MB", BudgetKind.BYTES, 80e6),
        ("1.5GB", BudgetKind.BYTES, 1.5e9),
        ("64MiB", BudgetKind.BYTES, 64 * 2**20),
        ("900kB", BudgetKind.BYTES, 900e3),
        (".5KiB", BudgetKind.BYTES, 512),
        ("kl<=0.05", BudgetKind.KL, 0.05),
        ("KL < 1e-3", BudgetKind.KL, 1e-3),
    ],
)
def test_budgets_are_read(text: str, kind: BudgetKind, limit: float) -> None:
    budget = parse_budget(text)
    assert budget == Budget(kind, limit)
    again = Budget.parse(str(budget))
    assert again.kind is kind
    assert again.limit == pytest.approx(limit, rel=1e-5)  # six digits are shown


@pytest.mark.parametrize(
    "text", ["", "3", "bpw", "0bpw", "-1MB", "80 M", "80TB", "kl=0.1", "kl<=0", "1e999bpw", "3bit"]
)
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_budget(text)
    for part in (repr(text), "3.0bpw", "80MB", "kl<=0.05", "same: as large as without a budget"):
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["same", " Same "])
def test_the_same_size_is_a_wish_of_its_own(text: str) -> None:
    assert parse_budget(text) == SameSize()
    assert parse_budget(str(parse_budget(text))) == SameSize()


def test_a_size_is_shown_behind_the_wish_that_it_was_found_from() -> None:
    found = Budget(BudgetKind.BYTES, 5, wish="same")
    with pytest.raises(PlanError, match=r"--budget same \(5e-06MB\) cannot be met"):
        allocate(ITEMS, found, fixed_bytes=4)


def _item(name: str, *candidates: tuple[int, float]) -> BudgetItem:
    return BudgetItem(name, 8, tuple(Candidate(None, size, kl) for size, kl in candidates))


ITEMS = [
    _item("tough", (2, 1.0), (4, 0.2), (8, 0.01)),
    _item("delicate", (2, 9.0), (4, 3.0), (8, 0.1)),
]


def _sizes(budget: str) -> dict[str, int]:
    return {name: c.bytes for name, c in allocate(ITEMS, Budget.parse(budget)).choice.items()}


def test_the_delicate_weight_gets_more_bits() -> None:
    # 6 bpw of 16 weights are 12 bytes: 4 + 8, not 8 + 4
    assert _sizes("6bpw") == {"tough": 4, "delicate": 8}
    assert _sizes("5bpw") == {"tough": 2, "delicate": 8}
    assert _sizes("8bpw") == {"tough": 8, "delicate": 8}


def test_size_is_least_under_a_kl() -> None:
    assert _sizes("kl<=0.31") == {"tough": 4, "delicate": 8}
    assert _sizes("kl<=1.1") == {"tough": 2, "delicate": 8}
    assert _sizes("kl<=0.2") == {"tough": 8, "delicate": 8}


def test_what_is_left_is_filled() -> None:
    # delicate has first call by KL per byte, but only tough's step fits into 7 bytes
    items = [_item("tough", (2, 1.0), (4, 0.2)), _item("delicate", (2, 9.0), (8, 0.1))]
    found = allocate(items, Budget(BudgetKind.BYTES, 7))
    assert [candidate.bytes for candidate in found.choice.values()] == [4, 2]


@pytest.mark.parametrize(
    ("budget", "shown"),
    [("1.9bpw", "2.002bpw"), ("kl<=0.1", "kl<=0.1101"), ("0.003kB", "4.004e-06MB")],
)
def test_what_cannot_be_met_says_what_can(budget: str, shown: str) -> None:
    with pytest.raises(PlanError, match=rf"{budget[:3]}.*cannot be met.*{shown}|{shown}"):
        allocate(ITEMS, Budget.parse(budget))
