"""Time and memory of a whole conversion, in units of one plain float32 forward pass.

    python tools/bench_convert.py MODEL --calibration c4-train.txt --samples 128

runs, each in a process of its own and one after the other: onnxruntime over the same calibration
tokens with the float32 model as it is (4 windows at a time, default session settings), then
`faq-onnx convert` with each method. Prints seconds, their ratio to the forward pass, peak resident
size and its ratio to the float32 weights. Only ratios within one run mean anything: the machine's
other work changes from hour to hour. The forward pass is run first and last, and averaged.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from work import work_folder

from faq_onnx.artifacts.run import RunReport
from faq_onnx.calibration.corpus import load_corpus
from faq_onnx.config import CalibrationConfig
from faq_onnx.export import resolve_source
from faq_onnx.progress import SILENT

WINDOWS_AT_A_TIME = 4
VOCABULARY = 1 << 31  # the bench trusts the tokenizer


@dataclasses.dataclass(frozen=True)
class Run:
    """One process: wall-clock seconds and peak resident bytes."""

    name: str
    seconds: float
    peak_bytes: int


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    args = _parse(argv)
    if args.forward:
        return _forward(args)
    own = [sys.executable, __file__, args.model, "--forward", *_corpus(args)]
    own += [] if args.pass_windows is None else ["--pass-windows", str(args.pass_windows)]
    runs = [_measure("forward", own)]
    reports = {}
    with work_folder(args.keep) as folder:
        for method in args.methods:
            out = folder / method
            runs.append(_measure(method, _convert(args, method, out)))
            reports[method] = RunReport.load(out / "report.json")
    runs.append(_measure("forward again", own))
    _show(runs, reports)
    return 0


def _convert(args: argparse.Namespace, method: str, out: Path) -> list[str]:
    command = [sys.executable, "-m", "faq_onnx", "convert", args.model, "-o", str(out)]
    command += ["--method", method, "--max-kl", "100", "--quiet", *args.options]
    return command + _corpus(args)


def _corpus(args: argparse.Namespace) -> list[str]:
    asked = [] if args.samples is None else ["--samples", str(args.samples)]
    length = ["--sequence-length", str(args.sequence_length)]
    return ["--calibration", args.calibration, *asked, *length]


def _forward(args: argparse.Namespace) -> int:
    """The plain pass; prints the seconds of loading and of running."""
    import onnxruntime as ort  # noqa: PLC0415 - only this process needs it

    from faq_onnx.runtime.feeds import decoder_feeds  # noqa: PLC0415

    source = resolve_source(args.model, Path(tempfile.gettempdir()), SILENT)
    config = CalibrationConfig(
        source=args.calibration, samples=args.samples, sequence_length=args.sequence_length
    )
    corpus = load_corpus(
        config,
        source=source,
        vocabulary=VOCABULARY,
        count=config.count,
        holdout=0,
        progress=SILENT,
    )
    windows = corpus.calibration[: args.pass_windows]
    share = len(windows) / len(corpus.calibration)
    session = ort.InferenceSession(str(source.onnx_path), providers=["CPUExecutionProvider"])
    start = time.perf_counter()
    for first in range(0, len(windows), WINDOWS_AT_A_TIME):
        ids = windows[first : first + WINDOWS_AT_A_TIME]
        session.run(["logits"], decoder_feeds(session.get_inputs(), ids))
    print(json.dumps({"run_s": (time.perf_counter() - start) / share}))
    return 0


def _measure(name: str, command: list[str]) -> Run:
    print(f"{name} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603
    assert process.stdout is not None
    output = process.stdout.read()
    _pid, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{name} failed: {' '.join(command)}")
    if name.startswith("forward"):
        seconds = json.loads(output)["run_s"]
    return Run(name, seconds, usage.ru_maxrss * 1024)


def _show(runs: list[Run], reports: dict[str, RunReport]) -> None:
    forward = (runs[0].seconds + runs[-1].seconds) / 2
    weights = next(iter(reports.values())).totals.source_bytes
    print(f"float32 model {weights / 1e6:.0f} MB; forward pass {forward:.1f} s (mean of two)")
    for run in runs:
        bound = (run.peak_bytes - 500e6) / weights
        print(
            f"{run.name:<14} {run.seconds:8.1f} s  {run.seconds / forward:5.2f} x forward  "
            f"peak {run.peak_bytes / 1e6:6.0f} MB = {bound:.2f} x weights + 500 MB"
        )
    for method, report in reports.items():
        stages = "  ".join(f"{s.stage} {s.duration_s:.1f}" for s in report.stages)
        print(f"{method:<14} {stages}")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument(
        "--samples",
        type=int,
        help="windows; left out, as many as convert takes of itself of a text that is long enough",
    )
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=["rtn", "awq", "faq"])
    parser.add_argument(
        "--pass-windows",
        type=int,
        metavar="N",
        help="run the plain pass over the first N windows and scale it up to all of them",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the packages here")
    parser.add_argument("--forward", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="for convert")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
