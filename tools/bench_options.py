"""Options that the measuring programs share, and what they mean.

A METHOD is a name of `faq-onnx convert --method` with settings behind it, in one argument:

    awq    faq-gptq    "faq-gptq scale.statistic=awq"    "best rounding.correct=false faq.window=2"

A FORMAT is 4b32 (4 bits, blocks of 32), 4b32s (the same without zero points), or a budget that
mixes bits: 3.0bpw, 80MB, kl<=0.05. A METHOD with budget=same mixes bits in the size of its FORMAT.
Budgets measure sensitivities first: once, some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from figures import Difference, Figure
from pydantic import BaseModel, ValidationError
from quality import Bench
from work import work_folder

from faq_onnx.config import CalibrationConfig, QuantizeConfig
from faq_onnx.errors import FaqOnnxError
from faq_onnx.planning.budget import parse_budget
from faq_onnx.report.progress import make_progress

__all__ = [
    "add_calibration",
    "add_common",
    "calibration_of",
    "checked",
    "keys_of",
    "make_config",
    "make_parser",
    "method_argument",
    "opened_bench",
    "parse_format",
    "settings_of",
    "show",
]

_Model = TypeVar("_Model", bound=BaseModel)
_FORMAT = re.compile(r"([2348])b(16|32|64|128|256)(s?)")


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the program's docstring and what METHOD and FORMAT mean."""
    meaning = (__doc__ or "").partition("\n\n")[2]
    return argparse.ArgumentParser(
        description=doc,
        epilog=meaning,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_common(
    parser: argparse.ArgumentParser, formats: tuple[str, ...], windows: int = 16
) -> None:
    """What every program needs."""
    parser.add_argument(
        "--evaluation",
        default="heldout",
        metavar="TEXT",
        help="text file, or heldout: windows behind the calibration's (default)",
    )
    parser.add_argument("--windows", type=int, default=windows, help="evaluated [%(default)s]")
    parser.add_argument("--sequence-length", type=int, default=512, help="[%(default)s]")
    parser.add_argument(
        "--formats", nargs="+", type=_format, default=list(formats), metavar="FORMAT"
    )
    parser.add_argument("--lm-head", default="keep", help="bits of the head [%(default)s]")
    parser.add_argument("--embedding", default="keep", help="bits of the table [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON lines, one per figure")
    parser.add_argument("--work", type=Path, help="keep statistics here and reuse them")


def add_calibration(parser: argparse.ArgumentParser, samples: int = 128) -> None:
    """One model and one calibration text."""
    parser.add_argument("model", metavar="MODEL", help="ONNX folder or file")
    parser.add_argument("--calibration", required=True, metavar="TEXT", help="a file, or self")
    parser.add_argument("--samples", type=int, default=samples, help="windows [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the draw, see --pool")
    parser.add_argument(
        "--pool",
        type=int,
        default=0,
        help="draw the samples from this many windows; 0 takes the first ones (default)",
    )


def calibration_of(args: argparse.Namespace, **changes: object) -> CalibrationConfig:
    """The calibration that the arguments describe."""
    wish = {name: getattr(args, name, None) for name in ("samples", "seed", "sequence_length")}
    wish["source"] = getattr(args, "calibration", None)
    return CalibrationConfig.model_validate({**wish, **changes})


@contextlib.contextmanager
def opened_bench(args: argparse.Namespace) -> Iterator[Bench]:
    """The bench that the arguments describe."""
    with work_folder(args.work) as folder:
        yield Bench.prepare(
            args.model,
            folder,
            calibration=calibration_of(args),
            evaluation=args.evaluation,
            windows=args.windows,
            pool=args.pool,
            progress=make_progress(sys.stderr),
        )


def parse_format(text: str) -> dict[str, object]:
    """Settings of a FORMAT.

    Raises:
        FaqOnnxError: It is neither bits and block size nor a budget.
    """
    found = _FORMAT.fullmatch(text)
    if found is None:
        parse_budget(text)
        return {"budget": text}
    return {"bits": int(found[1]), "block_size": int(found[2]), "symmetric": bool(found[3])}


def method_argument(text: str) -> str:
    """Check a METHOD before anything is computed."""
    checked(QuantizeConfig, settings_of(text), text)
    return text


def checked(model: type[_Model], settings: dict[str, object], text: str) -> _Model:
    """A configuration of an argument's settings; what is wrong with `text` otherwise."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise argparse.ArgumentTypeError(f"{text!r}: {place}: {first['msg']}") from error


def settings_of(method: str) -> dict[str, object]:
    """`faq faq.window=2` -> {"method": "faq", "faq": {"window": "2"}}."""
    name, *settings = method.split()
    return {"method": name, **keys_of(settings)}


def keys_of(settings: Iterable[str]) -> dict[str, object]:
    """`["faq.window=2", "roles=a,b"]` -> {"faq": {"window": "2"}, "roles": ["a", "b"]}."""
    result: dict[str, object] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        place = result
        *sections, last = key.split(".")
        for section in sections:
            place = place.setdefault(section, {})  # type: ignore[assignment]
        place[last] = value.split(",") if last in {"roles", "exclude"} else value
    return result


def make_config(method: str, fmt: str, args: argparse.Namespace, **more: object) -> QuantizeConfig:
    """The configuration of one row."""
    kept = {"lm_head": args.lm_head, "embedding": args.embedding}
    return QuantizeConfig.model_validate(
        {**kept, **parse_format(fmt), **settings_of(method), **more}
    )


def show(figure: Figure, difference: Difference | None = None, against: str = "") -> None:
    """Print one row."""
    versus = "" if difference is None else f"  minus {against} {difference}"
    bits = np.nan if figure.bits_per_weight is None else figure.bits_per_weight
    print(
        f"{figure.name:<28} acc {figure.accuracy_level}  KL {figure.kl_nats:.5f}{versus}  "
        f"top-1 {figure.top1:.3f}  ppl {figure.perplexity:.3f} "
        f"(float {figure.perplexity_float:.3f})  {figure.size_bytes / 1e6:.1f} MB  "
        f"{bits:.2f} bpw  plan {figure.plan_s:.0f} s, quantize {figure.quantize_s:.0f} s",
        flush=True,
    )


def _format(text: str) -> str:
    try:
        parse_format(text)
    except FaqOnnxError as error:
        msg = f"{text!r} is neither bits and blocks (4b32) nor a budget (3.0bpw, 80MB, kl<=0.05)"
        raise argparse.ArgumentTypeError(msg) from error
    return text
