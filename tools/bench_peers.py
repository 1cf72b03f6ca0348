"""Low-bit models of one ONNX file by other tools and our own, measured as our tables are.

    python tools/bench_peers.py MODEL --calibration c4.txt --evaluation wikitext2.test.txt
        --models-dir DIR --results peers.jsonl --python modelopt=ENV/bin/python

Each peer writes DIR/NAME-FORMAT.onnx (skipped when it is there already), which is then compared
with the float model on the same windows as in bench_quality.py, at accuracy_level 4 (int8
activations) and 0 (float32 ones). The level is set on every MatMulNBits node; a model that holds
DequantizeLinear instead gets the level from onnxruntime's session option, 4 being its default.
A peer that fails gets a row with its error. Embedding and head stay float in every row. `faq-onnx`
is our own command with all its defaults: it takes its own number of windows from the same text.

Peers named in --python run in an environment of their own: `modelopt` needs
nvidia-modelopt[onnx], `onnxsim` itself and onnxruntime, `genai` onnxruntime-genai and transformers
5, `olive` what tools/peers/olive_gptq.py says. The last two read the checkpoint named by --hf, of
which MODEL must be the export, and write a graph of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from peer_tools import PEERS, Job

from faq_onnx.calibration.corpus import load_corpus
from faq_onnx.config import CalibrationConfig
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.progress import SILENT
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.stages import opening
from faq_onnx.verify.logits import LogitComparison

QDQ_LEVEL = "session.qdq_matmulnbits_accuracy_level"

Tokens = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Made:
    """What a peer did: the seconds that its quantization took, or how it failed."""

    seconds: float
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; see quality.Figure for the measures.

    Attributes:
        name: Peer and format.
        accuracy_level: 4 or 0.
        set_by: "attribute" of MatMulNBits or "session" option.
        kl_nats: Mean over positions; nan if the peer failed, as all that follows.
        kl_windows: The same per window, for paired comparisons.
        top1: Share of positions with the same argmax.
        perplexity: Of the low-bit model.
        perplexity_float: Of the source.
        size_bytes: Of the file or files.
        weights: Low-bit matrices in it.
        bits_per_weight: Of these, with scales and zero points.
        seconds: From loading to writing, and the start of the process if it has one of its own.
        error: Of the peer or of onnxruntime.
    """

    name: str
    accuracy_level: int
    set_by: str = ""
    kl_nats: float = math.nan
    kl_windows: tuple[float, ...] = ()
    top1: float = math.nan
    perplexity: float = math.nan
    perplexity_float: float = math.nan
    size_bytes: int = 0
    weights: int = 0
    bits_per_weight: float = math.nan
    seconds: float = math.nan
    error: str = ""


def make(peer: str, job: Job) -> Made:
    """Let a peer write its model, unless an earlier run did."""
    record = job.output.with_suffix(".json")
    if job.output.is_file() and record.is_file():
        return Made(**json.loads(record.read_text(encoding="utf-8")))
    start = time.perf_counter()
    try:
        PEERS[peer](job)
    except Exception as error:  # noqa: BLE001 - whatever another tool raises is its row
        job.output.unlink(missing_ok=True)
        return Made(time.perf_counter() - start, _one_line(error))
    made = Made(time.perf_counter() - start)
    record.write_text(json.dumps(dataclasses.asdict(made)), encoding="utf-8")
    return made


def measure(peer: str, job: Job, float_logits: FloatLogits, args: argparse.Namespace) -> list[Row]:
    """A row per accuracy level."""
    name = f"{peer}{args.label} {job.bits}b{job.block_size}"
    made = make(peer, job)
    rows = [Row(name, level, seconds=made.seconds, error=made.error) for level in args.levels]
    if made.error:
        return rows
    return [_evaluate(row, job.output, float_logits, args.threads) for row in rows]


