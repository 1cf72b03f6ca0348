"""The command `faq-onnx`: picks the command, runs it, turns errors into exit codes."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol, cast

from faq_onnx import __version__
from faq_onnx.cli import interrupts
from faq_onnx.cli.output import log_to_stderr, print_error
from faq_onnx.errors import ConfigError, FaqOnnxError

__all__ = ["COMMANDS", "Command", "build_parser", "main"]

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_PIPE = 141  # 128 + SIGPIPE: the reader of our output went away

# Name of each command (its module has the same name) and its line in --help.
COMMANDS = {
    "convert": "a model in, a verified low-bit package out: all stages below in one go",
    "export": "turn a Hugging Face model or .gguf file into ONNX",
    "inspect": "show what can be quantized, what is left alone, and why",
    "calibrate": "collect activation statistics",
    "plan": "decide formats and channel scales",
    "apply": "carry out a plan: fold scales, quantize, package, verify",
    "package": "make a folder for a runtime from a finished model, and try it there",
    "chat": "talk to a package in the terminal, through onnxruntime-genai",
    "verify": "check a converted package, alone or against its source",
    "opt": "run passes over a model, for people who write passes",
    "recipe": "print a recipe file, or its JSON schema",
}

# argparse would fill ten lines with all options of `convert`.
USAGES = {
    "convert": "faq-onnx convert SOURCE -o OUT [options]",
    "export": "faq-onnx export SOURCE -o OUT [options]",
    "inspect": "faq-onnx inspect SOURCE [options]",
    "calibrate": "faq-onnx calibrate SOURCE -o OUT [options]",
    "plan": "faq-onnx plan SOURCE -o OUT [--stats DIR] [options]",
    "apply": "faq-onnx apply SOURCE --plan PLAN -o OUT [options]",
    "package": "faq-onnx package SOURCE -o OUT --target TARGET [options]",
    "chat": "faq-onnx chat PACKAGE [--prompt TEXT] [options]",
    "verify": "faq-onnx verify PACKAGE [--source SOURCE] [options]",
    "opt": "faq-onnx opt MODEL -p PASSES -o OUT [options]",
    "recipe": "faq-onnx recipe [--schema] [options]",
}

_EPILOG = """\
start here:
  faq-onnx convert model/ -o out/                 4-bit FAQ, calibrated on the model's own text
  faq-onnx convert model.onnx --dry-run           what would be done, and how large it would be
  faq-onnx convert model/ -o out/ --method rtn    no calibration, the quickest

exit codes:
  0 done   2 wrong call   3 model   4 calibration   5 plan   6 rewrite   7 verification
  8 package   130 interrupted

`faq-onnx COMMAND --help` shows the options of a command; docs/cli.md has all of it on one page."""


class Command(Protocol):
    """What a module of a command has."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add arguments, description and examples."""

    def run(self, args: argparse.Namespace) -> None:
        """Do it; raises FaqOnnxError."""


_FORMAT = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)


class _Parser(argparse.ArgumentParser):
    """Raises instead of leaving the process, so that `main` is the one way out."""

    def error(self, message: str) -> NoReturn:
        """Say what argparse says, and where to read on.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{message}\n  `{self.prog} --help` shows what there is")


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; only the command that `argv` names is imported, so that --help is instant."""
    parser = _Parser(
        prog="faq-onnx",
        description="Low-bit weights for ONNX language models: RTN, AWQ and FAQ, verified.",
        epilog=_EPILOG,
        formatter_class=_FORMAT,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"faq-onnx {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, title="commands", parser_class=_Parser
    )
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            formatter_class=_FORMAT,
            allow_abbrev=False,
        )
        if name in argv:
            _command(name).configure(sub)
            sub.usage = USAGES[name]
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (0 = done, see `faq_onnx.errors`)."""
    argv = sys.argv[1:] if argv is None else argv
    # onnxruntime's wheels report to Microsoft unless this is set before the import.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return _run(argv)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was written\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE


def _run(argv: Sequence[str]) -> int:
    try:
        args = build_parser(argv).parse_args(argv)
        with interrupts.kept(), log_to_stderr(verbose=args.verbose):
            _command(args.command).run(args)
        sys.stdout.flush()
    except FaqOnnxError as error:
        print_error(error, as_json="--json" in argv)
        return error.exit_code
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    return 0


def _command(name: str) -> Command:
    return cast("Command", importlib.import_module(f"faq_onnx.cli.{name}"))
