"""`faq-onnx package`: make a folder for a runtime from a finished model."""

from __future__ import annotations

import argparse

from faq_onnx.cli import options
from faq_onnx.cli.output import open_progress, print_result
from faq_onnx.targets import TARGETS

__all__ = ["configure", "run"]

_LIST = "\n".join(f"  {name:<12}{meaning}" for name, meaning in TARGETS.items())
_EPILOG = f"""\
examples:
  faq-onnx package out/ -o out-genai/ --target genai
  faq-onnx package out/ -o out-genai/ --target genai --no-fuse-attention
  faq-onnx package out/ -o phone/ --target ort-mobile

targets:
{_LIST}

read on: docs/cli.md and docs/targets.md"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = (
        "Make a folder that a runtime loads as it is, from a float or a converted model, and try "
        "it there. `convert` does the same for genai at its end."
    )
    parser.epilog = _EPILOG
    options.add_source(parser)
    options.add_output(parser, "the package folder")
    options.add_target(parser, default=None)
    parser.add_argument(
        "--fuse-attention",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="GroupQueryAttention where it is proved to be exact (default: yes)",
    )
    options.add_force(parser, "replace an existing OUT; accept a package that fails its trial")
    options.add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Package and print what was done."""
    from faq_onnx import pipeline  # noqa: PLC0415 - heavy, and --help must be instant
    from faq_onnx.report.tables import package_text  # noqa: PLC0415 - as above
    from faq_onnx.targets.opening import split_options  # noqa: PLC0415 - as above

    manifest = pipeline.package(
        args.source,
        args.output,
        target=args.target,
        target_options=split_options(args.target_option),
        fuse_attention=args.fuse_attention,
        progress=open_progress(args),
        force=args.force,
    )
    text = f"{package_text(manifest)}\nwritten     {args.output}"
    print_result(args, manifest.model_dump(mode="json"), text)
