"""`faq-onnx calibrate`: collect statistics and keep them."""

from __future__ import annotations

import argparse

from faq_onnx.cli import options
from faq_onnx.cli.output import open_progress, print_result

__all__ = ["configure", "run"]

_EPILOG = """\
examples:
  faq-onnx calibrate model.onnx -o stats/
  faq-onnx calibrate model.onnx -o stats/ --calibration notes.txt --samples 128
  faq-onnx calibrate model.onnx -o stats/ --budget 3bpw
      also measures what each weight's rounding does to the logits, for any budget
  faq-onnx calibrate model.onnx -o stats/ --target qnn
      for `plan --target qnn`, which may scale other weights than the default target

The same input and seed give the same statistics. `plan --stats` and `apply --stats` use them.
read on: docs/cli.md"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = "Run calibration text through a model and keep activation statistics."
    parser.epilog = _EPILOG
    options.add_source(parser)
    options.add_output(parser, "the folder of statistics")
    options.add_force(parser, "replace an existing OUT")
    options.add_target(parser)
    options.add_common(parser)
    options.add_config(parser, *options.GROUPS)


def run(args: argparse.Namespace) -> None:
    """Calibrate and print where the statistics are."""
    config = options.read_config(args)
    from faq_onnx import pipeline  # noqa: PLC0415 - heavy, and --help must be instant
    from faq_onnx.targets.opening import split_options  # noqa: PLC0415 - as above

    path = pipeline.calibrate(
        args.source,
        args.output,
        config,
        target=args.target,
        target_options=split_options(args.target_option),
        progress=open_progress(args),
        force=args.force,
    )
    print_result(args, {"output": str(path)}, str(path))
