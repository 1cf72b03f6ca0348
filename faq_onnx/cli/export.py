"""`faq-onnx export`: the first stage alone."""

from __future__ import annotations

import argparse

from faq_onnx.cli import options
from faq_onnx.cli.output import open_progress, print_result

__all__ = ["configure", "run"]

_EPILOG = """\
examples:
  faq-onnx export hf-model/ -o float/          a local checkpoint, no network used
  faq-onnx export model.gguf -o float/         through transformers

needs: pip install 'faq-onnx[export]' (torch, transformers, optimum-onnx)
read on: docs/cli.md"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = "Turn a Hugging Face model or a .gguf file into a float ONNX folder."
    parser.epilog = _EPILOG
    options.add_source(parser)
    options.add_output(parser, "the folder for model.onnx, tokenizer and config")
    options.add_force(parser, "replace an existing OUT")
    options.add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Export and print where the model is."""
    from faq_onnx import pipeline  # noqa: PLC0415 - heavy, and --help must be instant

    path = pipeline.export(
        args.source, args.output, progress=open_progress(args), force=args.force
    )
    print_result(args, {"output": str(path)}, str(path))