def _evaluate(row: Row, path: Path, float_logits: FloatLogits, threads: int | None) -> Row:
    """Fill in a row: KL against the float model, window by window."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        model = load_model(path)
        nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
        for node in nodes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", row.accuracy_level)
        levelled = Path(folder) / "levelled.onnx"
        save_model(model, levelled)
        weights, bits = _weight_bits(model)
        row = dataclasses.replace(
            row,
            set_by="attribute" if nodes else "session",
            size_bytes=sum(one.stat().st_size for one in path.parent.glob(f"{path.name}*")),
            weights=weights,
            bits_per_weight=bits,
        )
        config = {QDQ_LEVEL: str(row.accuracy_level)}
        try:
            session = open_session(levelled, threads=threads, config=config)
            metrics = [
                _compare(session, ids, logits) for ids, logits in float_logits.windows(threads)
            ]
        except Exception as error:  # noqa: BLE001 - a file that does not run is a result
            return dataclasses.replace(row, error=_one_line(error))
    return dataclasses.replace(
        row,
        kl_nats=float(np.mean([one.kl_nats for one in metrics])),
        kl_windows=tuple(one.kl_nats for one in metrics),
        top1=float(np.mean([one.top1_agreement for one in metrics])),
        # the windows have one length, so that means of windows are means of tokens
        perplexity=math.exp(np.mean([math.log(one.perplexity) for one in metrics])),
        perplexity_float=math.exp(np.mean([math.log(one.perplexity_float) for one in metrics])),
    )


def _compare(session: Any, ids: Tokens, float_logits: npt.NDArray[np.float32]) -> Any:
    output = session.get_outputs()[0].name
    feeds = decoder_feeds(session.get_inputs(), ids)
    logits = np.asarray(run_session(session, feeds, [output])[output], np.float32)
    comparison = LogitComparison()
    comparison.add(float_logits, logits, ids)
    return comparison.metrics()


def _weight_bits(model: ir.Model) -> tuple[int, float]:
    """How many matrices are low-bit, and their mean bits per weight, scales included."""
    stored, counts = 0, []
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            parts, count = node.inputs[1:4], _integer(node, "K") * _integer(node, "N")
        elif node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
            tensor = node.inputs[0].const_value
            parts, count = node.inputs[:3], 0 if tensor is None else int(tensor.size)
        else:
            continue
        counts.append(count)
        stored += sum(
            8 * part.const_value.nbytes
            for part in parts
            if part is not None and part.const_value is not None
        )
    return len(counts), stored / sum(counts) if counts else math.nan


def _integer(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int())


@dataclasses.dataclass(frozen=True)
class FloatLogits:
    """The float model's answers, computed once and kept on disk.

    Attributes:
        source: The float model.
        ids: int64 [windows, length].
        folder: Where the logits lie, named by the tokens.
    """

    source: Path
    ids: Tokens
    folder: Path

    def windows(self, threads: int | None) -> Iterator[tuple[Tokens, npt.NDArray[np.float32]]]:
        """Yield (ids [1, length], logits [1, length, vocabulary]) window by window."""
        session = None
        for row in self.ids:
            path = self.folder / f"float-{hashlib.sha256(row.tobytes()).hexdigest()[:16]}.npy"
            if not path.is_file():
                session = session or open_session(self.source, threads=threads)
                output = session.get_outputs()[0].name
                feeds = decoder_feeds(session.get_inputs(), row[None])
                np.save(path, run_session(session, feeds, [output])[output].astype(np.float32))
            yield row[None], np.load(path)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def main(argv: list[str] | None = None) -> int:
    """Make, measure and print."""
    args = _parse(argv)
    args.models_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.models_dir) as scratch:
        print(_HEAD, flush=True)
        opened = opening.open_model(args.model, Path(scratch), SILENT)
        source = opened.source.onnx_path

        def windows(text: str, count: int) -> Tokens:
            settings = CalibrationConfig(
                source=text, samples=count, sequence_length=args.sequence_length
            )
            return load_corpus(
                settings,
                source=opened.source,
                vocabulary=opened.vocabulary,
                count=count,
                holdout=0,
                progress=SILENT,
            ).calibration

        inputs = open_session(source, prepack=False, threads=args.threads).get_inputs()
        calibration = windows(args.calibration, args.samples)
        feeds = tuple(decoder_feeds(inputs, row[None]) for row in calibration)
        float_logits = FloatLogits(source, windows(args.evaluation, args.windows), args.models_dir)
        for name in args.formats:
            for peer in args.peers:
                job = Job(
                    source=source,
                    output=args.models_dir / f"{peer}{args.label}-{name}.onnx",
                    bits=int(name.partition("b")[0]),
                    block_size=int(name.partition("b")[2]),
                    feeds=feeds,
                    text=args.calibration,
                    hf=args.hf,
                    pythons=dict(args.python),
                )
                rows = measure(peer, job, float_logits, args)
                _append(args.results, rows, args)
                _write_table(args.results)
    return 0


def _append(path: Path, rows: list[Row], args: argparse.Namespace) -> None:
    context = {"model": args.model, "samples": args.samples, "windows": args.windows}
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            record = {**dataclasses.asdict(row), **context}
            file.write(json.dumps({k: v for k, v in record.items() if not _is_nan(v)}) + "\n")
            print(_line(row), flush=True)


def _is_nan(value: object) -> bool:
    """What a failed peer leaves unmeasured, and JSON cannot hold."""
    return isinstance(value, float) and math.isnan(value)


def _write_table(results: Path) -> None:
    """The latest row of each name and level of a results file, as Markdown beside it."""
    fields = {field.name for field in dataclasses.fields(Row)}
    lines = results.read_text(encoding="utf-8").splitlines()
    rows = [
        Row(**{key: value for key, value in json.loads(line).items() if key in fields})
        for line in lines
    ]
    latest = {(row.name, row.accuracy_level): row for row in rows}
    table = "\n".join([_HEAD, *map(_line, latest.values())])
    results.with_suffix(".table.md").write_text(table + "\n", encoding="utf-8")


_HEAD = """\
| peer, format | level | KL | top-1 | perplexity | MB | bits/weight | matrices | s |
|---|---|---|---|---|---|---|---|---|"""


def _line(row: Row) -> str:
    if row.error:
        return f"| {row.name} | {row.accuracy_level} | {row.error} | | | | | | |"
    level = f"{row.accuracy_level}, {row.set_by}"
    return (
        f"| {row.name} | {level} | {row.kl_nats:.4f} | {100 * row.top1:.1f} % "
        f"| {row.perplexity:.2f} | {row.size_bytes / 1e6:.1f} | {row.bits_per_weight:.3f} "
        f"| {row.weights} | {row.seconds:.0f} |"
    )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--formats", nargs="+", default=["4b32", "4b128"], type=_format)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--samples", type=int, default=3, help="calibration windows")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows")
    parser.add_argument("--levels", nargs="+", type=int, default=[4, 0])
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--models-dir", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--hf", type=Path, help="checkpoint, for the peers that start from one")
    parser.add_argument("--label", default="", help="added to the names of peers and files")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--python", nargs="*", default=[], type=_pair, metavar="NAME=PATH", help="environments"
    )
    return parser.parse_args(argv)


def _format(text: str) -> str:
    if not re.fullmatch(r"\d+b\d+", text):
        raise argparse.ArgumentTypeError(f"{text}: write bits and block size, as in 4b32")
    return text


def _pair(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: write NAME=path/to/python")
    return name, path


if __name__ == "__main__":
    sys.exit(main())
