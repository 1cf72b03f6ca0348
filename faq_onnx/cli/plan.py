"""`faq-onnx plan`: decide, and keep the decision."""

from __future__ import annotations

import argparse
from pathlib import Path

from faq_onnx.cli import options
from faq_onnx.cli.output import open_progress, print_result
from faq_onnx.report.tables import quant_plan_text

__all__ = ["configure", "run"]

_EPILOG = """\
examples:
  faq-onnx plan model.onnx -o plan/ --method rtn
  faq-onnx plan model.onnx -o plan/ --stats stats/ --bits 4 --block-size 128
  faq-onnx plan model.onnx -o plan/ --stats stats/ --target qnn --budget 4.6bpw
      only formats that the target runs

Methods that calibrate and --budget need --stats. `faq-onnx apply` carries the plan out.
read on: docs/cli.md"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = "Decide the format of each site and the channel scale of each group."
    parser.epilog = _EPILOG
    options.add_source(parser)
    options.add_output(parser, "the plan")
    parser.add_argument("--stats", metavar="DIR", type=Path, help="statistics of `calibrate`")
    options.add_force(parser, "replace an existing OUT")
    options.add_target(parser)
    options.add_common(parser)
    options.add_config(parser, *options.GROUPS)


def run(args: argparse.Namespace) -> None:
    """Plan and print the decisions."""
    config = options.read_config(args)
    from faq_onnx import pipeline  # noqa: PLC0415 - heavy, and --help must be instant
    from faq_onnx.targets.opening import split_options  # noqa: PLC0415 - as above

    plan = pipeline.plan(
        args.source,
        args.output,
        config,
        stats=args.stats,
        target=args.target,
        target_options=split_options(args.target_option),
        progress=open_progress(args),
        force=args.force,
    )
    text = f"{quant_plan_text(plan)}\n\nwritten     {args.output}"
    print_result(args, plan.model_dump(mode="json"), text)
