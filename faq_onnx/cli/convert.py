"""`faq-onnx convert`: a model in, a verified low-bit package out."""

from __future__ import annotations

import argparse
from pathlib import Path

from faq_onnx.cli import options
from faq_onnx.cli.output import open_progress, print_result
from faq_onnx.config import QuantizeConfig
from faq_onnx.errors import ConfigError
from faq_onnx.report.tables import plan_text, result_text

__all__ = ["configure", "run"]

_EPILOG = """\
examples:
  faq-onnx convert model/ -o out/
      4-bit FAQ, blocks of 32, 8-bit lm_head, calibrated on text that the model writes itself
  faq-onnx convert model.onnx -o out/ --method awq --calibration notes.txt --samples 128
      AWQ, calibrated on your own text
  faq-onnx convert model/ -o out/ --bits 3 --block-size 64
      3-bit codes in 4-bit storage: the file is as large as with 4 bits
  faq-onnx convert model/ -o out/ --budget same
      2, 4 and 8 bits, more where the logits need them, in the size that 4 bits would take;
      or --budget 3.0bpw, --budget 80MB, --budget 'kl<=0.05'
  faq-onnx convert model/ -o out/ --exclude '*down_proj*' --lm-head keep
      some layers stay float
  faq-onnx convert model/ --dry-run
      the plan as a table, nothing is written

OUT is written to a temporary folder and renamed at the end: a failed or interrupted run leaves
nothing. A result worse than --max-kl is refused with its worst sites named, unless --force.

read on: docs/cli.md; docs/quality.md for what the methods bring"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = "Convert a language model to low-bit weights, verify it, package it."
    parser.epilog = _EPILOG
    options.add_source(parser)
    options.add_output(parser, "the package folder", required=False)
    parser.add_argument(
        "--dry-run", action="store_true", help="show the plan as a table and write nothing"
    )
    options.add_force(parser, "replace an existing OUT; accept a result worse than --max-kl")
    options.add_target(parser)
    parser.add_argument(
        "--work",
        metavar="DIR",
        type=Path,
        help="keep exported model and statistics here; a later run goes on from them",
    )
    options.add_common(parser)
    options.add_config(parser, *options.GROUPS)


def run(args: argparse.Namespace) -> None:
    """Convert, or show what would be done."""
    config = options.read_config(args)
    if args.dry_run:
        _preview(args, config)
        return
    if args.output is None:
        raise ConfigError("-o OUT is missing: give the folder to write, or --dry-run for the plan")
    from faq_onnx import pipeline  # noqa: PLC0415 - heavy, and --help must be instant
    from faq_onnx.targets.opening import split_options  # noqa: PLC0415 - as above

    report = pipeline.convert(
        args.source,
        args.output,
        config,
        target=args.target,
        target_options=split_options(args.target_option),
        progress=open_progress(args),
        force=args.force,
        work=args.work,
    )
    text = f"{result_text(report)}\nwritten     {args.output}"
    print_result(args, report.model_dump(mode="json"), text)


def _preview(args: argparse.Namespace, config: QuantizeConfig) -> None:
    from faq_onnx import pipeline  # noqa: PLC0415 - see above
    from faq_onnx.targets.opening import split_options  # noqa: PLC0415 - see above

    sites, embeddings, totals = pipeline.preview(
        args.source,
        config,
        target=args.target,
        target_options=split_options(args.target_option),
        progress=open_progress(args),
    )
    value = {
        "sites": [row.model_dump(mode="json") for row in sites],
        "embeddings": [row.model_dump(mode="json") for row in embeddings],
        "totals": totals.model_dump(mode="json"),
    }
    print_result(args, value, plan_text(sites, embeddings, totals))
