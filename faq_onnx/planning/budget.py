"""Spread bits over weights: the least predicted KL under a size, or the least size under a KL.

    minimise  sum_i kl_i(f_i)   subject to   sum_i bytes_i(f_i) <= B
For a multiplier lambda each item minimises kl + lambda * bytes by itself, which walks its lower
convex hull; all lambdas together are one list of hull steps in the order of KL saved per byte
(Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988). The
prefix that fits is optimal for its own size. What is left of the budget is then filled greedily,
so the result is off the optimum by less than the first step that did not fit.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Self

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.config import SAME_SIZE, means_same_size
from faq_onnx.errors import ConfigError, PlanError

__all__ = [
    "Allocation",
    "Budget",
    "BudgetItem",
    "BudgetKind",
    "Candidate",
    "CurvePoint",
    "SameSize",
    "allocate",
    "check_size",
    "parse_budget",
    "scale_bytes_of",
    "scale_dtype_of",
]

ROUNDING = 1e-12  # sums of KL over some hundred items are this exact
SHOWN_UP = 1.001  # four digits of this much more are never less than the value itself
_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)(?:e([+-]?\d+))?"
_SIZE = re.compile(rf"{_NUMBER}\s*(bpw|[kmg]i?b)", re.IGNORECASE)
_KL = re.compile(rf"kl\s*<=?\s*{_NUMBER}", re.IGNORECASE)


class BudgetKind(StrEnum):
    """What is limited."""

    BITS_PER_WEIGHT = "bpw"
    BYTES = "bytes"
    KL = "kl"


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit.

    Attributes:
        kind: What is limited.
        limit: Bits per weight, bytes, or nats per token; above 0.
        wish: The words that this size was found from, "" where it is the wish itself.
    """

    kind: BudgetKind
    limit: float
    wish: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `3.0bpw`, `80MB` (kB, MB, GB: powers of 1000; KiB, MiB, GiB), `kl<=0.05`.

        Raises:
            ConfigError: Anything else, or a limit of 0.
        """
        wish = text.strip()
        size, kl = _SIZE.fullmatch(wish), _KL.fullmatch(wish)
        found = size or kl
        number = float(f"{found[1]}e{found[2] or 0}") if found else 0.0
        if found is None or not 0 < number < math.inf:
            msg = (
                f"--budget {text!r} is not a budget above 0; give bits per weight (3.0bpw), a "
                "size (80MB, 1.5GB, 64MiB), the largest KL divergence (kl<=0.05), or same: as "
                "large as without a budget"
            )
            raise ConfigError(msg)
        if size is None:
            return cls(BudgetKind.KL, number)
        unit = size[3].lower()
        if unit == "bpw":
            return cls(BudgetKind.BITS_PER_WEIGHT, number)
        return cls(BudgetKind.BYTES, number * _UNITS[unit])

    def __str__(self) -> str:
        """As `parse` reads it; a size that was found, behind its wish."""
        shown = {
            BudgetKind.BITS_PER_WEIGHT: f"{self.limit:g}bpw",
            BudgetKind.BYTES: f"{self.limit / 1e6:g}MB",
            BudgetKind.KL: f"kl<={self.limit:g}",
        }[self.kind]
        return f"{self.wish} ({shown})" if self.wish else shown


@dataclasses.dataclass(frozen=True)
class SameSize:
    """As large as the same settings without a budget; `FormatCandidates.limit` knows how large."""

    def __str__(self) -> str:
        """As `parse_budget` reads it."""
        return SAME_SIZE


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to store an item.

    Attributes:
        format: Block format; None is float.
        bytes: Size in the file: codes, scales and zero points.
        kl: Predicted KL at the logits, nats per token, at least 0.
    """

    format: BlockFormat | None
    bytes: int
    kl: float


