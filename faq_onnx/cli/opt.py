"""`faq-onnx opt`: passes by hand, for people who write passes."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faq_onnx.cli import options
from faq_onnx.cli.output import open_progress, print_json, print_text
from faq_onnx.errors import PackageError
from faq_onnx.report.tables import format_bytes, render_table

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["configure", "run"]

_EPILOG = """\
examples:
  faq-onnx opt model.onnx -p matmul-to-nbits -o low.onnx
  faq-onnx opt model.onnx -p "fold-scales{scale=2},matmul-to-nbits{bits=8,block_size=64}" -o x.onnx
  faq-onnx opt model.onnx -p "my_module:MyPass{depth=2},remove-unused" -o x.onnx

A pipeline is a list of passes with their options in braces. An unknown pass is an error that lists
them all; `module:Class` is a pass of yours. Weights are rounded to nearest here: channel scales
and verification are the job of `convert`.

read on: docs/cli.md"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = "Run passes over an ONNX model and write the result."
    parser.epilog = _EPILOG
    parser.add_argument("model", metavar="MODEL", type=Path, help="an .onnx file")
    parser.add_argument(
        "-p", "--passes", metavar="PASSES", required=True, help="names and options, in order"
    )
    options.add_output(parser, "the .onnx file")
    parser.add_argument(
        "--external-data", action="store_true", help="write weights beside OUT even below 1 GB"
    )
    options.add_force(parser, "replace an existing OUT")
    options.add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Load, run the pipeline, save, and print what each pass did."""
    output: Path = args.output
    if output.exists() and not args.force:
        raise PackageError(f"{output} exists; choose another -o, or --force to replace it")
    from faq_onnx import opt  # noqa: PLC0415 - heavy, and --help must be instant
    from faq_onnx.graph.io import load_model  # noqa: PLC0415
    from faq_onnx.passes import pass_name  # noqa: PLC0415

    done: list[dict[str, Any]] = []

    def on_pass(each: ir.passes.PassBase, result: ir.passes.PassResult) -> None:
        nodes = sum(1 for _ in result.model.graph.all_nodes())
        done.append({"pass": pass_name(each), "modified": result.modified, "nodes": nodes})

    with open_progress(args).stage("run passes", 0, "passes"):
        model = load_model(args.model)
        result = opt.optimize(model, args.passes, config=_config(args.model), on_pass=on_pass)
        size = _save(result.model, output, external_data=args.external_data)
    if args.json:
        print_json({"output": str(output), "size_bytes": size, "passes": done})
        return
    rows = [(row["pass"], "yes" if row["modified"] else "no", row["nodes"]) for row in done]
    table = render_table(("pass", "modified", "nodes"), rows)
    print_text(f"{table}\n\nwritten     {output} ({format_bytes(size)})")


def _config(model: Path) -> dict[str, object] | None:
    path = model.parent / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    return config if isinstance(config, dict) else None


def _save(model: ir.Model, output: Path, *, external_data: bool) -> int:
    """Write beside OUT and rename, so that a failure leaves an old OUT as it was."""
    from faq_onnx.graph.io import save_model  # noqa: PLC0415 - see above

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".faq-onnx-", dir=output.parent) as folder:
        size = save_model(model, Path(folder) / output.name, external_data=external_data)
        # The .onnx file last: it refers to its data file.
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == output.name):
            path.replace(output.parent / path.name)
    return size
