"""`faq-onnx verify`: check a package."""

from __future__ import annotations

import argparse
from pathlib import Path

from faq_onnx.cli import options
from faq_onnx.cli.output import open_progress, print_result
from faq_onnx.report.tables import verification_text

__all__ = ["configure", "run"]

_EPILOG = """\
examples:
  faq-onnx verify out/                       structure, kernels, and its target's runtime once more
  faq-onnx verify out/ --source model.onnx   and KL, top-1, perplexity against the source
  faq-onnx verify out/ --source model.onnx --text mine.txt    on 8 windows of a text of yours

read on: docs/cli.md"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = (
        "Check a package: structure, numbers, logits, and its target's runtime once more."
    )
    parser.epilog = _EPILOG
    parser.add_argument(
        "package", metavar="PACKAGE", type=Path, help="folder that convert or package wrote"
    )
    parser.add_argument("--source", metavar="SOURCE", help="the float model to compare with")
    parser.add_argument(
        "--text",
        metavar="TEXT",
        help="compare on this .txt or .jsonl file or these token arrays, from the beginning "
        "(default: what convert held out)",
    )
    parser.add_argument(
        "--verify-samples",
        metavar="N",
        type=int,
        help="windows to compare on (default: as many as convert held out)",
    )
    options.add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Verify and print what was found."""
    from faq_onnx import pipeline  # noqa: PLC0415 - heavy, and --help must be instant

    found = pipeline.verify(
        args.package,
        args.source,
        text=args.text,
        samples=args.verify_samples,
        progress=open_progress(args),
    )
    print_result(args, found.model_dump(mode="json"), verification_text(found))