@dataclasses.dataclass(frozen=True)
class BudgetItem:
    """A site, an embedding, or a table that head and embedding share.

    Attributes:
        name: Of the site, or of the embedding where no site shares its table.
        weights: Number of weights.
        candidates: At least one.
    """

    name: str
    weights: int
    candidates: tuple[Candidate, ...]


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """The best that one size allows.

    Attributes:
        bytes: Of all items.
        bpw: Bits per weight, scales and zero points included.
        kl: Predicted, summed over the items.
    """

    bytes: int
    bpw: float
    kl: float


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What every item gets.

    Attributes:
        choice: Candidate by item name.
        total: Of the choice.
        curve: Lagrangian optima from the smallest size to the smallest KL: bytes rise, KL falls.
    """

    choice: dict[str, Candidate]
    total: CurvePoint
    curve: tuple[CurvePoint, ...]


def parse_budget(text: str) -> Budget | SameSize:
    """Read `same`, or what `Budget.parse` reads.

    Raises:
        ConfigError: Anything else, or a limit of 0.
    """
    return SameSize() if means_same_size(text) else Budget.parse(text)


def scale_dtype_of(dtype: str) -> npt.DTypeLike:
    """Dtype in which the scales of a weight of that dtype are stored."""
    return np.float16 if dtype == "float16" else np.float32


def scale_bytes_of(dtype: str) -> int:
    """Bytes of a float scale of a weight of that dtype."""
    return np.dtype(scale_dtype_of(dtype)).itemsize


def check_size(
    budget: Budget, sizes: Sequence[Sequence[int]], weights: int, fixed_bytes: int = 0
) -> None:
    """What `allocate` would say of a size, without KLs: known before anything is measured.

    Args:
        budget: One of KL is never refused here.
        sizes: Bytes of the candidates of each item.
        weights: Of all items.
        fixed_bytes: As for `allocate`.

    Raises:
        PlanError: Not even the smallest candidates fit; says the smallest possible value.
    """
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    count = max(1, weights)
    smallest = CurvePoint(least, 8 * least / count, math.inf)
    _check_reachable(budget, smallest, CurvePoint(most, 8 * most / count, 0.0), fixed_bytes)


def allocate(items: Sequence[BudgetItem], budget: Budget, fixed_bytes: int = 0) -> Allocation:
    """Choose a candidate for every item; the same input always gives the same choice.

    `fixed_bytes` of a size in bytes are taken by what does not compete.

    Raises:
        PlanError: Not even the smallest candidates fit, or not even the best reach the KL; says
            the smallest possible value.
    """
    hulls = [_hull(item.candidates) for item in items]
    steps = _steps(hulls)
    weights = max(1, sum(item.weights for item in items))
    curve = _curve(hulls, steps, weights)
    _check_reachable(budget, curve[0], curve[-1], fixed_bytes)
    if budget.kind is BudgetKind.BYTES:
        budget = Budget(BudgetKind.BYTES, budget.limit - fixed_bytes)
    taken = _prefix(budget, curve)
    chosen = [hull[0] for hull in hulls]
    for step in steps[:taken]:
        chosen[step.item] = hulls[step.item][step.target]
    if budget.kind is BudgetKind.KL:
        slack = budget.limit - math.fsum(c.kl for c in chosen)
        _improve(chosen, items, slack - ROUNDING * budget.limit, _kl_for_bytes)
    else:
        room = _room(budget, weights) - sum(c.bytes for c in chosen)
        _improve(chosen, items, room, _bytes_for_kl)
    names = [item.name for item in items]
    size, kl = sum(c.bytes for c in chosen), math.fsum(c.kl for c in chosen)
    total = CurvePoint(size, 8 * size / weights, kl)
    return Allocation(dict(zip(names, chosen, strict=True)), total, tuple(curve))


@dataclasses.dataclass(frozen=True)
class _Step:
    """From one point of an item's hull to the next."""

    item: int
    target: int
    extra: int
    gain: float


