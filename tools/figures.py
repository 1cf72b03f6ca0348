"""What a measurement yields, and the arithmetic and files that all programs here share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

__all__ = ["Difference", "Figure", "Results", "append_results", "mean_of", "paired"]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured configuration.

    Attributes:
        name: What it is called in the table.
        accuracy_level: Of the MatMulNBits nodes.
        kl_nats: Mean KL(float || low-bit) over all positions, nats/token.
        kl_windows: The same per window, for paired comparisons.
        top1: Share of positions with the same argmax.
        perplexity: Of the low-bit model.
        perplexity_float: Of the source.
        size_bytes: Of the file.
        plan_s: Seconds that planning took.
        quantize_s: Seconds that folding and quantizing took.
        bits_per_weight: Of what is stored low-bit: codes, scales and zero points.
    """

    name: str
    accuracy_level: int
    kl_nats: float
    kl_windows: tuple[float, ...]
    top1: float
    perplexity: float
    perplexity_float: float
    size_bytes: int
    plan_s: float
    quantize_s: float
    bits_per_weight: float | None = None


@dataclasses.dataclass(frozen=True)
class Difference:
    """A mean with the standard error of the mean (nan for a single value)."""

    mean: float
    error: float

    def __str__(self) -> str:
        """With its sign, as tables show it."""
        return f"{self.mean:+.5f} ± {self.error:.5f}"


def mean_of(values: Sequence[float]) -> Difference:
    """Mean of independent values, and its standard error s / sqrt(n)."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return Difference(float(np.mean(values)), float(error))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Ours minus theirs over the same windows."""
    if len(ours) != len(theirs):
        msg = f"{len(ours)} windows cannot be paired with {len(theirs)}"
        raise ValueError(msg)
    return mean_of(np.subtract(ours, theirs).tolist())


def append_results(path: Path | None, figures: Iterable[Figure], **context: object) -> None:
    """Add figures to a JSON-lines file."""
    if path is None:
        return
    with path.open("a", encoding="utf-8") as file:
        for figure in figures:
            file.write(json.dumps({**dataclasses.asdict(figure), **context}) + "\n")


class Results:
    """Measurements by key in a JSON-lines file: what is there need not be measured again.

    A line that was cut off (the power went) is ignored, and measured again.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._kept: dict[str, Figure] = {}
        if path is not None and path.is_file():
            text = path.read_text(encoding="utf-8")
            for line in text.splitlines():
                self._read(line)
            if text and not text.endswith("\n"):
                with path.open("a", encoding="utf-8") as file:
                    file.write("\n")  # the next line must not continue a cut one

    def get(self, key: Mapping[str, object]) -> Figure | None:
        """What was measured under this key."""
        return self._kept.get(_canonical(key))

    def add(self, key: Mapping[str, object], figure: Figure) -> Figure:
        """Keep it, in the file at once."""
        self._kept[_canonical(key)] = figure
        append_results(self._path, [figure], key=dict(key))
        return figure

    def _read(self, line: str) -> None:
        try:
            row = json.loads(line)
            key = row.pop("key")
            windows = tuple(row.pop("kl_windows"))
            self._kept[_canonical(key)] = Figure(kl_windows=windows, **row)
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # cut off, or of another program


def _canonical(key: Mapping[str, object]) -> str:
    return json.dumps(key, sort_keys=True)
