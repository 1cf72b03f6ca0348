"""`faq-onnx inspect`: the census of a model."""

from __future__ import annotations

import argparse

from faq_onnx.cli import options
from faq_onnx.cli.output import open_progress, print_result
from faq_onnx.report.tables import census_text

__all__ = ["configure", "run"]

_EPILOG = """\
examples:
  faq-onnx inspect model.onnx
  faq-onnx inspect model.onnx --json | jq '.skipped[].reason'

The last table lists the constant weights that stay as they are, each with the reason.
read on: docs/cli.md"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = "Show linear sites, scale groups, embeddings, and what is left alone."
    parser.epilog = _EPILOG
    options.add_source(parser)
    options.add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Print the census."""
    from faq_onnx import pipeline  # noqa: PLC0415 - heavy, and --help must be instant

    census = pipeline.inspect(args.source, progress=open_progress(args))
    print_result(args, census.model_dump(mode="json"), census_text(census))