def _hull(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Lower convex hull of (bytes, kl), from the smallest candidate to that of least KL."""
    ordered = sorted(candidates, key=lambda c: (c.bytes, c.kl))
    hull: list[Candidate] = []
    for point in ordered:
        if hull and (point.kl >= hull[-1].kl or point.bytes == hull[-1].bytes):
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(low: Candidate, high: Candidate) -> float:
    """KL saved per byte."""
    return (low.kl - high.kl) / (high.bytes - low.bytes)


def _steps(hulls: Sequence[Sequence[Candidate]]) -> list[_Step]:
    """All hull steps, those that save most KL per byte first; steps of one item stay in order."""
    steps = [
        _Step(i, n, hull[n].bytes - hull[n - 1].bytes, hull[n - 1].kl - hull[n].kl)
        for i, hull in enumerate(hulls)
        for n in range(1, len(hull))
    ]
    return sorted(steps, key=lambda step: (-step.gain / step.extra, step.item, step.target))


def _curve(
    hulls: Sequence[Sequence[Candidate]], steps: Sequence[_Step], weights: int
) -> list[CurvePoint]:
    """Totals after 0, 1, ... steps."""
    size = sum(hull[0].bytes for hull in hulls)
    kl = math.fsum(hull[0].kl for hull in hulls)
    curve = [CurvePoint(size, 8 * size / weights, kl)]
    for step in steps:
        size += step.extra
        kl -= step.gain
        curve.append(CurvePoint(size, 8 * size / weights, max(kl, 0.0)))
    return curve


def _room(budget: Budget, weights: int) -> int:
    """Bytes that a size allows."""
    in_bits = budget.kind is BudgetKind.BITS_PER_WEIGHT
    return math.floor(budget.limit * weights / 8 if in_bits else budget.limit)


def _check_reachable(
    budget: Budget, smallest: CurvePoint, best: CurvePoint, fixed_bytes: int
) -> None:
    value, shown = {
        BudgetKind.BITS_PER_WEIGHT: (smallest.bpw, "{:.4g}bpw"),
        BudgetKind.BYTES: (smallest.bytes + fixed_bytes, "{:.4g}MB"),
        BudgetKind.KL: (best.kl, "kl<={:.4g}"),
    }[budget.kind]
    if value > budget.limit:
        unit = 1e6 if budget.kind is BudgetKind.BYTES else 1
        shown = shown.format(value / unit * SHOWN_UP)
        fixed = f", {fixed_bytes / 1e6:.4g}MB stay as they are" if fixed_bytes else ""
        msg = (
            f"--budget {budget} cannot be met: the smallest possible value is {shown} "
            f"({smallest.bpw:.3g} to {best.bpw:.3g} bits per weight compete{fixed}); allow "
            "more, or keep less of the model float (--exclude, --lm-head, --embedding)"
        )
        raise PlanError(msg)


def _prefix(budget: Budget, curve: Sequence[CurvePoint]) -> int:
    """How many hull steps to take: as many as fit, or as few as reach the KL."""
    if budget.kind is BudgetKind.KL:
        return next(n for n, point in enumerate(curve) if point.kl <= budget.limit)
    if budget.kind is BudgetKind.BITS_PER_WEIGHT:
        return sum(point.bpw <= budget.limit for point in curve) - 1
    return sum(point.bytes <= budget.limit for point in curve) - 1


def _bytes_for_kl(old: Candidate, new: Candidate) -> tuple[float, float]:
    return new.bytes - old.bytes, old.kl - new.kl


def _kl_for_bytes(old: Candidate, new: Candidate) -> tuple[float, float]:
    return new.kl - old.kl, old.bytes - new.bytes


def _improve(
    chosen: list[Candidate],
    items: Sequence[BudgetItem],
    slack: float,
    price: Callable[[Candidate, Candidate], tuple[float, float]],
) -> None:
    """Spend what is left: the moves of most gain per cost that still fit, until none does.

    `price` gives (cost, gain) of a move.
    """
    changed = True
    while changed:
        moves = []
        for index, item in enumerate(items):
            for number, new in enumerate(item.candidates):
                cost, gain = price(chosen[index], new)
                if gain > 0 and cost <= slack:
                    ratio = gain / cost if cost > 0 else math.inf
                    moves.append((-ratio, -gain, index, number, cost))
        moved: set[int] = set()
        for _ratio, _gain, index, number, cost in sorted(moves):
            if index not in moved and cost <= slack:
                chosen[index] = items[index].candidates[number]
                slack -= cost
                moved.add(index)
        changed = bool(moved)
