r"""Calibration bias: how much does the choice of calibration text move the result?

    python tools/bench_bias.py MODEL --calibrations c4.txt code.txt --samples 8 16 64 \
        --seeds 0 1 2 --pool 256 --evaluation wikitext2.test.raw --formats 4b32 \
        --methods rtn awq faq faq-gptq best --json bias.jsonl --work work/

Calibrates on every text x number of windows x seed (which windows, drawn from the first --pool of
the text; a small draw is part of a larger one) and evaluates on one text, at accuracy_level 0.
Prints, for each method, mean and standard deviation of KL over the seeds of each text and size,
and over all calibrations. A method that does not calibrate is measured once. Rows that are in
--json already are not measured again. SmolLM2-135M: 1 to 4 minutes a row, and one walk for each
calibration (15 s for 8 windows, 2 minutes for 64), kept in --work: 0.4 GB each.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence

import bench_options
import numpy as np
from figures import Figure, Results
from quality import Bench
from work import work_folder

from faq_onnx.config import CalibrationConfig
from faq_onnx.report.progress import make_progress

HELD_OUT = "heldout"
Cell = tuple[str, int, int]  # text, samples, seed


@dataclasses.dataclass(frozen=True)
class Row:
    """One method on one calibration; `samples` is 0 where the method does not calibrate."""

    method: str
    text: str
    samples: int
    figure: Figure


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    args = _parse(argv)
    results = Results(args.json)
    with work_folder(args.work) as folder:
        bench = Bench.prepare(
            args.model,
            folder,
            calibration=_calibration(args, args.calibrations[0], max(args.samples), 0),
            evaluation=args.evaluation,
            windows=args.windows,
            pool=args.pool,
            progress=make_progress(sys.stderr),
        )
        rows: dict[str, list[Row]] = {fmt: [] for fmt in args.formats}
        for cell in itertools.product(args.calibrations, args.samples, args.seeds):
            on_text = bench.recalibrated(_calibration(args, *cell), pool=args.pool)
            for fmt in args.formats:
                rows[fmt] += _measure(on_text, fmt, cell, args, results)
            if args.work is None:
                bench.statistics.forget()  # gigabytes, if all stayed
    for fmt in args.formats:
        print(_table(fmt, rows[fmt], args), flush=True)
    return 0


def _measure(
    bench: Bench, fmt: str, cell: Cell, args: argparse.Namespace, results: Results
) -> list[Row]:
    rows: list[Row] = []
    first = (args.calibrations[0], args.samples[0], args.seeds[0])
    for method in args.methods:
        config = bench_options.make_config(method, fmt, args)
        calibrates = config.axes.calibrates or config.budget is not None
        if not calibrates and cell != first:
            continue
        which = cell if calibrates else ("", 0, 0)
        key = _key(args, fmt, method, which)
        figure = results.get(key)
        if figure is None:
            name = f"{method} {fmt} {which[0]} {which[1]} seed {which[2]}"
            (figure,) = bench.measure(name, config, (0,))
            results.add(key, figure)
        bench_options.show(figure)
        rows.append(Row(method, which[0], which[1], figure))
    return rows


def _key(args: argparse.Namespace, fmt: str, method: str, which: Cell) -> dict[str, object]:
    names = ("model", "evaluation", "windows", "sequence_length", "pool", "lm_head", "embedding")
    key: dict[str, object] = {name: getattr(args, name) for name in names}
    if args.evaluation == HELD_OUT:  # it follows the first text's windows
        key["evaluation"] = f"behind {max(args.samples)} of {args.calibrations[0]}"
    return {**key, "format": fmt, "method": method, "which": list(which)}


def _table(fmt: str, rows: Sequence[Row], args: argparse.Namespace) -> str:
    columns = list(itertools.product(args.calibrations, args.samples))
    heads = [f"{text} x {samples}" for text, samples in columns]
    lines = ["", f"| {fmt}: KL | {' | '.join(heads)} | all calibrations | worst |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for method in args.methods:
        own = [row for row in rows if row.method == method]
        cells = [
            _spread([row.figure for row in own if (row.text, row.samples) in {cell, ("", 0)}])
            for cell in columns
        ]
        worst = max(row.figure.kl_nats for row in own)
        whole = _spread([row.figure for row in own])
        lines.append(f"| {method} | {' | '.join(cells)} | {whole} | {worst:.4f} |")
    seeds = ", ".join(str(seed) for seed in args.seeds)
    lines.append(f"\nMean and standard deviation over seeds {seeds}; then over all calibrations.")
    return "\n".join(lines)


def _spread(figures: Sequence[Figure]) -> str:
    values = [figure.kl_nats for figure in figures]
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f}, sd {np.std(values, ddof=1):.4f}"


def _calibration(
    args: argparse.Namespace, text: str, samples: int, seed: int
) -> CalibrationConfig:
    return bench_options.calibration_of(args, source=text, samples=samples, seed=seed)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = bench_options.make_parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="ONNX folder or file")
    parser.add_argument("--calibrations", nargs="+", required=True, metavar="TEXT")
    parser.add_argument("--samples", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pool", type=int, default=256, help="windows to draw from [%(default)s]")
    bench_options.add_common(parser, ("4b32",))
    parser.add_argument(
        "--methods",
        nargs="+",
        type=bench_options.method_argument,
        default=["rtn", "awq", "faq", "faq-gptq", "best"],
        metavar="METHOD",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
