"""Runs on another processor, with numpy and onnxruntime alone: a package, and single kernels.

`python arm_trial.py FOLDER`: FOLDER has model.ort, package.json and probes *.onnx with an input A.
One JSON value on stdout; which probe was slow stands in onnxruntime's log, between our lines.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

FATAL, INFO = 4, 1
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def open_session(path: Path, level: int) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = level
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def greedy(session: Any, prompt: list[int], steps: int) -> tuple[list[int], list[float]]:
    """Tokens, and the logits behind the prompt."""
    cache, ids = None, np.array([prompt], np.int64)
    tokens: list[int] = []
    first: list[float] = []
    for step in range(steps):
        past = len(prompt) + step - 1 if step else 0
        feeds = {}
        for value in session.get_inputs():
            if value.name == "input_ids":
                feeds[value.name] = ids
            elif value.name == "attention_mask":
                feeds[value.name] = np.ones((1, past + ids.shape[1]), np.int64)
            elif value.name == "position_ids":
                feeds[value.name] = np.arange(past, past + ids.shape[1])[None]
            else:
                shape = (1, value.shape[1], 0, value.shape[3])
                empty = np.zeros(shape, TYPES[value.type])
                feeds[value.name] = empty if cache is None else cache[value.name]
        names = [value.name for value in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        cache = {
            name.replace("present", "past_key_values"): array for name, array in outputs.items()
        }
        row = outputs["logits"][0, -1].astype(np.float64)
        first = first or row.tolist()
        tokens.append(int(row.argmax()))
        ids = np.array([tokens[-1:]], np.int64)
    return tokens, first


def main(folder: Path) -> None:
    reference = json.loads((folder / "package.json").read_text())["reference"]
    found: dict[str, Any] = {"machine": os.uname().machine, "onnxruntime": ort.__version__}
    session = open_session(folder / "model.ort", FATAL)
    tokens, row = greedy(session, reference["prompt"], len(reference["tokens"]))
    size = max(abs(value) for _, value in reference["logits"])
    worst = max(abs(row[token] - value) for token, value in reference["logits"])
    found |= {"tokens": tokens, "logits": row, "distance": worst / size}
    for probe in sorted(folder.glob("*.onnx")):
        sys.stderr.write(f"probe {probe.stem}\n")
        sys.stderr.flush()
        session = open_session(probe, INFO)
        (value,) = session.get_inputs()
        session.run(None, {"A": np.zeros((1, value.shape[1]), TYPES[value.type])})
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
