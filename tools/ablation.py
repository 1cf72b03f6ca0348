r"""From round-to-nearest to the full stack, one piece at a time.

    python tools/ablation.py MODEL --calibration c4.txt --evaluation wikitext2.test.raw \
        --formats 4b32 3b64 3.0bpw --json ablation.jsonl --work work/

Every row adds one piece to the row above it (faq scales stand in for awq scales). All rows but the
last see the same statistics, over all calibration windows, and the low-bit path walks all of them;
the last row is the named method as `faq-onnx convert` runs it: fewer windows for the channel
scales and for the walk. Differences are paired over the evaluation windows, at accuracy_level 0:
the error of the weights alone. Prints a markdown table for each format; with --json, rows that
are there are not measured again. SmolLM2-135M: 1 to 4 minutes a row.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import bench_options
from figures import Figure, Results, paired
from quality import Bench

SEARCH = "rounding.grid=search"
FLAT = "rounding.shrinkage=0"  # every row but the last two believes the Gram matrix as it is
GPTQ = f"{SEARCH} rounding.rounding=gptq"
WALK = f"{GPTQ} rounding.path=low-bit rounding.path_share=1"
SETTINGS = (
    *("model", "calibration", "samples", "seed", "pool", "sequence_length"),
    *("evaluation", "windows", "lm_head", "embedding"),
)
STEPS = {
    "round-to-nearest": "rtn",
    "+ grid search": f"rtn {SEARCH} {FLAT}",
    "+ awq scales": f"rtn {SEARCH} {FLAT} scale.statistic=awq",
    "faq scales instead": f"rtn {SEARCH} {FLAT} scale.statistic=faq",
    "+ gptq": f"rtn {GPTQ} {FLAT} scale.statistic=faq",
    "+ low-bit path": (f"rtn {WALK} {FLAT} scale.statistic=faq rounding.correct=false"),
    "+ correction": f"rtn {WALK} {FLAT} scale.statistic=faq",
    "+ shrinkage": f"rtn {WALK} scale.statistic=faq",
}


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    args = _parse(argv)
    results = Results(args.json)
    with bench_options.opened_bench(args) as bench:
        for fmt in args.formats:
            rows = {}
            steps = {**STEPS, f"{args.full}, as shipped": args.full}
            for name, method in steps.items():
                rows[name] = _measure(bench, name, method, fmt, args, results)
                bench_options.show(rows[name])
            command = ["python", f"tools/{Path(__file__).name}", *(argv or sys.argv[1:])]
            print(_table(fmt, rows, shlex.join(command)), flush=True)
    return 0


def _measure(  # noqa: PLR0913, PLR0917 - one argument per part of a row
    bench: Bench, name: str, method: str, fmt: str, args: argparse.Namespace, results: Results
) -> Figure:
    key = {setting: getattr(args, setting) for setting in SETTINGS}
    key |= {"format": fmt, "step": name, "method": method}
    known = results.get(key)
    if known is not None:
        return known
    config = bench_options.make_config(method, fmt, args)
    stats = bench.stats if name in STEPS and config.axes.calibrates else None
    if config.budget is not None and name in STEPS:
        stats = bench.stats  # the same sensitivities for all
    (figure,) = bench.measure(f"{name} {fmt}", config, (0,), stats)
    return results.add(key, figure)


def _table(fmt: str, rows: dict[str, Figure], command: str) -> str:
    """Markdown: each row against the one above it and against the first."""
    lines = ["", f"    {command}", "", f"| {fmt} | KL | minus the row above | minus RTN | top-1 |"]
    lines.append("|---|---|---|---|---|")
    before: Figure | None = None
    first = next(iter(rows.values()))
    for name, row in rows.items():
        cells = ["", ""]
        if before is not None:
            pairs = (before, first)
            cells = [str(paired(row.kl_windows, other.kl_windows)) for other in pairs]
        top1 = f"{100 * row.top1:.1f} %"
        lines.append(f"| {name} | {row.kl_nats:.4f} | {cells[0]} | {cells[1]} | {top1} |")
        before = row
    return "\n".join([*lines, ""])


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = bench_options.make_parser(__doc__)
    bench_options.add_calibration(parser)
    bench_options.add_common(parser, ("4b32", "3b64"))
    parser.add_argument(
        "--full",
        type=bench_options.method_argument,
        default="best",
        metavar="METHOD",
        help="of the last row [%(default)s]",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
