"""`faq-onnx inspect`: the census of a model."""

from __future__ import annotations

import argparse

from faq_onnx.cli import options
from faq_onnx.cli.output import open_progress, print_result
from faq_onnx.report.tables import census_text, refusals_text
from faq_onnx.targets import TARGETS

__all__ = ["configure", "run"]

_EPILOG = """\
examples:
  faq-onnx inspect model.onnx
  faq-onnx inspect model.onnx --target genai
  faq-onnx inspect model.onnx --json | jq '.skipped[].reason'

The last table lists the constant weights that stay as they are, each with the reason.
read on: docs/cli.md"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = "Show linear sites, scale groups, embeddings, and what is left alone."
    parser.epilog = _EPILOG
    options.add_source(parser)
    parser.add_argument(
        "--target", choices=tuple(TARGETS), help="list what would not run there, too"
    )
    options.add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Print the census."""
    from faq_onnx import pipeline  # noqa: PLC0415 - heavy, and --help must be instant

    progress = open_progress(args)
    if args.target is None:
        found = pipeline.inspect(args.source, progress=progress)
        print_result(args, found.model_dump(mode="json"), census_text(found))
        return
    census, refusals = pipeline.inspect_for(args.source, args.target, progress=progress)
    listed = [refusal.model_dump(mode="json") for refusal in refusals]
    value: dict[str, object] = {"target": args.target, "refusals": listed}
    text = refusals_text(args.target, refusals)
    if census is not None:  # of a float model
        value |= census.model_dump(mode="json")
        text = f"{census_text(census)}\n\n{text}"
    print_result(args, value, text)
