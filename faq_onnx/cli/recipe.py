"""`faq-onnx recipe`: print settings as a recipe file, or the JSON schema of recipes."""

from __future__ import annotations

import argparse
import sys

from faq_onnx.cli import options
from faq_onnx.cli.output import print_json
from faq_onnx.recipes import recipe_schema, recipe_text

__all__ = ["configure", "run"]

_EPILOG = """\
examples:
  faq-onnx recipe > mine.toml                       all settings with their defaults, explained
  faq-onnx recipe --bits 8 --method rtn > mine.toml
  faq-onnx recipe --recipe mine.toml                check a recipe and fill in its defaults
  faq-onnx recipe --schema > recipe.schema.json     for completion in editors

read on: docs/cli.md"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = "Print settings as a recipe file for --recipe."
    parser.epilog = _EPILOG
    parser.add_argument("--schema", action="store_true", help="print the JSON schema instead")
    options.add_common(parser)
    options.add_config(parser, *options.GROUPS)


def run(args: argparse.Namespace) -> None:
    """Print the recipe."""
    config = options.read_config(args)
    if args.schema:
        sys.stdout.write(recipe_schema())
    elif args.json:
        print_json(config.model_dump(mode="json"))
    else:
        sys.stdout.write(recipe_text(config))
