"""`faq-onnx apply`: carry out a plan."""

from __future__ import annotations

import argparse
from pathlib import Path

from faq_onnx.cli import options
from faq_onnx.cli.output import open_progress, print_result
from faq_onnx.report.tables import result_text

__all__ = ["configure", "run"]

_EPILOG = """\
examples:
  faq-onnx apply model.onnx --plan plan/ -o out/
  faq-onnx apply model.onnx --plan plan/ --stats stats/ -o out/
  faq-onnx apply model.onnx --plan plan/ --stats stats/ -o phone/ --target ort-mobile

read on: docs/cli.md"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = (
        "Fold scales, quantize, package and verify, as a plan says. Method, formats and scales "
        "are those of the plan; the calibration settings say on what to verify. What the target "
        "would not run of them is refused first."
    )
    parser.epilog = _EPILOG
    options.add_source(parser)
    parser.add_argument(
        "--plan", metavar="PLAN", type=Path, required=True, help="what `plan` wrote"
    )
    parser.add_argument("--stats", metavar="DIR", type=Path, help="statistics of `calibrate`")
    options.add_output(parser, "the package folder")
    options.add_force(parser, "replace an existing OUT; accept a result worse than --max-kl")
    options.add_target(parser)
    options.add_common(parser)
    options.add_config(parser, *options.GROUPS)


def run(args: argparse.Namespace) -> None:
    """Apply the plan and print the result."""
    config = options.read_config(args)
    from faq_onnx import pipeline  # noqa: PLC0415 - heavy, and --help must be instant
    from faq_onnx.targets.opening import split_options  # noqa: PLC0415 - as above

    report = pipeline.apply(
        args.source,
        args.plan,
        args.output,
        config,
        stats=args.stats,
        target=args.target,
        target_options=split_options(args.target_option),
        progress=open_progress(args),
        force=args.force,
    )
    text = f"{result_text(report)}\nwritten     {args.output}"
    print_result(args, report.model_dump(mode="json"), text)
