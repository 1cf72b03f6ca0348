r"""Quality of methods x formats on one model, against the float model over the same tokens.

    python tools/bench_quality.py MODEL --calibration c4.txt --evaluation wikitext2.test.raw \
        --formats 4b32 3.0bpw --methods rtn awq faq-gptq "faq-gptq scale.statistic=awq" best \
        --levels 0 --against awq --json results.jsonl --work work/

prints KL divergence, top-1 agreement and perplexity at accuracy_level 4 (int8 activations) and 0
(float32 activations). Each method calibrates as `faq-onnx convert` does with these windows: all
of them, or fewer for the channel scales and a share for the walk where rounding follows the
low-bit path. --against NAME adds the paired difference to that method (same format and level):
mean over the evaluation windows +- its standard error. Minutes a row; rows are written to --json,
with the KL of each window, as they come.
"""

from __future__ import annotations

import argparse
import sys

import bench_options
from figures import Figure, append_results, paired
from model_files import evaluate_file, write_onnxruntime_rtn
from quality import Bench

from faq_onnx.config import QuantizeConfig

FORMATS = ("4b32", "4b128", "3b64", "2b32", "2b64", "2b128", "8b32")
METHODS = ("rtn", "awq", "faq", "faq-gptq")


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    args = _parse(argv)
    with bench_options.opened_bench(args) as bench:
        for fmt in args.formats:
            theirs: dict[int, Figure] = {}
            if args.outside:
                _report(_outside(bench, fmt, args), args, fmt, theirs)
            for method in _in_order(args.methods, args.against):
                config = bench_options.make_config(method, fmt, args)
                figures = bench.measure(f"{method} {fmt}", config, args.levels)
                if method == args.against:
                    theirs = {figure.accuracy_level: figure for figure in figures}
                _report(figures, args, fmt, theirs)
        print(f"collected statistics in {bench.statistics.seconds:.0f} s", file=sys.stderr)
    return 0


def _in_order(methods: list[str], first: str | None) -> list[str]:
    """The one that others are compared with comes first."""
    if first is None:
        return methods
    return [first, *(method for method in methods if method != first)]


def _report(
    figures: list[Figure], args: argparse.Namespace, fmt: str, theirs: dict[int, Figure]
) -> None:
    for figure in figures:
        other = theirs.get(figure.accuracy_level)
        versus = None
        if other is not None and other is not figure:
            versus = paired(figure.kl_windows, other.kl_windows)
        bench_options.show(figure, versus, args.against or "")
    context = {"calibration": args.calibration, "samples": args.samples, "seed": args.seed}
    context |= {"evaluation": args.evaluation, "format": fmt}
    append_results(args.json, figures, model=args.model, **context)


def _outside(bench: Bench, fmt: str, args: argparse.Namespace) -> list[Figure]:
    """What onnxruntime's own quantizer makes, where it stores the format."""
    config = QuantizeConfig.model_validate(bench_options.parse_format(fmt))
    if config.budget is not None or config.bits not in {4, 8} or config.symmetric:
        return []
    path, figures = bench.work / "outside.onnx", []
    for level in args.levels:
        source = bench.opened.source.onnx_path
        write_onnxruntime_rtn(source, path, config.bits, config.block_size, level)
        figures.append(evaluate_file(f"onnxruntime {fmt}", path, bench.reference, level))
    return figures


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = bench_options.make_parser(__doc__)
    bench_options.add_calibration(parser)
    bench_options.add_common(parser, FORMATS)
    parser.add_argument(
        "--methods",
        nargs="*",
        type=bench_options.method_argument,
        default=list(METHODS),
        metavar="METHOD",
    )
    parser.add_argument("--against", type=bench_options.method_argument, metavar="METHOD")
    parser.add_argument("--levels", nargs="+", type=int, default=[4, 0])
    parser.add_argument(
        "--outside",
        action="store_true",
        help="also onnxruntime's own quantizer, which leaves a tied head float",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
