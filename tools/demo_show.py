"""What the demo shows: speed and text of a model, the table, two continuations, what is next."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from faq_onnx.artifacts.run import RunReport
from faq_onnx.artifacts.verification import LogitMetrics
from faq_onnx.report.tables import format_bytes, format_duration, render_table
from faq_onnx.runtime.generate import generate_greedy
from faq_onnx.runtime.session import open_session

__all__ = ["Trial", "comparison_table", "side_by_side", "times_line", "try_model", "what_next"]

WARM_UP_TOKENS = 4
TIMED_TOKENS = 48
ROUNDS = 2
WIDTH = 96  # of running text
NARROW = 80  # columns; below, the two texts stand one above the other


@dataclasses.dataclass(frozen=True)
class Trial:
    """One model at work.

    Attributes:
        size_bytes: Of the ONNX files.
        tokens_per_s: Greedy decoding of one text, behind the prompt.
        continuation: Token ids behind the prompt.
        text: The same as text.
    """

    size_bytes: int
    tokens_per_s: float
    continuation: tuple[int, ...]
    text: str


def try_model(folder: Path, prompt: str, max_tokens: int) -> Trial:
    """Let a model continue the prompt and measure how fast it is."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # No special tokens: the converted tokenizer prepends one that the model was not trained on.
    ids = np.asarray(tokenizer.encode(prompt, add_special_tokens=False).ids, np.int64)
    session = open_session(folder / "model.onnx")
    found = tuple(generate_greedy(session, ids, max_tokens, _stop_tokens(folder)))
    return Trial(
        size_bytes=sum(file.stat().st_size for file in folder.glob("model.onnx*")),
        tokens_per_s=max(_decode_speed(session, ids) for _ in range(ROUNDS)),
        continuation=found,
        text=tokenizer.decode([*ids, *found])[len(prompt) :],
    )


def comparison_table(reports: Mapping[str, RunReport], trials: Mapping[str, Trial]) -> str:
    """A line each: the float model, and those that have a report."""
    metrics = {name: _logits(report) for name, report in reports.items()}
    any_metrics = next(iter(metrics.values()))
    rows = []
    for name, trial in trials.items():
        quality = (f"{any_metrics.perplexity_float:.2f}", "0", "100.0 %")
        if name in metrics:
            quality = _quality(metrics[name])
        size, speed = format_bytes(trial.size_bytes), f"{trial.tokens_per_s:.1f}"
        rows.append((name, size, *quality, speed))
    header = ("model", "size", "perplexity", "KL to float", "same top token", "tokens/s")
    legend = (
        f"KL in nats/token, 0 = equal; on {any_metrics.tokens:,} tokens of prose that no method "
        f"was calibrated on. tokens/s: greedy, one text, the faster of {ROUNDS} rounds."
    )
    return f"{render_table(header, rows)}\n\n{textwrap.fill(legend, WIDTH)}"


def side_by_side(prompt: str, left: Trial, right: Trial) -> str:
    """Both continuations, in two columns where the terminal is wide enough."""
    pairs = zip(left.continuation, right.continuation, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if left.continuation == right.continuation:
        agreement = f"all {same} tokens are the same"
    else:
        agreement = f"the first {same} of {len(left.continuation)} tokens are the same"
    columns = min(shutil.get_terminal_size((100, 24)).columns, 120)
    head = f'"{prompt} ..." ({agreement})'
    titles = (_title("float", left), _title("FAQ-GPTQ, 4 bits", right))
    if columns < NARROW:
        bodies = ["\n".join(_wrap(trial.text, columns)) for trial in (left, right)]
        return "\n\n".join((head, *(f"{t}\n{b}" for t, b in zip(titles, bodies, strict=True))))
    width = (columns - 3) // 2
    cells = [
        [title, "-" * width, *_wrap(trial.text, width)]
        for title, trial in zip(titles, (left, right), strict=True)
    ]
    lines = itertools.zip_longest(*cells, fillvalue="")
    return "\n".join([head, "", *(f"{a:<{width}} | {b}".rstrip() for a, b in lines)])


def what_next(folders: Mapping[str, Path]) -> str:
    """Where the models lie, and commands to go on with."""
    command = Path(sys.executable).with_name("faq-onnx")
    model, package = folders["float"], folders["FAQ-GPTQ"]
    return "\n".join(
        [
            "The models:",
            *(f"  {name:<5}  {folder}" for name, folder in folders.items()),
            "",
            f"What was done to the last one, and how to run it: {package / 'summary.md'}",
            "",
            "Next:",
            f"  {command} inspect {model}",
            f"  {command} convert {model} -o out --lm-head 4      # smaller still",
            f"  {command} convert YOUR_MODEL -o out               # .onnx, Hugging Face or .gguf",
        ]
    )


def times_line(seconds: Mapping[str, float]) -> str:
    """What took how long."""
    parts = ", ".join(f"{step} {format_duration(value)}" for step, value in seconds.items())
    return textwrap.fill(f"Time: {format_duration(sum(seconds.values()))} ({parts})", WIDTH)


def _decode_speed(session: ort.InferenceSession, prompt: npt.NDArray[np.int64]) -> float:
    """Tokens per second behind the prompt."""
    tokens = generate_greedy(session, prompt, WARM_UP_TOKENS + TIMED_TOKENS)
    for _ in range(WARM_UP_TOKENS):
        next(tokens)
    start = time.perf_counter()
    timed = sum(1 for _ in tokens)
    return timed / (time.perf_counter() - start)


def _stop_tokens(folder: Path) -> Collection[int]:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    stop = config.get("eos_token_id", [])
    return stop if isinstance(stop, list) else [int(stop)]


def _logits(report: RunReport) -> LogitMetrics:
    assert report.verification is not None  # a conversion always verifies
    assert report.verification.logits is not None
    return report.verification.logits


def _quality(logits: LogitMetrics) -> tuple[str, str, str]:
    top1 = f"{100 * logits.top1_agreement:.1f} %"
    return f"{logits.perplexity:.2f}", f"{logits.kl_nats:.4f}", top1


def _title(name: str, trial: Trial) -> str:
    return f"{name} ({format_bytes(trial.size_bytes)}, {trial.tokens_per_s:.0f} tokens/s)"


def _wrap(text: str, width: int) -> list[str]:
    lines = text.strip().splitlines()
    return [piece for line in lines for piece in textwrap.wrap(line, width) or [""]]
