"""`faq-onnx chat`: talk to a package in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from faq_onnx.cli import interrupts, options
from faq_onnx.cli.output import print_json
from faq_onnx.errors import ConfigError

if TYPE_CHECKING:
    from faq_onnx.targets.chat import Chat

__all__ = ["configure", "run"]

_EPILOG = """\
examples:
  faq-onnx chat out/                                   a conversation; Ctrl-D ends it
  faq-onnx chat out/ --prompt 'Why is the sky blue?'   one answer
  echo 'Hello' | faq-onnx chat out/ --temperature 0.7

Ctrl-C stops an answer. needs: pip install 'faq-onnx[genai]'
read on: docs/cli.md and docs/targets.md"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = (
        "Talk to a package through onnxruntime-genai, with the model's own chat template. A model "
        "without a template continues each text by itself."
    )
    parser.epilog = _EPILOG
    parser.add_argument("package", metavar="PACKAGE", type=Path, help="folder that convert wrote")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit")
    parser.add_argument("--system", metavar="TEXT", default="", help="how the model should behave")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=256, help="longest answer (256)"
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="draw tokens at this temperature (0: always the best one)",
    )
    options.add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Open the package and talk."""
    _check(args)
    from faq_onnx.targets.chat import Chat, ChatSettings  # noqa: PLC0415 - heavy

    settings = ChatSettings(args.max_new_tokens, args.temperature, args.system)
    chat = Chat(args.package, settings)
    if not chat.has_template and not args.quiet:
        sys.stderr.write("note: the package has no chat template; texts are continued\n")
    if args.prompt is not None:
        _answer_once(chat, args)
        return
    for text in _turns():
        with contextlib.suppress(KeyboardInterrupt):
            _stream(chat, text)
        interrupts.answered()
        sys.stdout.write("\n")
        sys.stdout.flush()


def _check(args: argparse.Namespace) -> None:
    problems = []
    if args.max_new_tokens < 1:
        problems.append(f"--max-new-tokens: found {args.max_new_tokens}; allowed 1 or more")
    if not 0 <= args.temperature < float("inf"):
        problems.append(f"--temperature: found {args.temperature:g}; allowed 0 or more")
    if args.json and args.prompt is None:
        problems.append("--json: a conversation is no JSON value; give --prompt TEXT")
    if problems:
        raise ConfigError("\n".join(problems))


def _answer_once(chat: Chat, args: argparse.Namespace) -> None:
    start = time.perf_counter()
    if not args.json:
        _stream(chat, args.prompt)
        sys.stdout.write("\n")
    else:
        text = "".join(chat.answer(args.prompt))
        duration = time.perf_counter() - start
        print_json({"text": text, "tokens": chat.tokens, "duration_s": round(duration, 3)})


def _stream(chat: Chat, text: str) -> None:
    for piece in chat.answer(text):
        sys.stdout.write(piece)
        sys.stdout.flush()


def _turns() -> Iterator[str]:
    """Lines of stdin until it ends; Ctrl-C at the prompt ends it, too."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, PLC0415 - input() can then edit; not on Windows
    while True:
        try:
            line = input("> ") if is_terminal else next(sys.stdin).rstrip("\n")
        except (EOFError, KeyboardInterrupt, StopIteration):
            return
        if line.strip():
            yield line
